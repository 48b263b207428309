"""What a person sees of a run: progress on standard error while it works, and the result on standard output.

In: the events of a run, in order, and two text streams. Out: `RichView` for a terminal (rich_view.py), or `PlainView`,
which writes one line per event without escape codes. Names in events are hostile: hidden characters are replaced, and
no line can become a workflow command.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, TextIO

from merge_gate._internal.text import WIDEST_TABLE
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.terms import Verdict
from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import inert, one_line, safe_text
from merge_gate.run.streams import is_ascii, width_of, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.measured import BaseFacts
    from merge_gate.records.report import AdapterReport, Report

    Clock = Callable[[], float]

QUIET_S = 30.0
"""How long `PlainView` writes nothing during a merge."""
EVERY_S = 3600.0
"""How often a long run writes a line to its log."""


class View:
    """Receives the events of a run in their order. This class shows nothing.

    `close` restores the terminal. It may be called at any time and more than once (`contextlib.closing(view)`).
    """

    report_made: Callable[[Report], None] | None = None
    """Gets the provisional and the last report of a run without an output directory."""
    more_follows = False
    """Whether a result is not shown if it passed, because the result of another run follows."""

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        """`merge_count` is larger than `adapter_count` if adapters are merged in several dtypes."""

    def start_comparison(self, model: str) -> None:
        """A finished model will be compared."""

    def base_loading(self, model: str, dtype: str) -> None: ...
    def base_loaded(self, facts: BaseFacts, seconds: float, *, measured: bool = True) -> None: ...
    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        """`index` counts from 1."""

    def adapter_progress(self, done: int, total: int, module: str) -> None: ...
    def adapter_done(self, adapter: AdapterReport) -> None: ...
    def show_logs(self, adapter: AdapterReport) -> None:
        """Show the tracebacks for the report of a bug, if such details are wanted."""

    def note(self, message: str) -> None: ...
    def finish(self, report: Report, output_dir: str) -> None: ...
    def close(self) -> None: ...


class TextView(View):
    """Describes the events in words, and counts the adapters. A subclass shows the lines and the progress."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, colors_result: bool) -> None:
        self._stdout, self._stderr, self._colors_result = stdout, stderr, colors_result
        self.total = self._done = self._index = 0
        self._name = self._dtype = ""

    @abstractmethod
    def _say(self, line: str, style: str = "", *, is_note: bool = False) -> None:
        """Show a line, in a style of rich if there are colors."""

    @property
    def _label(self) -> str:
        return f"[{self._index}/{self.total}]"

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        self.total, self._done = merge_count, 0  # an export is a second run of one view
        merges = f", {words.counted(merge_count, 'merge')}" if merge_count != adapter_count else ""
        listed = f"on {COMMAND_LINE}" if config_path == COMMAND_LINE else f"in {one_line(config_path)}"
        self._say(f"merge-gate: {words.counted(adapter_count, 'adapter')} {listed}{merges}", "bold")

    def start_comparison(self, model: str) -> None:
        self.total = 1
        self._say(f"merge-gate: comparing the model {name_of(model)}", "bold")

    def base_loading(self, model: str, dtype: str) -> None:
        self._say(loading(model, dtype))

    def base_loaded(self, facts: BaseFacts, seconds: float, *, measured: bool = True) -> None:
        state = f"{words.counted(len(facts.nonfinite), 'tensor')} not finite" if facts.nonfinite else "all finite"
        state = state if measured else "to be measured as they are merged"
        parameters = f"{words.counted(facts.parameters, 'parameter')}, {state}"
        base = f"base {name_of(facts.model)} ({name_of(facts.dtype)})"
        self._say(f"{base}: {parameters}, {words.duration(seconds)}", "dim")

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        self._name, self._dtype = name_of(name), name_of(dtype)
        self._index, self.total = index, max(total, index)

    def adapter_done(self, adapter: AdapterReport) -> None:
        """Count it, and show it. One whose files were refused ends without a start."""
        self._done += 1
        self._index, self.total = self._done, max(self.total, self._done)
        if self._leaves_line(adapter):
            line = f"{self._label} {name_of(adapter.name)} ({words.precision(adapter.base)}): {_outcome(adapter)}"
            self._say(line, words.STYLES[adapter.verdict])

    def _leaves_line(self, adapter: AdapterReport) -> bool:  # noqa: ARG002 - a log has a line for each
        return True

    def note(self, message: str) -> None:
        for line in safe_text(message).split("\n"):
            self._say(line, "dim", is_note=True)

    def finish(self, report: Report, output_dir: str) -> None:
        from merge_gate.report.formats.terminal_text import render  # noqa: PLC0415 - only the table needs rich

        stream = self._stdout
        text = render(
            report,
            output_dir,
            width=width_of(stream),
            table_width=width_of(stream, WIDEST_TABLE),
            color=self._colors_result,
            ascii_only=is_ascii(stream),
        )
        write(stream, text)


