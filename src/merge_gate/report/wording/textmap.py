"""Draws the map of an adapter's merged tensors in characters, for the job summary.

It shows the first stack of layers with a broken tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.report.wording.grid import Block, State, blocks, states
from merge_gate.report.wording.untrusted import inert, one_line
from merge_gate.text import counted

if TYPE_CHECKING:
    from merge_gate.records.report import AdapterReport

MARKS = {State.NAN: "N", State.INF: "I", State.NO_EFFECT: "-", State.FINITE: ".", State.UNTOUCHED: " "}
LEGEND = "N NaN, I ±Inf, - no effect, . finite, blank untouched"
_MAX_NAME = 40
_MAX_LAYERS = 128
_MAX_MODULES = 16
_TICK = 5


def text_map(adapter: AdapterReport) -> list[str]:
    """The lines of the map; empty if all tensors are finite. If there are many modules, broken ones come first."""
    marks = [MARKS[state] for state in states(adapter.tensors)]
    for block in blocks(adapter.tensors):
        if any(marks[index] in "NI" for index, _, _ in block.places):
            return [inert(line) for line in _drawn(block, marks)]
    return []


def _drawn(block: Block, marks: list[str]) -> list[str]:
    cells = [[" "] * len(block.layers) for _ in block.modules]
    for index, row, column in block.places:
        cells[row][column] = marks[index]
    rows = list(zip(block.modules, cells, strict=True))
    if len(rows) > _MAX_MODULES:
        rows.sort(key=lambda row: -sum(mark in "NI" for mark in row[1]))
    shown = [(one_line(name, _MAX_NAME), "".join(row[:_MAX_LAYERS])) for name, row in rows[:_MAX_MODULES]]
    width = max(len(name) for name, _ in shown)
    lines = [f"  {_head(block):<{width}}  {_ticks(block)}".rstrip()]
    lines += [f"  {name:<{width}}  {row}".rstrip() for name, row in shown]
    if len(rows) > _MAX_MODULES:
        lines.append(f"  … and {counted(len(rows) - _MAX_MODULES, 'more module')}")
    return lines


def _head(block: Block) -> str:
    return one_line(block.stack, _MAX_NAME)


def _ticks(block: Block) -> str:
    """The number of every fifth layer above its column."""
    return "".join(f"{layer:<{_TICK}}"[:_TICK] for layer in block.layers[:_MAX_LAYERS:_TICK])
