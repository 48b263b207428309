"""Runs the shards of a gate on a Ray cluster. Only `run_on_ray` imports Ray."""
