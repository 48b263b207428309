"""What a run would read, download, and write (`--plan`), as text.

In: a configuration, and the options of a run. Out: text about the run, which flow.py stops before it merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate._internal.text import WIDEST, counted, listing, shown_bytes
from merge_gate.records.features import part
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Quantization, Read
from merge_gate.report.wording import words
from merge_gate.report.wording.layout import labeled, laid_out
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.flow import planned_run
from merge_gate.run.view import View
from merge_gate.worker.memory import MemoryGroup, factor_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from merge_gate.records.config import Config
    from merge_gate.records.files import AdapterFiles, Fetched
    from merge_gate.records.options import RunOptions
    from merge_gate.run.flow import Run
    from merge_gate.worker.protocol import Group

_NAME_CHARACTERS = 120
_MOST_NAMES = 8
_LABEL_WIDTH = len("  publish   ")
_WHOLE_OR_TOUCHED = "whole, or what adapters touch if --cache has its record"


class _Notes(View):
    """Shows only notes."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify

    def note(self, message: str) -> None:
        self._notify(message)


def plan_run(config: Config, options: RunOptions, notify: Callable[[str], None], *, width: int = WIDEST) -> str:
    """The plan of a run, as lines of text of at most `width` columns.

    Raises:
        UsageError: what `run_gate` refuses.
    """
    return laid_out(_parts(planned_run(config, options, _Notes(notify)), config), width)


def _parts(run: Run, config: Config) -> Iterator[RenderableType]:
    in_same_passes = words.by(run.groups, lambda group: (group.directory, group.base.quantization))
    bases = [_Base(run, groups) for groups in in_same_passes.values()]  # of all dtypes
    adapters = counted(len({entry.spec.name for entry in run.tally.entries}), "adapter")
    merges = counted(sum(len(group.tasks) for group in run.groups), "merge")
    yield Text(f"plan for {_shown(config.label)}: {adapters}, {merges}, on {counted(len(bases), 'base')}")
    for base in bases:
        yield Text()
        yield from base.lines()
    yield Text("\nin all")
    yield from _lines_of_bytes(run, bases)
    yield from _lines_of_output(run)
    decided = run.tally.report().adapters
    for is_cached, reason in ((True, "a stored verdict is reused"), (False, "the files alone decide the verdict")):
        reports = [report for report in decided if report.cached is is_cached]
        if reports:
            yield Text()
            yield Text(f"{counted(len(reports), 'entry', 'entries')} without a merge, because {reason}:")
        for report in reports:
            cause = f", {report.cause}" if report.cause else ""
            line = f"{_shown(report.name)} ({_shown(report.base.dtype)}): {words.title(report)}{cause}"
            yield labeled([("  ", line)])


class _Base:
    """One base of a plan, with the adapters on it in all dtypes."""

    def __init__(self, run: Run, groups: Sequence[Group]) -> None:
        self._groups, self._base, self._is_fed = groups, groups[0].base, groups[0].fed
        self._reads = {run.read_of(group) for group in groups}
        self._tasks = [task for group in groups for task in group.tasks]
        self._names = dict.fromkeys(_shown(run.tally.entries[task.index].spec.name) for task in self._tasks)
        self._files = groups[0].files
        self._free_bytes = MemoryGroup().free_bytes()
        tasks = [(task, None) for task in self._tasks]
        passes = part("stream", "batches").batches(tasks) if self._is_fed else [None]
        self.passes = sum(1 for _ in passes)
        self.read_bytes = self._files.weight_bytes * self.passes

    def lines(self) -> Iterator[RenderableType]:
        base, fetch = self._base, self._files.on_hub
        revision = f" at {base.revision[:12]}" if base.revision else ""
        quantization = [] if base.quantization is Quantization.NONE else [base.quantization]
        how = ", ".join([*(group.base.dtype for group in self._groups), *quantization])
        yield Text(f"base {_shown(base.name)}{revision} ({_shown(how)})")
        size, count = shown_bytes(self._files.weight_bytes), counted(len(self._files.weights), "file")
        place = "on this machine"
        if fetch is not None:
            cached = ", a part of them in the cache" if len(fetch.sizes) > len(fetch.absent) else ""
            place = f"on the Hub{cached}"
        yield _row("weights", f"{size} in {count}, {place}")
        if fetch is not None:
            yield _row("access", _access_of(fetch))
        yield _row("read", self._how_read())
        yield _row("memory", self._memory())
        yield _row("adapters", listing(self._names, _MOST_NAMES))

    def _how_read(self) -> str:
        touched = all(group.earlier_figures for group in self._groups) and (self._is_fed or Read.TOUCHED in self._reads)
        what = "what adapters touch: --cache has its record" if touched else "whole"
        if self._files.on_hub is not None and Read.WHOLE not in self._reads:
            what = "what adapters touch" if Read.TOUCHED in self._reads else _WHOLE_OR_TOUCHED
        if not self._is_fed:
            return f"{what}, mapped from its files"
        is_large = self._free_bytes is not None and self._files.weight_bytes > self._free_bytes
        why = "it is larger than the free memory" if is_large else "it is on a network mount"
        why = "it is streamed" if self._files.is_streamed else why
        return f"{what}, in {counted(self.passes, 'pass', 'passes')} over its files, because {why}"

    def _memory(self) -> str:
        # What an adapter takes once it is loaded. If it was not fetched, only the sizes of its files are known.
        sizes = [factor_bytes(task, in_pass=self._is_fed) + sum(map(_left_on_hub, task.files)) for task in self._tasks]
        factors, for_what = max(sizes), "an adapter"
        of_base = ""
        if self._is_fed:
            factors, for_what = sum(sizes), "the adapters of a pass"
            window_bytes = part("stream", "feed_service").window_bytes()
            of_base = f"{shown_bytes(window_bytes)} for the base's bytes and "
        free = f"; {shown_bytes(self._free_bytes)} are free" if self._free_bytes is not None else ""
        return f"{of_base}{shown_bytes(factors)} for {for_what}, plus torch and the largest layer{free}"


