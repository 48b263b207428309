"""Arranges the merged tensors of an adapter as a map: layers across, target modules down.

The result is a `Block` for each stack of layers, and the state of each tensor.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate.records.measured import TensorMerge
from merge_gate.records.terms import record

if TYPE_CHECKING:
    from collections.abc import Iterable

LAYER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")
"""The number of a layer inside a name."""
_OUTSIDE = ""


class State(StrEnum):
    """The state of a merged tensor, the worst first."""

    NAN = "NaN"
    INF = "±Inf"
    NO_EFFECT = "no effect"
    FINITE = "finite"
    UNTOUCHED = "untouched"


@record
class Block:
    """A stack of layers, such as `model.layers`, as a rectangle.

    `layers` are the numbers across, `modules` the names down. `places` has the index, row, and column of each tensor.
    At a place without a tensor, the merge changed nothing.
    """

    stack: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    places: tuple[tuple[int, int, int], ...]


def states(merges: Iterable[TensorMerge]) -> list[State]:
    """The worst state of each tensor.

    A tensor that did not change is `untouched` if another tensor of its module did (a bias next to its weight).
    """
    tensors = tuple(merges)
    with_effect = {merge.module for merge in tensors if merge.changed}
    return [_state(merge, with_effect) for merge in tensors]


def _state(merge: TensorMerge, with_effect: set[str]) -> State:
    if merge.stats.nan:
        return State.NAN
    if merge.stats.posinf or merge.stats.neginf:
        return State.INF
    if merge.changed:
        return State.FINITE
    return State.UNTOUCHED if merge.module in with_effect else State.NO_EFFECT


def count_states(merges: Iterable[TensorMerge]) -> list[tuple[State, int]]:
    """How many tensors are in each state, the worst first. States without tensors are left out."""
    every = states(merges)
    return [(state, every.count(state)) for state in State if state in every]


def blocks(merges: tuple[TensorMerge, ...]) -> tuple[Block, ...]:
    """The blocks of all tensors. Tensors outside of any stack are in a block without layers."""
    by_stack: dict[str, list[tuple[int, str, str]]] = {}
    for index, merge in enumerate(merges):
        stack, layer, module = _split(merge)
        by_stack.setdefault(stack, []).append((index, layer, module))
    return tuple(_block(stack, tensors) for stack, tensors in by_stack.items())


def _block(stack: str, tensors: list[tuple[int, str, str]]) -> Block:
    layers = sorted({layer for _, layer, _ in tensors}, key=lambda layer: (int(layer or 0), layer))
    modules = list(dict.fromkeys(module for _, _, module in tensors))
    row, column = ({name: at for at, name in enumerate(names)} for names in (modules, layers))
    return Block(
        stack=stack,
        layers=tuple(layers),
        modules=tuple(modules),
        places=tuple((index, row[module], column[layer]) for index, layer, module in tensors),
    )


def _split(merge: TensorMerge) -> tuple[str, str, str]:
    """Split model.layers.5.mlp.up_proj into model.layers, 5, mlp.up_proj; a bias keeps its own name at the end."""
    own = merge.stats.name.removeprefix(merge.module).removeprefix(".")
    suffix = f".{own}" if own and own != "weight" else ""
    match = LAYER.search(merge.module)
    if match is None:
        return _OUTSIDE, "", merge.module + suffix
    inside = merge.module[match.end() :].removeprefix(".")
    return merge.module[: match.start()].removesuffix("."), match[0], (inside + suffix).removeprefix(".") or "weight"
