"""Verdicts of earlier runs: their key, the sealed store, and what a killed run has left."""
