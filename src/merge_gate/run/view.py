"""What a person sees of a run: progress on standard error while it works, and the result on standard output.

In: the events of a run, in order, and two text streams. Out: `RichView` for a terminal (foot.py), or `PlainView`, which
writes one line per event without escape codes. Names in events are hostile: hidden characters are replaced, and no line
can become a workflow command.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.terms import Verdict, record
from merge_gate.report.formats import terminal_text
from merge_gate.report.formats.terminal_text import Style
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.untrusted import inert, one_line, safe_text
from merge_gate.run.streams import is_ascii, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from merge_gate.records.measured import BaseFacts
    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.report.formats.terminal_text import Line

    Clock = Callable[[], float]

PLAIN_WIDTH = 100
WIDEST = 110
"""Lines longer than this are hard to read, however wide the terminal is."""
QUIET_S = 30.0
"""How long `PlainView` writes nothing during a merge."""
_READING = "reading files, starting torch"
_DUMB = ("dumb", "unknown")
"""Values of TERM of terminals without colors."""


class View:
    """Receives the events of a run in their order. This class shows nothing.

    `close` restores the terminal. It may be called at any time and more than once (`contextlib.closing(view)`).
    """

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
    def note(self, message: str) -> None: ...
    def finish(self, report: Report, output_dir: str) -> None: ...
    def close(self) -> None: ...


SilentView = View
"""Shows nothing: for a run that no one watches."""


@record
class Appearance:
    """What the user asked to see: `--quiet`, `--verbose`, `--color`."""

    quiet: bool = False
    verbose: bool = False
    color: str = "auto"


_USUAL = Appearance()


def make_view(stdout: TextIO, stderr: TextIO, *, env: Mapping[str, str], appearance: Appearance = _USUAL) -> View:
    """Return the view that suits the streams, the environment (TERM, CI, GITHUB_ACTIONS), and the user."""
    in_ci = any(env.get(name, "").lower() not in {"", "0", "false"} for name in ("CI", "GITHUB_ACTIONS"))
    color = _uses_color(stdout, env, appearance.color)
    if in_ci or env.get("TERM") in _DUMB or appearance.quiet or appearance.verbose or not stderr.isatty():
        return PlainView(stdout, stderr, appearance=appearance, color=color)
    return RichView(stdout, stderr, color=_uses_color(stderr, env, appearance.color), colors_result=color)


def _uses_color(stream: TextIO, env: Mapping[str, str], asked: str) -> bool:
    """Whether text on a stream is colored: as asked, else by NO_COLOR and FORCE_COLOR, else on a terminal."""
    if asked != "auto":
        return asked == "always"
    if env.get("NO_COLOR"):
        return False
    return bool(env.get("FORCE_COLOR")) or (stream.isatty() and env.get("TERM") not in _DUMB)


class PlainView(View):
    """Lines without escape codes, except in a result that is colored: for logs, pipes, and simple terminals.

    If `appearance` is quiet, only notes and the result are written.
    """

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        appearance: Appearance = _USUAL,
        color: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._appearance = appearance
        self._color = color
        self._stdout = stdout
        self._stderr = stderr
        self._clock = clock
        self._state = _State()
        self._pace = _Pace(clock)
        self._written_at = clock()

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        self._state.total = merge_count
        self._write(_opening(config_path, adapter_count, merge_count))

    def start_comparison(self, model: str) -> None:
        self._state.total = 1
        self._write(_comparing(model))

    def base_loading(self, model: str, dtype: str) -> None:
        self._write(_loading(model, dtype))

    def base_loaded(self, facts: BaseFacts, seconds: float, *, measured: bool = True) -> None:
        self._write(_loaded(facts, seconds, measured=measured))

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        self._state.begin(name, index, total, dtype)
        self._pace.begin()
        if self._appearance.verbose:
            self._write(f"{self._state.label} {self._state.name} ({self._state.dtype}): merging")

    def adapter_progress(self, done: int, total: int, module: str) -> None:
        if self._clock() - self._written_at < QUIET_S:
            return
        estimate = self._pace.estimate(done, total)
        left = f", {estimate}" if estimate else ""
        self._write(
            f"{self._state.label} {self._state.name}: {done:,} of {words.counted(total, 'module')}{left}, "
            f"at {_name(module)}"
        )

    def adapter_done(self, adapter: AdapterReport) -> None:
        self._state.end()
        verdict, why = _done(adapter)
        self._write(f"{self._state.label} {_name(adapter.name)} ({words.precision(adapter.base)}): {verdict}{why}")

    def note(self, message: str) -> None:
        for line in safe_text(message).split("\n"):
            self._write(line, is_note=True)

    def finish(self, report: Report, output_dir: str) -> None:
        lines = terminal_text.lines(report, output_dir, width=PLAIN_WIDTH, ascii_only=is_ascii(self._stdout))
        if self._color:
            _print_colored(lines, self._stdout)
        else:
            write(self._stdout, terminal_text.joined(lines))

    def close(self) -> None:
        """There is nothing to restore."""

    def _write(self, line: str, *, is_note: bool = False) -> None:
        self._written_at = self._clock()
        if self._appearance.quiet and not is_note:
            return
        write(self._stderr, inert(line) + "\n")


class RichView(View):
    """A live view at the foot of the terminal, which the result replaces at the end."""

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        color: bool = True,
        colors_result: bool | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        from rich.console import Console  # noqa: PLC0415 - only this view pays for importing rich

        from merge_gate.run.foot import Foot, styled  # noqa: PLC0415

        self._stdout, self._stderr, self._styled = stdout, stderr, styled
        self._colors_result = color and stdout.isatty() if colors_result is None else colors_result
        self._out = Console(file=stdout)
        self._console = Console(file=stderr, no_color=not color, highlight=False, markup=False)
        self._foot = Foot(self._console, clock)
        self._state = _State()

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        self._state.total = merge_count
        self._print(((_opening(config_path, adapter_count, merge_count), Style.STRONG),))
        if merge_count != adapter_count:
            self._foot.count_merges()
        self._foot.wait_for(_READING)
        self._foot.start()

    def start_comparison(self, model: str) -> None:
        self._state.total = 1
        self._print(((_comparing(model), Style.STRONG),))
        self._foot.wait_for(_READING)
        self._foot.start()

    def base_loading(self, model: str, dtype: str) -> None:
        self._foot.wait_for(_loading(model, dtype))

    def base_loaded(self, facts: BaseFacts, seconds: float, *, measured: bool = True) -> None:
        self._print(((_loaded(facts, seconds, measured=measured), Style.FAINT),))

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        self._state.begin(name, index, total, dtype)
        self._foot.begin(self._state.name, f"{self._state.label} {self._state.dtype}", self._state.total)

    def adapter_progress(self, done: int, total: int, module: str) -> None:
        self._foot.step(done, total, _name(module))

    def adapter_done(self, adapter: AdapterReport) -> None:
        self._state.end()
        style, (verdict, why) = terminal_text.STYLES[adapter.verdict], _done(adapter)
        mark = (terminal_text.ASCII_MARKS if is_ascii(self._stderr) else terminal_text.MARKS)[adapter.verdict]
        line = (
            (f"{mark} ", style),
            (_name(adapter.name), Style.PLAIN),
            (f" ({words.precision(adapter.base)})  ", Style.FAINT),
            (verdict, style),
            (why, Style.FAINT),
        )
        self._foot.end(line, self._state.total)

    def note(self, message: str) -> None:
        for line in safe_text(message).split("\n"):
            self._print(((line, Style.FAINT),))

    def finish(self, report: Report, output_dir: str) -> None:
        self.close()
        on_terminal = self._stdout.isatty()
        width = min(self._out.width, WIDEST) if on_terminal else PLAIN_WIDTH
        lines = terminal_text.lines(report, output_dir, width=width, ascii_only=is_ascii(self._stdout))
        if self._colors_result:
            _print_colored(lines, self._stdout)
        else:
            write(self._stdout, terminal_text.joined(lines))
        if not on_terminal:
            self._print(((f"{run_result.verdict_line(report)}.", Style.STRONG),))

    def close(self) -> None:
        self._foot.stop()

    def _print(self, line: Line) -> None:
        self._console.print(self._styled(line, self._stderr), overflow="fold")


def _print_colored(lines: Iterable[Line], stream: TextIO) -> None:
    from rich.console import Console  # noqa: PLC0415 - a plain log does without rich

    from merge_gate.run.foot import styled  # noqa: PLC0415 - imports rich

    console = Console(
        file=stream, force_terminal=True, color_system="standard", no_color=False, highlight=False, markup=False
    )
    for line in lines:
        console.print(styled(line, stream), soft_wrap=True)


@dataclass(slots=True)
class _State:
    """The adapter in progress, and its number."""

    total: int = 0
    done: int = 0
    index: int = 0
    name: str = ""
    dtype: str = ""

    def begin(self, name: str, index: int, total: int, dtype: str) -> None:
        self.name, self.index, self.total, self.dtype = _name(name), index, max(total, index), _name(dtype)

    def end(self) -> None:
        """Count an adapter as done. One whose files were refused ends without a start."""
        self.done += 1
        self.index = self.done
        self.total = max(self.total, self.done)
        self.name = ""

    @property
    def label(self) -> str:
        return f"[{self.index}/{self.total}]"


class _Pace:
    """Estimates how long a merge takes from the part that is done."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock()

    def begin(self) -> None:
        self._began = self._clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def estimate(self, done: float, total: float) -> str:
        """`about 12 s left`, or empty while it is too early for an estimate."""
        elapsed = self.elapsed_s
        if done <= 0 or total <= done or elapsed < 1:
            return ""
        left = elapsed * (total - done) / done
        return f"about {words.duration(max(round(left), 1))} left"


