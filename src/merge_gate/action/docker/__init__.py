"""The gate in a container: Docker or Podman, what goes in, what comes out. Python 3.9, standard library."""
