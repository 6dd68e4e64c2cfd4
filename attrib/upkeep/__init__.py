"""Looking after a work directory: what is done and who is at it; damaged and unwanted files; copies for others."""
