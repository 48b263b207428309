"""What runs on the runner's own Python: from 3.9 on, with the standard library only.

That holds for every module of this package and for what they import at run time (`merge_gate.errors`,
`merge_gate.report.wording.untrusted`). The one exception is the Docker SDK, which docker/docker_api.py imports where a
container is started. tests/action/test_runner_python.py imports and runs all of it with a bare Python 3.9.
"""
