"""The live view of a terminal: rich's bars below the lines of what has happened. The bars go when the result comes.

In: the events of a run. Out: lines and bars. Imported only if it is used, because importing rich takes time.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.table import Column
from rich.text import Text

from merge_gate.records.terms import Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.run.streams import encodable, is_ascii
from merge_gate.run.view import TextView, loading

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from merge_gate.records.report import AdapterReport, Report

_READING = "reading files, starting torch"
_FIRST_ESTIMATE_S = 1.0


class RichView(TextView):
    """A live view at the foot of the terminal."""

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        color: bool = True,
        colors_result: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            stdout, stderr, colors_result=color and stdout.isatty() if colors_result is None else colors_result
        )
        self._console = Console(file=stderr, no_color=not color, highlight=False, markup=False, emoji=False)
        self._bars = _bars(self._console, clock)
        self._all = self._bars.add_task("all", visible=False, unit="adapter")
        self._current = self._bars.add_task(_READING, total=None)
        self._has_merged = False

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        super().start(config_path, adapter_count, merge_count)
        self._begin("adapter" if merge_count == adapter_count else "merge")

    def start_comparison(self, model: str) -> None:
        super().start_comparison(model)
        self._begin("adapter")

    def _begin(self, unit: str) -> None:
        self._has_merged = False
        self._bars.reset(self._all, visible=False, unit=unit)
        self._show(_READING)
        self._bars.start()

    def base_loading(self, model: str, dtype: str) -> None:
        self._show(loading(model, dtype))

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        super().adapter_started(name, index, total, dtype)
        self._show(f"{self._name} ({self._dtype})")
        if not self._has_merged:  # the estimate begins here: refused files and cached verdicts take no time
            self._has_merged = True
            self._bars.reset(self._all, completed=self._done)
        self._count()

    def adapter_progress(self, done: int, total: int, module: str) -> None:  # noqa: ARG002 - a log names it
        self._bars.update(self._current, completed=done, total=total)
        self._bars.update(self._all, completed=self._done + done / (total or 1))

    def adapter_done(self, adapter: AdapterReport) -> None:
        super().adapter_done(adapter)
        self._count()

    def _leaves_line(self, adapter: AdapterReport) -> bool:
        return adapter.verdict is not Verdict.PASSED  # the bar counts the others

    def finish(self, report: Report, output_dir: str) -> None:
        self.close()
        super().finish(report, output_dir)
        if not self._stdout.isatty():
            self._say(f"{run_result.verdict_line(report)}.", "bold")

    def close(self) -> None:
        self._bars.stop()

    def _say(self, line: str, style: str = "", *, is_note: bool = False) -> None:  # noqa: ARG002 - it shows all
        self._console.print(Text(encodable(line, self._stderr), style), overflow="fold")

    def _show(self, label: str) -> None:
        """Show what is in progress, with the time that it takes until its steps are known."""
        self._bars.remove_task(self._current)
        self._current = self._bars.add_task(encodable(label, self._stderr), total=None, unit="module")

    def _count(self) -> None:
        self._bars.update(self._all, completed=self._done, total=self.total, visible=self.total > 1)


def _bars(console: Console, clock: Callable[[], float]) -> Progress:
    good = words.STYLES[Verdict.PASSED]
    return Progress(
        SpinnerColumn("line" if is_ascii(console.file) else "dots", style=good),
        _Label(),
        BarColumn(bar_width=20, complete_style=good, finished_style=good),
        _Figures(Column(no_wrap=True, overflow="crop")),
        console=console,
        get_time=clock,
        speed_estimate_period=math.inf,
        refresh_per_second=8,
        transient=True,
    )


class _Label(ProgressColumn):
    """The current step, on one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Figures(ProgressColumn):
    """`12/48 modules, about 12 s left`, without the estimate while it is too early for one."""

    def render(self, task: Task) -> Text:
        elapsed_s = task.elapsed or 0.0
        if task.total is None:
            return Text(words.duration(int(elapsed_s)) if elapsed_s >= 1 else "")
        left_s = task.time_remaining if elapsed_s >= _FIRST_ESTIMATE_S else None
        left = f", about {words.duration(left_s)} left" if left_s else ""
        return Text(f"{int(task.completed):,}/{words.counted(int(task.total), task.fields['unit'])}{left}")
