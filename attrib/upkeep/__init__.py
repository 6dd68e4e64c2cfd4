"""Looking after a work directory: its status, its damaged and superfluous files, exports for other programs."""
