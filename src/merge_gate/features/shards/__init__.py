"""A run cut into parts for several machines, and their reports made one again."""
