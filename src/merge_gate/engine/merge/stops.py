"""The stops of a pass over skeletons of one base: each fills the tensors that the same stored tensors make.

In: skeletons over one feed, and the names of their tensors that adapters change. Out: `Stop`s in the order of the
files. Merges nothing.

1. Cells of different skeletons that read the same stored tensor are one stop. Its bytes are read once, and shared.
2. Two classes of a base in one dtype have the same body. What no adapter changes is filled and measured in one of them.
3. Tensors that are in memory come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.tensors.hollow import Cell
from merge_gate.sources.feed import FileSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class StopPart:
    """Tensors of one base, which are filled together."""

    base: Base
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reused:
    """A tensor of one base that is another one's: it needs no visit of its own."""

    base: Base
    name: str
    known: Base
    known_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """What is visited together. `spans` has to be read for the `parts`; those of parts in memory are not among them."""

    spans: tuple[FileSpan, ...] = ()
    parts: tuple[StopPart, ...]
    reused: tuple[Reused, ...] = ()

    def shared(self) -> AbstractContextManager[None]:
        """Inside of the `with` block, several parts are filled from one read of the feed."""
        feed = self.parts[0].base.feed
        if len(self.parts) == 1 or feed is None or not self.spans:
            return nullcontext()
        return feed.shared(self.spans)

    def reuse_figures(self) -> None:
        """Enter the figures of the tensors that had no visit of their own."""
        for one in self.reused:
            one.base.stats[one.name] = replace(one.known.stats[one.known_name], name=one.name)


def stops_of(touched: Sequence[tuple[Base, set[str]]]) -> list[Stop]:
    """The stops for all tensors that adapters change, or that have no figures yet."""
    needed = [(base, names, {*base.unmeasured(), *names}) for base, names in touched]
    cells = [(base, cell) for base, _, wanted in needed if base.hollow for cell in base.hollow.cells(wanted)]
    ranks = {
        file: rank for rank, file in enumerate(dict.fromkeys(span.file for _, cell in cells for span in cell.spans))
    }
    together: dict[FileSpan, list[tuple[Base, Cell]]] = {}
    for base, cell in cells:  # 1.
        joined = [(base, cell)]
        for found in {id(one): one for span in cell.spans if (one := together.get(span)) is not None}.values():
            joined = [*found, *joined]
        together.update((span, joined) for _, one in joined for span in one.spans)

    def place(span: FileSpan) -> tuple[int, int]:
        return ranks[span.file], span.start

    changed = {id(base): names for base, names in touched}
    groups = {id(one): one for one in together.values()}.values()
    in_order = sorted(groups, key=lambda group: min(place(span) for _, cell in group for span in cell.spans))
    stops = [_stop(group, changed, sorted(_unread(group), key=place)) for group in in_order]
    return stops + [Stop(parts=(part,)) for part in _in_memory(needed, cells)]


def _unread(group: Sequence[tuple[Base, Cell]]) -> set[FileSpan]:
    return {span for base, cell in group if base.hollow and not base.hollow.is_filled(cell) for span in cell.spans}


def _stop(group: Sequence[tuple[Base, Cell]], changed: dict[int, set[str]], spans: Sequence[FileSpan]) -> Stop:
    parts: list[StopPart] = []
    reused: list[Reused] = []
    known: dict[object, tuple[Base, str]] = {}
    for base, cell in group:
        names = tuple(name for name in cell.outlines if name in base.tensors)  # the load may have tied one away
        key = _content(base, cell)
        if key in known and changed[id(base)].isdisjoint(names):  # 2.
            reused.append(Reused(base=base, name=names[0], known=known[key][0], known_name=known[key][1]))
            continue
        parts.append(StopPart(base=base, names=names))
        if key is not None:
            known.setdefault(key, (base, names[0]))
    return Stop(spans=tuple(spans), parts=tuple(parts), reused=tuple(reused))


def _content(base: Base, cell: Cell) -> object:
    """Equal for tensors with the same values. None if that is not known, or if the load has changed the tensor."""
    if len(cell.outlines) != 1 or len(cell.spans) != 1 or base.hollow is None or base.hollow.is_filled(cell):
        return None
    ((shape, dtype),) = cell.outlines.values()
    return cell.spans, tuple(shape), dtype


def _in_memory(
    needed: Sequence[tuple[Base, set[str], set[str]]], cells: Sequence[tuple[Base, Cell]]
) -> Iterator[StopPart]:
    for base, _, wanted in needed:  # 3.
        hollow = {name for owner, cell in cells if owner is base for name in cell.outlines}
        in_order = sorted((base.tensors[name].data_ptr(), name) for name in wanted - hollow)  # as in the files
        yield from (StopPart(base=base, names=(name,)) for _, name in in_order)
