"""What a run would read, download, and write (`--plan`), as text.

In: a configuration, and the options of a run. Out: text about the run, which flow.py stops before it merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from merge_gate._internal.errors import ExitCode
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate._internal.text import WIDEST, counted, listing, shown_bytes
from merge_gate.files.headers import DTYPE_BITS
from merge_gate.records.features import part
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Result, Verdict
from merge_gate.report.wording import words
from merge_gate.report.wording.layout import labeled, laid_out
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.flow import planned_run
from merge_gate.run.view import View
from merge_gate.worker.batches import batches
from merge_gate.worker.memory import MemoryGroup, factor_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from merge_gate.records.config import Config
    from merge_gate.records.files import AdapterFiles, Fetched
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import AdapterReport
    from merge_gate.run.flow import Run
    from merge_gate.worker.protocol import Group

_NAME_CHARACTERS = 120
_MOST_NAMES = 8
_LABEL_WIDTH = len("  publish   ")


_WITHOUT_A_MERGE: Mapping[str, Callable[[AdapterReport], bool]] = {
    "a stored verdict is reused": lambda report: report.cached,
    "the files alone decide the verdict": lambda report: not report.cached and report.verdict is not Verdict.ERROR,
    "they cannot be judged": lambda report: not report.cached and report.verdict is Verdict.ERROR,
}

_START_S, _READ_S_A_GB, _LORA_S_A_GB, _OTHER_S_A_GB = 4.0, 1.0, 0.4, 2.0
"""Seconds on two CPU cores, rounded from docs/evidence/performance.md; the last two for a merge and a GB of base."""
_TORCH_BYTES, _LAYERS = 400_000_000, 2.5
"""Memory of torch and PEFT, and how many times the largest tensor of the base is in memory."""


class _Notes(View):
    """Shows only notes."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify

    def note(self, message: str) -> None:
        self._notify(message)


def plan_run(
    config: Config, options: RunOptions, notify: Callable[[str], None], *, width: int = WIDEST
) -> tuple[str, ExitCode]:
    """The plan of a run, as lines of text of at most `width` columns, and what is known of the run's exit code.

    Raises:
        UsageError: what `run_gate` refuses.
    """
    run = planned_run(config, options, _Notes(notify))
    report = run.tally.report()
    code = ExitCode.FAIL if report.result is Result.FAIL else ExitCode.PASS
    if code is ExitCode.PASS and any(adapter.verdict is Verdict.ERROR for adapter in report.adapters):
        code = ExitCode.ERROR
    return laid_out(_parts(run, config), width), code


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
    if bases:
        seconds = _START_S + sum(base.seconds for base in bases)
        peak = shown_bytes(max(base.peak_bytes for base in bases))
        yield _row(
            "estimate",
            f"{_rounded(seconds)}, and {peak} of memory: from runs on two CPU cores with files in memory; downloads, "
            "slow disks, and `forward` come on top",
        )
    yield from _lines_of_output(run)
    decided = run.tally.report().adapters
    for reason, fits in _WITHOUT_A_MERGE.items():
        reports = [report for report in decided if fits(report)]
        if reports:
            yield Text()
            yield Text(f"{counted(len(reports), 'entry', 'entries')} without a merge, because {reason}:")
        for report in reports:
            cause = f", {report.cause}" if report.cause else ""
            line = f"{_shown(report.name)} ({_shown(report.base.dtype)}): {words.title(report)}{cause}"
            yield labeled([("  ", line)])
            if report.verdict is not Verdict.PASSED and report.decided_by is not None:
                finding = report.findings[report.decided_by]
                lines = (("wrong", finding.message), ("to do", finding.hint))
                yield from (labeled([(f"    {label}", one_line(text))], _LABEL_WIDTH) for label, text in lines if text)


class _Base:
    """One base of a plan, with the adapters on it in all dtypes."""

    def __init__(self, run: Run, groups: Sequence[Group]) -> None:
        self._groups, self._base, self._is_fed = groups, groups[0].base, groups[0].fed
        self._tasks = [task for group in groups for task in group.tasks]
        self._names = dict.fromkeys(_shown(run.tally.entries[task.index].spec.name) for task in self._tasks)
        self._files = groups[0].files
        self._free_bytes = MemoryGroup().free_bytes()
        tasks = [(task, None) for task in self._tasks]
        passes = batches(tasks) if self._is_fed else [None]
        self.passes = sum(1 for _ in passes)
        self.read_bytes = self._files.weight_bytes * self.passes

    @property
    def seconds(self) -> float:
        """About how long reading and merging take, after the start."""
        is_plain = not self._base.is_quantized and self._files.quantization is None
        of_merges = sum(
            _LORA_S_A_GB if is_plain and {file.config.peft_type for file in task.files} == {"LORA"} else _OTHER_S_A_GB
            for task in self._tasks
        )
        return (_READ_S_A_GB * self.read_bytes + of_merges * self._files.weight_bytes) / 1e9

    @property
    def peak_bytes(self) -> int:
        """About the most memory, without the base's mapped files."""
        bits = (math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] for tensor in self._files.tensors)
        largest = max(bits, default=0) // 8
        return _TORCH_BYTES + int(_LAYERS * largest) + sum(self._needed())

    def lines(self) -> Iterator[RenderableType]:
        base, fetch = self._base, self._files.on_hub
        revision = f" at {base.revision[:12]}" if base.revision else ""
        quantization = [base.quantization] if base.is_quantized else []
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
        if not self._is_fed:
            return "whole, mapped from its files"
        is_large = self._free_bytes is not None and self._files.weight_bytes > self._free_bytes
        why = "it is larger than the free memory" if is_large else "it is on a network mount"
        why = "it is streamed" if self._files.is_streamed else why
        return f"whole, in {counted(self.passes, 'pass', 'passes')} over its files, because {why}"

    def _needed(self) -> tuple[int, int]:
        """The bytes of memory for the window of the base and for the adapters."""
        # What an adapter takes once it is loaded. If it was not fetched, only the sizes of its files are known.
        sizes = [factor_bytes(task, in_pass=self._is_fed) + sum(map(_left_on_hub, task.files)) for task in self._tasks]
        return (part("stream", "feed_service").window_bytes(), sum(sizes)) if self._is_fed else (0, max(sizes))

    def _memory(self) -> str:
        window_bytes, factors = self._needed()
        for_what = "the adapters of a pass" if self._is_fed else "an adapter"
        of_base = f"{shown_bytes(window_bytes)} for the base's bytes and " if self._is_fed else ""
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


def _rounded(seconds: float) -> str:
    return f"about {seconds:,.0f} s" if seconds < 2 * 60 else f"about {seconds / 60:,.0f} minutes"


def _shown(text: str) -> str:
    return one_line(text, _NAME_CHARACTERS)
