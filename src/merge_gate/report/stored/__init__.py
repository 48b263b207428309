"""Reports on disk: the output directory, writing, reading back, comparing."""
