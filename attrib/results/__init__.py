"""Stored scores as labelled rows, tables, intervals and tests."""
