"""What a finished directory is: the merge, another merge, the base, or something else."""
