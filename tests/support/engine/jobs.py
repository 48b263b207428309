"""A job for a worker, and what it answers, in this process: it does not confine itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate.files.preflight import preflight
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker import sandbox
from merge_gate.worker.child import judge_job
from merge_gate.worker.protocol import ConsumerSpec, Event, Group, Job, Task
from tests.support.engine.base_headers import base_files


def group_of(
    directory: Path,
    *adapters: Path,
    dtype: str = "auto",
    quantization: str = "none",
    first: int = 0,
    consumers: tuple[ConsumerSpec, ...] = (),
    no_forward: str | None = "",
    **fields: Any,
) -> Group:
    """A base with its adapters. Their tasks have numbers from `first` on; `fields` are others of the group."""
    read = [preflight(str(adapter), allow_pickle=False) for adapter in adapters]
    made = {
        "base": BaseKey(model="base", revision=None, dtype=dtype, quantization=quantization),
        "directory": str(directory),
        "files": base_files(directory),
        "tasks": tuple(
            Task(index=index, files=(one,), consumers=consumers, no_forward=no_forward)
            for index, one in enumerate(read, first)
        ),
    }
    return Group(**made | fields)


def events_as_they_come(*groups: Group, **connected: Any) -> Iterator[Event]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(sandbox.SWITCH, "off")
        yield from judge_job(Job(groups=groups, device="cpu"), lambda _: None, Sandbox(), **connected)


def events_of(*groups: Group) -> list[Event]:
    return list(events_as_they_come(*groups))
