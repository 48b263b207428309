"""The merges of a job, in the worker: its bases are loaded, and its tasks merged. Only this folder calls the engine."""
