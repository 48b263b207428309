"""Limits of what the gate reads from mounts and servers that may not answer."""