def _left_on_hub(adapter: AdapterFiles) -> int:
    return sum(adapter.on_hub.sizes.values()) if adapter.on_hub is not None else 0


def _lines_of_bytes(run: Run, bases: Sequence[_Base]) -> Iterator[Table]:
    members = {files.directory: files for group in run.groups for task in group.tasks for files in task.files}
    of_adapters = sum(_left_on_hub(files) + sum(file.size_bytes for file in files.files) for files in members.values())
    word = "at most " if any(base.passes > 1 for base in bases) else ""  # a later pass reads only what it merges
    of_bases = shown_bytes(sum(base.read_bytes for base in bases))
    yield _row("read", f"{word}{of_bases} of bases, {shown_bytes(of_adapters)} of adapters")
    entries = run.tally.entries
    kinds: dict[str, Mapping[str, AdapterFiles | BaseFiles]] = {
        "base": {entry.base_files.directory: entry.base_files for entry in entries if entry.base_files is not None},
        "adapter": {member.directory: member for entry in entries for member in entry.members},
    }
    sizes = {kind: [_download_bytes(files.on_hub) for files in of_kind.values()] for kind, of_kind in kinds.items()}
    of = [counted(count, kind) for kind, of_kind in sizes.items() if (count := sum(size > 0 for size in of_kind))]
    if of:
        size = shown_bytes(sum(map(sum, sizes.values())))
        yield _row("download", f"{size} to the disk, for {' and '.join(of)} on the Hub")


def _download_bytes(fetch: Fetched | None) -> int:
    """The bytes that are written to the Hub's cache. Streamed weights write nothing."""
    return 0 if fetch is None else sum(fetch.sizes[name] for name in fetch.absent if name not in fetch.streamable)


def _lines_of_output(run: Run) -> Iterator[Table]:
    if run.options.output is not None:
        names = listing((file.name for file in OUTPUT_FILES), len(OUTPUT_FILES))
        yield _row("write", f"{_shown(run.options.output)}: {names}")
    for label, text in sorted(row for feature in run.features.values() for row in feature.plan()):
        yield _row(label, text)


def _access_of(fetch: Fetched) -> str:
    if fetch.streamable:
        size = sum(fetch.sizes[name] for name in fetch.streamable)
        return f"stream: {shown_bytes(size)} by ranges, not written to disk"
    size = sum(fetch.sizes[name] for name in fetch.absent)
    free = fetch.free_bytes
    warning = ", which is not enough" if free is not None and free < size else ""
    rest = f"; the disk has {shown_bytes(free)} free{warning}" if free is not None else ""
    return f"download: {shown_bytes(size)} to the Hub's cache{rest}"


def _row(label: str, text: str) -> Table:
    return labeled([(f"  {label}", text)], _LABEL_WIDTH)


def _shown(text: str) -> str:
    return one_line(text, _NAME_CHARACTERS)
