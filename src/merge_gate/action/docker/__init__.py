"""Runs the gate in a container of Docker or Podman. Python 3.9, standard library."""
