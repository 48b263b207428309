"""Bases that the worker cannot map: their bytes come from the Hub, from a mount, or in passes through the parent.

In: bases on the Hub that are not downloaded. Out: directories with stubs of their weight files, the bytes for the
worker, and whether all of them had the digests that the Hub lists.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from merge_gate._internal.private_directory import private_directory
from merge_gate.features.stream.feed_service import FeedService, slots
from merge_gate.features.stream.read_ahead import FedBase, LocalFiles
from merge_gate.files.base_watch import base_directory
from merge_gate.records.refusals import NotJudged
from merge_gate.run.feature import Feature
from merge_gate.worker.memory import MemoryGroup

if TYPE_CHECKING:
    from merge_gate.features.stream.read_ahead import BaseBytes
    from merge_gate.records.files import Fetched
    from merge_gate.records.measured import Evidence
    from merge_gate.run.flow import Run
    from merge_gate.worker.protocol import Group, Job


def join(run: Run) -> Feature:
    return StreamedBases(run)


class StreamedBases(Feature):
    """The bases of one run whose bytes pass through the parent."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._created = contextlib.ExitStack()
        self._parent: str | None = None
        self._streamed: dict[str, BaseBytes] = {}
        self._bases: dict[str, FedBase] = {}

    def lay_out(self, base: Fetched) -> str:
        """Make a directory with the small files of a base on the Hub, and with a stub of each weight file."""
        from merge_gate.features.stream.hub_file import lay_out  # noqa: PLC0415 - imports huggingface_hub

        if self._parent is None:
            self._parent = self._created.enter_context(private_directory())
        directory, files = lay_out(base, self._parent)
        self._streamed[directory] = files
        self._run.watch.listed(directory, files.identity, files.sha256)
        return directory

    def service(self, job: Job) -> FeedService | None:
        """What reads bases for one process; None if it reads all bases of its job itself."""
        if not any(group.fed for group in job.groups):
            return None
        return FeedService(lambda position: self.open(job.groups[position]), slots(MemoryGroup().free_bytes()))

    def open(self, group: Group) -> FedBase:
        """The files of a group's base. If all their bytes pass, their digests are known.

        Raises:
            SourceError: they cannot be read.
        """
        directory, passed = group.directory, self._run.watch.read_whole
        if directory not in self._bases:
            if directory not in self._streamed and group.files.is_streamed:
                raise AssertionError(f"{directory} holds stubs, and nothing has its bytes")
            files = self._streamed.get(directory)
            files = files or LocalFiles(directory, group.files.weights, keep=not group.one_pass)
            identity = files.identity
            made = FedBase(files, lambda known: passed(directory, identity, known))
            # Several threads open bases. No lock: files on a mount that hangs must not keep others from theirs.
            self._bases.setdefault(directory, made)
        return self._bases[directory]

    def refusal(self, index: int, evidence: Evidence) -> NotJudged | None:  # noqa: ARG002
        """Why no verdict on a streamed base counts: not all of its bytes were compared. None if they were."""
        entry = self._run.tally.entries[index]
        if not self._run.watch.is_only_listed(base_directory(entry)):
            return None
        return NotJudged(
            message="the weights of the streamed base were not read to their end, so their SHA-256 is not known",
            hint="run the gate again, or set access: download",
        )

    def close(self) -> None:
        """Remove the created files."""
        self._created.close()
