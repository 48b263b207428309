"""Resolves names to directories and reads headers and JSON of the files there. Imports no torch."""