class PlainView(TextView):
    """Lines without escape codes, except in a result that is colored: for logs, pipes, and simple terminals.

    If it is quiet, only notes and the result are written.
    """

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        quiet: bool = False,
        verbose: bool = False,
        color: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(stdout, stderr, colors_result=color)
        self._quiet, self._verbose, self._clock = quiet, verbose, clock
        self._pace = _Pace(clock)
        self._written_at = clock()

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        super().adapter_started(name, index, total, dtype)
        self._pace = _Pace(self._clock)
        if self._verbose:
            self._say(f"{self._label} {self._name} ({self._dtype}): merging")

    def adapter_progress(self, done: int, total: int, module: str) -> None:
        if self._clock() - self._written_at >= QUIET_S:
            left = self._pace.left(done, total, before=", ")
            count = f"{done:,} of {words.counted(total, 'module')}"
            self._say(f"{self._label} {self._name}: {count}{left}, at {name_of(module)}")

    def adapter_done(self, adapter: AdapterReport) -> None:
        super().adapter_done(adapter)
        self.show_logs(adapter)

    def show_logs(self, adapter: AdapterReport) -> None:
        for log in (finding.log for finding in adapter.findings if finding.log and self._verbose):
            self._say(f"{name_of(adapter.name)}: log, also in report.json:")
            for line in safe_text(log).splitlines():
                self._say(line)

    def _say(self, line: str, style: str = "", *, is_note: bool = False) -> None:  # noqa: ARG002 - it has no colors
        self._written_at = self._clock()
        if is_note or not self._quiet:
            write(self._stderr, inert(line) + "\n")


class _Pace:
    """Estimates how long the rest takes, from the part that is done since now. `done` of it was done before."""

    def __init__(self, clock: Clock, done: int = 0) -> None:
        self._clock, self._first, self._began_s = clock, done, clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def left(self, done: int, total: int, *, before: str) -> str:
        """`about 12 s left` after `before`; empty while it is too early for an estimate."""
        elapsed_s, done_since = self.elapsed_s, done - self._first
        if done_since <= 0 or total <= done or elapsed_s < 1:
            return ""
        return f"{before}about {words.duration(max(round(elapsed_s * (total - done) / done_since), 1))} left"


class HourlyLog:
    """A line each hour for the log of a long run: its progress, and an estimate of the time left."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._pace = _Pace(clock)
        self._next_s = clock() + EVERY_S

    def merging_begins(self, done: int) -> None:
        """Start the estimate here: the verdicts so far needed no merge."""
        self._pace = _Pace(self._clock, done)

    @property
    def is_due(self) -> bool:
        """Whether an hour has passed since the last line."""
        return self._clock() >= self._next_s

    def line(self, done: int, total: int, failed: int) -> str:
        """The line of this hour."""
        self._next_s = self._clock() + EVERY_S
        left = self._pace.left(done, total, before="; ")
        return (
            f"after {words.duration(round(self._pace.elapsed_s))}: {done:,} of {words.counted(total, 'adapter')} "
            f"judged, {failed:,} failed{left}"
        )


def loading(model: str, dtype: str) -> str:
    return f"loading base {name_of(model)} ({name_of(dtype)})"


def _outcome(adapter: AdapterReport) -> str:
    """`failed, adapter-nonfinite in model.layers.5.self_attn.q_proj, 0.84 s`."""
    verdict, why, module = words.verdict(adapter), words.reason(adapter), words.deciding_module(adapter)
    took = [*words.marks(adapter), "" if adapter.cached or adapter.accepted else words.duration(adapter.seconds)]
    if adapter.verdict is Verdict.PASSED:
        merged = adapter.coverage.modules_merged
        modules = words.counted(merged, "module") if merged or not words.answers(adapter) else ""
        parts = [verdict, modules, *took, why]
    else:
        cause = verdict if why == NOT_JUDGED else f"{verdict}, {why}"
        parts = [f"{cause} in {module}" if module else cause, *took]
    return ", ".join(filter(None, parts))


def name_of(name: str) -> str:
    return one_line(name, words.NAME_LENGTH)
