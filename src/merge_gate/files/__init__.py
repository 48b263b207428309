"""Names to directories to what the files say. Reads headers and JSON; imports no torch."""
