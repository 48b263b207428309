"""Measurements → findings → verdict, in plain Python."""
