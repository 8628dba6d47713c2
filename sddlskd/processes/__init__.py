"""Processes of this package: their exit codes, their end with their parent, their number."""
