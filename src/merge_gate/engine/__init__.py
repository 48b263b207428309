"""Bases, adapters and merges, in a process of its own: everything that imports torch or PEFT."""