def _opening(config_path: str, adapter_count: int, merge_count: int) -> str:
    merges = f", {words.counted(merge_count, 'merge')}" if merge_count != adapter_count else ""
    listed = f"on {COMMAND_LINE}" if config_path == COMMAND_LINE else f"in {one_line(config_path)}"
    return f"merge-gate: {words.counted(adapter_count, 'adapter')} {listed}{merges}"


def _comparing(model: str) -> str:
    return f"merge-gate: comparing the model {_name(model)}"


def _loading(model: str, dtype: str) -> str:
    return f"loading base {_name(model)} ({_name(dtype)})"


def _loaded(facts: BaseFacts, seconds: float, *, measured: bool) -> str:
    state = f"{words.counted(len(facts.nonfinite), 'tensor')} not finite" if facts.nonfinite else "all finite"
    state = state if measured else "to be measured as they are merged"
    parameters = f"{words.counted(facts.parameters, 'parameter')}, {state}"
    return f"base {_name(facts.model)} ({_name(facts.dtype)}): {parameters}, {words.duration(seconds)}"


def _done(adapter: AdapterReport) -> tuple[str, str]:
    """The verdict, and the text that follows it."""
    now = not adapter.cached and adapter.accepted is None
    notes = (*words.marks(adapter), words.duration(adapter.seconds) if now else "")
    took = "".join(f", {note}" for note in notes if note)
    why = terminal_text.reason(adapter)
    if adapter.verdict is Verdict.PASSED:
        merged = adapter.coverage.modules_merged
        modules = f", {words.counted(merged, 'module')}" if merged or not words.answers(adapter) else ""
        return words.verdict(adapter), modules + took + (f", {why}" if why else "")
    module = words.deciding_module(adapter)
    place = f" in {module}" if module else ""
    cause = "" if why == NOT_JUDGED else f", {why}"
    return words.verdict(adapter), f"{cause}{place}{took}"


def _name(name: str) -> str:
    return one_line(name, words.NAME_LIMIT)
