"""When a verdict on a streamed base counts, what a run removes, and which adapters are merged in one pass."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from merge_gate.features.stream.feature import StreamedBases
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_identity
from merge_gate.records.files import Fetched, Snapshot
from merge_gate.run.flow import Run
from merge_gate.worker.batches import batches, most_model_files
from merge_gate.worker.protocol import ConsumerSpec, Task
from tests.support.hub import LoopbackHub
from tests.support.judged_entry import based_entry
from tests.support.judging.cases import evidence

WEIGHTS = "model.safetensors"


def test_a_verdict_on_a_streamed_base_counts_when_all_bytes_came(tmp_path: Path, server: LoopbackHub) -> None:
    content = (2).to_bytes(8, "little") + b"{}"
    commit = server.add_repo("a/b", {WEIGHTS: content})
    (tmp_path / "small").mkdir()
    asked = Fetched(repo_id="a/b", commit=commit, directory=str(tmp_path / "small"), sizes={}, streamable=(WEIGHTS,))
    watch, tally = BaseWatch(), SimpleNamespace()
    streamed = StreamedBases(cast("Run", SimpleNamespace(watch=watch, tally=tally)))
    base, again = streamed.lay_out(asked), streamed.lay_out(asked)
    assert base != again
    assert Path(base).parent == Path(again).parent
    entry = replace(based_entry(tmp_path), base=Snapshot(name="./b", directory=base))
    tally.entries = [entry]
    assert streamed.refusal(0, evidence()) is not None
    watch.read_whole(base, base_identity(base), {WEIGHTS: hashlib.sha256(content).hexdigest()})
    assert streamed.refusal(0, evidence()) is None
    streamed.close()
    assert not Path(base).parent.exists()


def test_a_pass_has_as_many_models_as_files_may_be_open() -> None:
    """The last one needs more by itself: it is tried alone."""
    most = most_model_files()
    files = (most // 2, 0, most // 2, most // 2 + 1, most // 2 - 1, most * 2)
    tasks = [
        (Task(index=index, files=(), consumers=(ConsumerSpec(feature="publish", files=count),)), None)
        for index, count in enumerate(files)
    ]
    passes = [[task.index for task, _ in batch] for batch in batches(tasks)]
    assert passes == [[0, 1, 2], [3, 4], [5]]
