"""Read and write files safely: atomic writes, checkpoints, downloads and archives."""
