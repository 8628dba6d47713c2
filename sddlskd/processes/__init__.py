"""Processes of this package: exit codes, signals, their end with a parent, and their number."""
