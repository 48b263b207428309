"""Verdicts of earlier runs: how they are sealed, stored, and reused, with figures of bases."""
