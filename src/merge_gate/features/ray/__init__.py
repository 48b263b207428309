"""Runs the shards of a gate on a Ray cluster. Only `feature` imports Ray."""
