"""What the verdicts of one run rest on: which are taken over, which are kept, and which no longer stand.

In: the run's entries and groups, the files that each base was loaded from, verdicts as they are reached. Out: lines of
earlier runs; lines of this one with the mark of being kept; at the end, the entries whose base is not what it was.
Knows neither worker nor report.

1. What an earlier run has judged of the same bytes is taken over.                              `take_over`
2. A verdict waits until the digest of its base is known, and is kept if that is of the files
   that were loaded.                                                                            `kept`
3. A verdict stands only if all of its base, and the digest of it, is of the same files.        `fallen`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.cache.keeper import base_directory
from merge_gate.cache.verdicts import Line
from merge_gate.records.measured import Refusal
from merge_gate.records.terms import Origin, record
from merge_gate.worker.pinned import base_changed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from merge_gate.cache.keeper import Keeper
    from merge_gate.records.files import Entry, FileIdentity
    from merge_gate.records.report import AdapterReport
    from merge_gate.worker.protocol import BaseLoaded, Group


@record
class Fallen:
    """Entries whose verdicts do not stand, since their base changed, and what is to be said instead."""

    indices: tuple[int, ...]
    refusal: Refusal


class Standing:
    """The verdicts of one run, by the index of their entry."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._digests = keeper, keeper.digests
        self._groups: Sequence[Group] = ()
        self._group_of: dict[int, int] = {}
        self._identities: dict[int, set[tuple[FileIdentity, ...]]] = {}
        self._taken_over: dict[str, dict[int, Line]] = {}
        self._waiting: dict[int, tuple[Entry, Line]] = {}

    def take_over(self, entries: Mapping[int, Entry]) -> Iterator[tuple[int, Line]]:
        """The entries that an earlier run has judged, each with its line."""
        for index, line in self._keeper.take_over(tuple(entries.items())):
            self._taken_over.setdefault(base_directory(entries[index]), {})[index] = line
            yield index, line

    def merging(self, groups: Sequence[Group]) -> None:
        """The rest is merged in these groups: begin to hash their bases."""
        self._groups = groups
        self._group_of = {task.index: at for at, group in enumerate(groups) for task in group.tasks}
        for group in groups:
            self._digests.start(group.directory)

    def loaded(self, event: BaseLoaded) -> None:
        """A base was read from files of this identity."""
        self._identities.setdefault(event.group, set()).add(event.identity)

    def reached(self, index: int, entry: Entry, line: Line) -> None:
        """This run has judged an entry by a merge."""
        self._waiting[index] = entry, line

    def kept(self) -> Iterator[tuple[int, AdapterReport]]:
        """What could be kept since the last call, with its mark: the digests of bases come late."""
        for index, (entry, line) in list(self._waiting.items()):
            directory = base_directory(entry)
            if self._digests.of(directory) is None:
                continue
            del self._waiting[index]
            if self._is_unchanged(self._group_of[index]) and (marked := self._keeper.keep(entry, line)):
                yield index, marked.adapter

    def fallen(self) -> Iterator[Fallen]:
        """The verdicts that do not stand, by base; to be asked once all digests are taken."""
        for at in self._identities:
            if not self._is_unchanged(at):
                group = self._groups[at]
                yield _fallen(group.base.name, (task.index for task in group.tasks))
        for directory, lines in self._taken_over.items():
            if not self._digests.holds(directory):
                first = next(iter(lines.values()))
                yield _fallen(first.adapter.base.model or "", lines)

    def _is_unchanged(self, group: int) -> bool:
        """Whether a group's base was loaded, each time, from the files that were hashed, and they are still there."""
        directory = self._groups[group].directory
        return all(self._digests.is_of(directory, identity) for identity in self._identities.get(group, ()))


def _fallen(label: str, indices: Iterable[int]) -> Fallen:
    error = base_changed(label)
    refusal = Refusal(check=None, message=error.message, hint=error.hint, origin=Origin.BASE)
    return Fallen(indices=tuple(indices), refusal=refusal)
