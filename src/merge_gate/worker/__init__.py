"""Starts, feeds, and watches the confined worker process. Only `child` runs inside it and imports the engine."""
