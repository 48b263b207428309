"""Runs the shards of a gate on a Ray cluster. Only `ray_cluster` imports Ray."""
