"""A verdict is kept, and stands, only on the base whose files were loaded and hashed."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate.cache.keeper import base_directory
from merge_gate.cache.standing import Standing
from merge_gate.files.identity import base_identity
from merge_gate.records.measured import BaseFacts
from merge_gate.records.terms import Origin, Quantization
from merge_gate.worker.protocol import BaseLoaded, Group, Task
from tests.support.cache.keepers import CPU, keep, keeper
from tests.support.cache.lines import based_entry, line

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.files import Entry


class Run:
    """One adapter, number 7, and what its run knows of it."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.keeper = entry, keeper(entry)
        self.keeper.device_chosen(CPU)
        self.standing = Standing(self.keeper)
        tasks = (Task(index=7, files=()),)
        self.groups = (Group(base=line(entry).base.key, directory=base_directory(entry), tasks=tasks),)

    def close(self) -> None:
        self.keeper.close()

    def load(self) -> None:
        """The worker reads the base as it is now."""
        facts = BaseFacts(model="./b", revision=None, dtype="bfloat16", quantization=Quantization.NONE)
        identity = base_identity(base_directory(self.entry))
        self.standing.loaded(BaseLoaded(group=0, task=7, facts=facts, identity=identity, seconds=0.1))

    def hash(self) -> None:
        self.standing.merging(self.groups)
        self.keeper.digests.wait()

    def touch(self) -> None:
        os.utime(Path(base_directory(self.entry), "model.safetensors"), ns=(1, 1))

    def reach(self) -> None:
        self.standing.reached(7, self.entry, line(self.entry))

    def kept(self) -> list[int]:
        kept = [*self.standing.kept()]
        assert all(adapter.judged is not None for _, adapter in kept)
        return [index for index, _ in kept]

    def fallen(self) -> list[int]:
        fallen = [*self.standing.fallen()]
        assert all(one.refusal.origin is Origin.BASE for one in fallen)
        assert all("base ./b changed while it was used" in one.refusal.message for one in fallen)
        return [index for one in fallen for index in one.indices]


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return based_entry(tmp_path)


def test_a_verdict_waits_for_the_digest_of_its_base_and_is_kept_once(entry: Entry) -> None:
    with closing(Run(entry)) as run:
        run.reach()
        assert run.kept() == []
        run.hash()
        run.load()
        assert run.kept() == [7]
        assert run.kept() == []
        assert run.fallen() == []


CHANGES: dict[str, Callable[[Run], None]] = {
    "before it is loaded": lambda run: (run.hash(), run.touch(), run.load()),
    "after it was loaded": lambda run: (run.load(), run.hash(), run.touch()),
    "between two loads": lambda run: (run.load(), run.touch(), run.load(), run.hash()),
    "by its removal": lambda run: (run.load(), run.hash(), Path(base_directory(run.entry), "config.json").unlink()),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("when", CHANGES)
def test_a_base_that_changes_leaves_no_verdict_on_it(entry: Entry, when: str) -> None:
    with closing(Run(entry)) as run:
        CHANGES[when](run)
        run.reach()
        assert run.kept() == []
        assert run.fallen() == [7]


def test_what_was_not_kept_may_stand(entry: Entry) -> None:
    """The adapter was written to after its merge: its line says what was true of the bytes that it names."""
    with closing(Run(entry)) as run:
        run.hash()
        run.load()
        run.reach()
        Path(entry.members[0].directory, "adapter_model.safetensors").write_bytes(b"others")
        assert run.kept() == []
        assert run.fallen() == []


def test_what_was_taken_over_falls_with_its_base_too(entry: Entry) -> None:
    with closing(keeper(entry)) as earlier:
        assert keep(earlier, entry) is not None
    with closing(Run(entry)) as run:
        assert [index for index, _ in run.standing.take_over({7: entry})] == [7]
        assert run.fallen() == []
        run.touch()
        assert run.fallen() == [7]
