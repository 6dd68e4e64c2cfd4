"""The work directory on disk: whole files, chunks of maps, rows of scores, the ledger of failures, signs of life."""
