"""Files that survive a crash: atomic writes, checkpoints, downloads and archives."""
