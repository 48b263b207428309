"""Tells CI systems about a run, in the environment of the gate."""
