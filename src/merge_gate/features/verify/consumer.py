"""Reads a finished model in the worker, and compares it with the merge of a task (finished_model.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from merge_gate.engine.consumer import Consumer
from merge_gate.features.verify.comparison import SettingsFiles
from merge_gate.features.verify.finished_model import Files, comparing
from merge_gate.files.feed import Feed, LocalFeed
from merge_gate.files.identity import base_identity
from merge_gate.records.files import Snapshot
from merge_gate.worker.parent_feed import ParentFeed
from merge_gate.worker.pinned import pinned_directory, verify_base
from merge_gate.worker.protocol import Task

if TYPE_CHECKING:
    from merge_gate.worker.merging.group_bases import GroupBase, GroupBases


def consumer(
    asked: tuple[Snapshot, SettingsFiles | None],
    _task: Task,
    loaded: GroupBase,
    bases: GroupBases,
    pinned: contextlib.ExitStack,
) -> Consumer:
    """The comparison with a finished model. With settings, its files next to the weights are compared, too."""
    (finished, settings), group = asked, loaded.group
    assert finished.base_files is not None  # noqa: S101 - it was resolved as a base
    directory = pinned.enter_context(pinned_directory(finished.directory))
    local = pinned.enter_context(LocalFeed(directory, keep=False))
    pinned.enter_context(_unchanged(directory, finished.name))
    feed = _feed_of(finished, bases) or local
    return comparing(
        Files(
            directory=directory,
            stored=finished.base_files.tensors,
            feed=feed,
            is_streamed=feed is not local,
            settings=settings,
        ),
        Files(directory=group.directory, stored=group.files.tensors, feed=bases.feed),
        base=loaded.base,
        model_class=loaded.model_class,
        label=finished.name,
        base_map=bases.account(loaded).map,
    )


@contextlib.contextmanager
def _unchanged(directory: str, label: str) -> Iterator[None]:
    """A `with` block in which the finished model's files must not change."""
    identity = base_identity(directory)
    yield
    verify_base(directory, label, identity)


def _feed_of(finished: Snapshot, bases: GroupBases) -> Feed | None:
    """The feed of a finished model that is streamed: the parent has it as a group without tasks."""
    if bases.client is None or finished.base_files is None or not finished.base_files.is_streamed:
        return None
    for position, group in enumerate(bases.job.groups):
        if group.directory == finished.directory and not group.tasks:
            feed: Feed = ParentFeed(bases.client, position, is_aside=True)
            return feed
    return None
