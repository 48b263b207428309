"""The live view of a terminal: rich's bars at its foot, under the latest finished adapters. The result replaces them.

In: the events of a run. Out: a foot that fits the terminal's width and height. Imported only if it is used, because
importing rich takes time.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from merge_gate.report.formats import terminal_text
from merge_gate.report.formats.terminal_text import Style
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.columns import cells, cut
from merge_gate.run.streams import is_ascii
from merge_gate.run.view import COLORS, PLAIN_WIDTH, WIDEST, TextView, loading, name_of, outcome, styled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from rich.console import RenderableType

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.report.formats.terminal_text import Line

_READING = "reading files, starting torch"
_ROWS = 7
"""Lines of the terminal that are not for finished adapters: the current one, its bars, and what is above the foot."""
_WIDEST_BAR = 90
"""Columns of a bar with its figures. A bar across a wide terminal is hard to read."""
_LEAST_NAME, _LEAST_WHY = 12, 24
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
        self._console = Console(file=stderr, no_color=not color, highlight=False, markup=False)
        self._clock = clock
        self._foot = _Foot(self._console, clock)

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:
        super().start(config_path, adapter_count, merge_count)
        self._foot = _Foot(self._console, self._clock)
        if merge_count != adapter_count:
            self._foot.count_merges()
        self._foot.wait_for(_READING)
        self._foot.start()

    def start_comparison(self, model: str) -> None:
        super().start_comparison(model)
        self._foot.wait_for(_READING)
        self._foot.start()

    def base_loading(self, model: str, dtype: str) -> None:
        self._foot.wait_for(loading(model, dtype))

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        super().adapter_started(name, index, total, dtype)
        self._foot.begin(self._name, f"{self._label} {self._dtype}", self.total)

    def adapter_progress(self, done: int, total: int, module: str) -> None:
        self._foot.step(done, total, name_of(module))

    def adapter_done(self, adapter: AdapterReport) -> None:
        super().adapter_done(adapter)
        style, (verdict, why) = terminal_text.STYLES[adapter.verdict], outcome(adapter)
        mark = (terminal_text.ASCII_MARKS if is_ascii(self._stderr) else terminal_text.MARKS)[adapter.verdict]
        line = (
            (f"{mark} ", style),
            (name_of(adapter.name), Style.PLAIN),
            (f" ({words.precision(adapter.base)})  ", Style.FAINT),
            (verdict, style),
            (why, Style.FAINT),
        )
        self._foot.end(line, self.total)

    def finish(self, report: Report, output_dir: str) -> None:
        self.close()
        on_terminal = self._stdout.isatty()
        width = min(Console(file=self._stdout).width, WIDEST) if on_terminal else PLAIN_WIDTH
        self._write_result(report, output_dir, width)
        if not on_terminal:
            self._say(f"{run_result.verdict_line(report)}.", Style.STRONG)

    def close(self) -> None:
        self._foot.stop()

    def _say(self, line: str, style: Style = Style.PLAIN, *, is_note: bool = False) -> None:  # noqa: ARG002 - it shows all
        self._console.print(styled(((line, style),), self._stderr), overflow="fold")


class _Foot(Progress):
    """Finished adapters, the current one, and a bar for it and for the run. `start` shows it, `stop` removes it."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        good = COLORS[Style.GOOD]
        self._spinner = Spinner("line" if is_ascii(console.file) else "dots", style=good)
        self._shown_on = console
        self._done: list[Line] = []
        self._label = self._aside = self._place = ""
        self._began_s: float | None = None
        self._is_under_way = False
        super().__init__(  # it renders a first frame at once
            BarColumn(bar_width=None, complete_style=good, finished_style=good, table_column=Column(ratio=1)),
            _Figures(),
            console=console,
            get_time=clock,
            speed_estimate_period=math.inf,
            refresh_per_second=8,
            transient=True,
        )
        self._part = self.add_task("module", visible=False, total=None)
        self._whole = self.add_task("adapter", visible=False, total=None)

    def count_merges(self) -> None:
        """Count merges, because an adapter is merged in several dtypes."""
        self.update(self._whole, description="merge")

    def wait_for(self, what: str) -> None:
        """Show a step of unknown length, with the time that it has taken."""
        self._label, self._aside, self._place, self._began_s = what, "", "", self.get_time()

    def begin(self, label: str, aside: str, total: int) -> None:
        """Show an adapter that starts. The first one starts the clock of the run: cached verdicts take no time."""
        self._label, self._aside, self._place, self._began_s = label, aside, "", None
        self.reset(self._part, visible=False)
        self._count(total)
        if not self._is_under_way:
            self._is_under_way = True
            self.reset(self._whole, completed=len(self._done))

    def step(self, done: int, total: int, place: str) -> None:
        """Show how many steps of the current adapter are done."""
        self._place = place
        self.update(self._part, completed=done, total=total, visible=True)
        self.update(self._whole, completed=len(self._done) + done / total)

    def end(self, line: Line, total: int) -> None:
        """Show an adapter as finished. One that never started ends too, and then the foot still waits."""
        self._done.append(line)
        if self._began_s is None:
            self._label = ""
        self._count(total)

    def _count(self, total: int) -> None:
        self.update(self._whole, completed=len(self._done), total=total, visible=total > 1)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The current lines. rich calls this at each refresh, so after each change of the terminal's size too."""
        width, room = self._shown_on.width - 1, max(self._shown_on.height - _ROWS, 1)
        for line in self._done[-room:]:
            yield self._fitted(_name_cut(line, width), width)
        if not self._label:
            return
        aside = self._aside
        if self._began_s is not None and (waited_s := self.get_time() - self._began_s) >= 1:
            aside = words.duration(int(waited_s))
        label = cut(self._label, max(width - 4 - len(aside), 8))
        style = Style.PLAIN if self._began_s is not None else Style.STRONG
        self._spinner.update(text=self._fitted(((label, style), (f"  {aside}", Style.FAINT)), width - 2))
        yield self._spinner
        if self._place:
            yield self._fitted(((f"  {cut(self._place, width - 2)}", Style.FAINT),), width)
        bars = self.make_tasks_table(self.tasks)
        bars.width = min(width - 2, _WIDEST_BAR)
        yield Padding(bars, (0, 0, 0, 2), expand=False)

    def _fitted(self, line: Line, width: int) -> Text:
        text = styled(line, self._shown_on.file)
        text.truncate(max(width, 1), overflow="crop" if is_ascii(self._shown_on.file) else "ellipsis")
        return text


class _Figures(ProgressColumn):
    """`12/48 modules, about 12 s left`, without the estimate while it is too early for one."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="crop"))

    def render(self, task: Task) -> Text:
        left_s = task.time_remaining if (task.elapsed or 0) >= _FIRST_ESTIMATE_S else None
        left = f", about {words.duration(left_s)} left" if left_s else ""
        return Text(f"{int(task.completed):,}/{words.counted(int(task.total or 0), task.description)}{left}")


def _name_cut(line: Line, width: int) -> Line:
    """A line of a finished adapter. Its name, the second part, is cut so that the parts after it fit."""
    mark, (name, style), *rest, (why, faint) = line
    others = sum(cells(part) for part, _ in (mark, *rest)) + min(cells(why), _LEAST_WHY)
    return (mark, (cut(name, max(width - others, _LEAST_NAME)), style), *rest, (why, faint))
