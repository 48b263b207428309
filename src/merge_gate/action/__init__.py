"""What runs on the runner's own Python (3.9): the standard library only."""
