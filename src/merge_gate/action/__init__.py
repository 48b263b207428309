"""Runs the GitHub action on the runner's own Python: 3.9 or newer, with the standard library only.

That applies to this package and to every module that it imports at run time. The only exception is the Docker SDK,
which docker/docker_api.py imports to start a container (tests/action/test_runner_python.py).
"""
