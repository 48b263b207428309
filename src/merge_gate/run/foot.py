"""The live progress at the foot of a terminal: rich's bars under the latest finished adapters.

In: text that was made harmless before, and figures. Out: a live view that fits the terminal's width and height. Only
`RichView` imports this module, because importing rich takes time.
"""

from __future__ import annotations

import math
from typing import IO, TYPE_CHECKING

from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from merge_gate.report.formats.terminal_text import Style
from merge_gate.report.wording import words
from merge_gate.report.wording.columns import cells, cut
from merge_gate.run.streams import encodable, is_ascii

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

    from merge_gate.report.formats.terminal_text import Line

_COLORS = {
    Style.PLAIN: "",
    Style.STRONG: "bold",
    Style.FAINT: "dim",
    Style.GOOD: "bold green",
    Style.BAD: "bold red",
    Style.DOUBT: "bold yellow",
}
_ROWS = 7
"""Lines of the terminal that are not for finished adapters: the current one, its bars, and what is above the foot."""
_WIDEST_BAR = 90
"""Columns of a bar with its figures. A bar across a wide terminal is hard to read."""
_LEAST_NAME, _LEAST_WHY = 12, 24
_FIRST_ESTIMATE_S = 1.0


class Foot(Progress):
    """Finished adapters, the current one, and a bar for it and for the run. `start` shows it, `stop` removes it."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        good = _COLORS[Style.GOOD]
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


def styled(line: Line, stream: IO[str]) -> Text:
    """A line in colors, in characters that the stream can encode."""
    text = Text()
    for part, style in line:
        text.append(encodable(part, stream), style=_COLORS[style])
    return text
