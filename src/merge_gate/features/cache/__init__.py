"""Verdicts of earlier runs: their key, and the sealed store."""
