"""Runs models on made-up inputs: base, adapter, and merge must compute finite values, and the same function."""
