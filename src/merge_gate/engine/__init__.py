"""Bases, adapters and merges with torch and PEFT. Runs inside the worker process only."""
