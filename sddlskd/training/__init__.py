"""Train students: from a list of jobs (one configuration per training run) to trained networks."""
