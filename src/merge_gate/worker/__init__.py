"""The confined worker process: started, fed and watched from outside. Only `child` imports the engine."""
