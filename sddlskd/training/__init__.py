"""Training: from typed jobs to trained students."""
