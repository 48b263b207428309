"""Verdicts of earlier runs: their key, the sealed store, and the reports that `--resume` reads."""
