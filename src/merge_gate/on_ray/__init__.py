"""A run on a Ray cluster. `ray_cluster` is the only module that imports Ray."""
