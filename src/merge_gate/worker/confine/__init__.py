"""What the worker process gives up before it imports anything."""
