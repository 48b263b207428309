"""What every part builds on: errors, text, files, and names. It imports the standard library only."""
