"""Features: each folder is imported only if a run asks for it."""
