"""When a verdict on a streamed base counts, what a run removes, and which adapters are merged in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from merge_gate.features.stream import batches as passes_of
from merge_gate.features.stream import hub_file
from merge_gate.features.stream.batches import batches
from merge_gate.features.stream.feature import StreamedBases
from merge_gate.features.stream.read_ahead import LocalFiles
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.identity import base_identity
from merge_gate.records.config import ALL_WEIGHTS
from merge_gate.records.files import Fetched
from merge_gate.records.measured import EarlierRun
from merge_gate.run.flow import Run
from merge_gate.worker.protocol import ConsumerSpec, Task
from tests.support.judged_entry import based_entry
from tests.support.judging.cases import base as base_facts
from tests.support.judging.cases import evidence

WEIGHTS = "model.safetensors"


def test_a_verdict_on_a_streamed_base_counts_when_all_bytes_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[str] = []
    entry = based_entry(tmp_path)
    base = base_directory(entry)

    def lay_out(_: Fetched, parent: str) -> tuple[str, LocalFiles]:
        parents.append(parent)
        files = LocalFiles(base, [WEIGHTS])
        files.sha256 = digests
        return base, files

    digests: Mapping[str, str] = {WEIGHTS: "0" * 64}
    monkeypatch.setattr(hub_file, "lay_out", lay_out)
    pinned = replace(entry, spec=replace(entry.spec, base=replace(entry.spec.base, sha256=((ALL_WEIGHTS, "0"),))))
    watch, tally = BaseWatch(), SimpleNamespace(entries=[entry, pinned])
    asked = Fetched(repo_id="a/b", commit="c", directory=base, sizes={}, streamable=(WEIGHTS,))
    partly = evidence(base=base_facts(record=EarlierRun(at="now", place="here")))
    streamed = StreamedBases(cast("Run", SimpleNamespace(watch=watch, tally=tally)))
    assert [streamed.lay_out(asked), streamed.lay_out(asked)] == [base, base]
    assert parents[0] == parents[1]
    assert Path(parents[0]).is_dir()
    assert streamed.refusal(0, evidence()) is not None
    assert streamed.refusal(0, partly) is None
    assert streamed.refusal(1, partly) is not None
    watch.read_whole(base, base_identity(base), digests)
    assert streamed.refusal(0, evidence()) is None
    streamed.close()
    assert not Path(parents[0]).exists()


def test_a_pass_has_as_many_models_as_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one needs more by itself: it is tried alone."""
    monkeypatch.setattr(passes_of, "most_model_files", lambda: 5)
    files = (2, 0, 2, 3, 2, 9)
    tasks = [
        (Task(index=index, files=(), consumers=(ConsumerSpec(feature="publish", files=count),)), None)
        for index, count in enumerate(files)
    ]
    passes = [[task.index for task, _ in batch] for batch in batches(tasks)]
    assert passes == [[0, 1, 2], [3, 4], [5]]
