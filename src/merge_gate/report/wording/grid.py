"""Merged tensors as a map: layers across, target modules down.

In: the tensors of one adapter. Out: `Block`s, one per stack of layers, and the state of each tensor. Knows no format.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate.records.measured import TensorMerge
from merge_gate.records.terms import record

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")
_OUTSIDE = ""


class State(StrEnum):
    """What became of a merged tensor, the worst first."""

    NAN = "NaN"
    INF = "±Inf"
    NO_EFFECT = "no effect"
    FINITE = "finite"
    UNTOUCHED = "untouched"


@record
class Block:
    """A stack of layers, such as `model.layers`, as a rectangle.

    `layers` are the numbers across, `modules` the names down; `places` has, for each tensor of the block, its index
    among the adapter's tensors, its row and its column. Where no tensor stands, the merge touched nothing.
    """

    stack: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    places: tuple[tuple[int, int, int], ...]


def states(merges: Iterable[TensorMerge]) -> list[State]:
    """The worst that is so of each tensor.

    One that kept its bits beside another of its module that did not (a bias beside its weight) was not meant to change.
    """
    known = tuple(merges)
    with_effect = {merge.module for merge in known if merge.changed}
    return [_state(merge, with_effect) for merge in known]


def _state(merge: TensorMerge, with_effect: set[str]) -> State:
    if merge.stats.nan:
        return State.NAN
    if merge.stats.posinf or merge.stats.neginf:
        return State.INF
    if merge.changed:
        return State.FINITE
    return State.UNTOUCHED if merge.module in with_effect else State.NO_EFFECT


def count_states(merges: Iterable[TensorMerge]) -> list[tuple[State, int]]:
    """How many tensors are in each state, the worst first; states of none are left out."""
    found = states(merges)
    return [(one, found.count(one)) for one in State if one in found]


def blocks(merges: tuple[TensorMerge, ...]) -> tuple[Block, ...]:
    """All tensors, each in the block of its stack of layers; those outside of any stand in one without layers."""
    by_stack: dict[str, list[tuple[int, str, str]]] = {}
    for index, merge in enumerate(merges):
        stack, layer, module = _split(merge)
        by_stack.setdefault(stack, []).append((index, layer, module))
    return tuple(_block(stack, found) for stack, found in by_stack.items())


def _block(stack: str, found: list[tuple[int, str, str]]) -> Block:
    layers = sorted({layer for _, layer, _ in found}, key=lambda layer: (int(layer or 0), layer))
    modules = list(dict.fromkeys(module for _, _, module in found))
    row, column = ({name: at for at, name in enumerate(names)} for names in (modules, layers))
    return Block(
        stack=stack,
        layers=tuple(layers),
        modules=tuple(modules),
        places=tuple((index, row[module], column[layer]) for index, layer, module in found),
    )


def _split(merge: TensorMerge) -> tuple[str, str, str]:
    """model.layers.5.mlp.up_proj → model.layers, 5, mlp.up_proj; a bias or the like has its own name at the end."""
    own = merge.stats.name.removeprefix(merge.module).removeprefix(".")
    suffix = f".{own}" if own and own != "weight" else ""
    match = _LAYER.search(merge.module)
    if match is None:
        return _OUTSIDE, "", merge.module + suffix
    inside = merge.module[match.end() :].removeprefix(".")
    return merge.module[: match.start()].removesuffix("."), match[0], (inside + suffix).removeprefix(".") or "weight"
