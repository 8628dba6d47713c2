"""How the processes of this package end: their exit codes, and their end with their parent."""
