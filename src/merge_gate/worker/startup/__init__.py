"""A faster start of the worker process."""
