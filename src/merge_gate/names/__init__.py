"""What a name or a word means that may be mistyped. Uses the standard library only."""
