"""Output on the terminal: messages, progress displays and meters of long tasks."""
