"""Which adapters are merged in one pass."""

from __future__ import annotations

import pytest

from merge_gate.features.stream import batches as passes_of
from merge_gate.features.stream.batches import batches
from merge_gate.worker.protocol import ConsumerSpec, Task


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
