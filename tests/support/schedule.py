"""Which tests run in the same process when pytest-xdist runs several.

A file's tests stay together, because they share the fixtures of their module. The exceptions are below. Large groups
start first and single tests last, so that all processes end at about the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

TOGETHER = {
    # All of them need the fixture `judged`, which takes many seconds.
    "tests/engine/merge/test_inputs_unchanged.py": "judged",
    "tests/test_weight_formats.py": "judged",
    "tests/test_docs.py": "judged",
    "tests/test_faults.py": "judged",
    # All of them need the fixture `fleet`, a run over 16 merges.
    "tests/features/cache/test_cache.py": "fleet",
    "tests/features/ray/test_ray.py": "fleet",
    "tests/features/shards/test_shards.py": "fleet",
}
ONE_BY_ONE = {
    "tests/card/test_commands.py",
    "tests/card/test_fleets.py",
    "tests/engine/merge/test_bitsandbytes.py",
    "tests/worker/test_quick_imports.py",
    "tests/fuzz/test_fuzz.py",
    "tests/files/test_resolve.py",
    "tests/test_methods.py",
}
"""Files of many long tests: each test goes to whichever process is free."""


FIRST = (
    "judged",
    "tests/run/test_every_way.py",
    "fleet",
    "tests/worker/test_supervisor.py",
    "tests/features/export/test_export.py",
    "tests/run/test_flow.py",
    "tests/test_cli.py",
    "tests/run/test_streamed_bases.py",
    "tests/features/verify/test_verify_command.py",
    "tests/test_quickstart_page.py",
    "tests/features/publish/test_partial.py",
)
"""Units of work that take long though they have few tests."""


class Schedule(LoadScopeScheduling):
    """One unit of work per file, group of files, or single test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in ONE_BY_ONE else TOGETHER.get(file, file)

    def _assign_work_unit(self, node: WorkerController) -> None:
        for scope in reversed(FIRST):
            if scope in self.workqueue:
                self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)
