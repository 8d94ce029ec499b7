"""What became of a run, for people."""
