"""Training: from the configurations of runs to trained students."""
