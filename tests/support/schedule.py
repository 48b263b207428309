"""Which tests run in the same process when pytest-xdist runs several.

A file's tests stay together, because they share the fixtures of their module. The exceptions are below. Large groups
start first and single tests last, so that all processes end at about the same time.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    # All of them need the fixture `judged`, which takes many seconds.
    "tests/engine/test_inputs_unchanged.py": "judged",
    "tests/test_weight_formats.py": "judged",
    "tests/test_docs.py": "judged",
    "tests/test_faults.py": "judged",
    # Each starts a Ray cluster on this machine.
    "tests/on_ray/test_ray.py": "ray",
    "tests/run/test_thousand.py": "ray",
}
ONE_BY_ONE = {
    "tests/engine/test_bitsandbytes.py",
    "tests/worker/test_quick_imports.py",
    "tests/worker/test_process.py",
    "tests/worker/test_supervisor.py",
    "tests/cache/test_cache.py",
    "tests/fuzz/test_fuzz.py",
    "tests/files/test_resolve.py",
    "tests/test_cli.py",
    "tests/run/test_flow.py",
    "tests/test_methods.py",
}
"""Files of many long tests: each test goes to whichever process is free."""


class Schedule(LoadScopeScheduling):
    """One unit of work per file, group of files, or single test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in ONE_BY_ONE else TOGETHER.get(file, file)
