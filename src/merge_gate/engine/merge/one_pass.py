"""One pass over the weights of a base: each is merged with all adapters that are loaded, and measured.

In: `Walk`s of adapters, planned. Out: the same walks with their planned layers measured and cross-checked by PEFT. A
base that does not fit in memory is read from its files once for all of these adapters, not once for each.

1. The planned layers of all adapters are ordered by the place of their weights in the files.
2. On a CPU each core merges whole weights. On a card the next weight is copied while this one is merged.
3. Of each kind of layer of each adapter, PEFT merges one too, and must give the same bits: the cross-check. The layers
   of different adapters are spread over the model, so that their weights are still in memory.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

from merge_gate.engine.merge.plan import BlockLayer, merge_in_blocks
from merge_gate.engine.merge.walk import Walk
from merge_gate.engine.tensors.threads import spread, threads
from merge_gate.records.measured import TensorMerge

LAYERS_PER_CROSS_CHECK = 16
"""PEFT's merge of a layer takes as long as blocks of this many layers: cross-checks are spread over the pass."""

Item = tuple[Walk, BlockLayer]
Merged = tuple[Walk, BlockLayer, TensorMerge | None]


def merge_planned(walks: Sequence[Walk]) -> None:
    """Merge and measure the planned layers of all walks. What a walk does not get is left to PEFT's own merge."""
    items = sorted(((walk, block) for walk in walks for block in walk.planned), key=_address)  # 1.
    checks = _CrossChecks(walks)
    merge = _on_cpu if all(walk.base.device.type == "cpu" for walk in walks) else _on_card  # 2.
    for walk, block, result in merge(items, checks):
        if result is not None:
            walk.add(block, result)
        checks.merged(walk, block)
    checks.finish()  # 3.


def _address(item: Item) -> int:
    """A mapped file is in memory as it is on disk."""
    walk, block = item
    return walk.base.stored(block.slot.data).data_ptr()


def _merged(walk: Walk, block: BlockLayer, weight: torch.Tensor) -> Merged:
    return walk, block, merge_in_blocks(walk.base, block, weight, walk.measure_options)


def _on_cpu(items: list[Item], checks: _CrossChecks) -> Iterator[Merged]:
    def work() -> Iterator[Callable[[], Merged | None]]:
        for number, (walk, block) in enumerate(items):
            check = checks.next() if number % LAYERS_PER_CROSS_CHECK == 0 else None
            if check is not None:
                yield check
            yield functools.partial(_merged, walk, block, walk.base.stored(block.slot.data))

    yield from (one for one in spread(lambda call: call(), work()) if one is not None)


def _on_card(items: list[Item], _: _CrossChecks) -> Iterator[Merged]:
    """A weight is copied to the card once for all of the adapters."""
    for base, of_base in groupby(items, key=lambda item: item[0].base):
        by_name = [(name, list(group)) for name, group in groupby(of_base, key=lambda item: item[1].slot.name)]
        weights = base.weights.stream(name for name, _ in by_name)
        for (_, group), weight in zip(by_name, weights, strict=True):
            yield from (_merged(walk, block, weight) for walk, block in group)


class _CrossChecks:
    """Which layers PEFT merges too, and which of them are due.

    PEFT's merge takes several times a weight's memory, so no more run at a time than half as many as there are cores.
    """

    def __init__(self, walks: Sequence[Walk]) -> None:
        self._walks = walks
        parts = ((walk, number / len(walks)) for number, walk in enumerate(walks))
        self._chosen = {id(block) for walk, part in parts for block in _one_of_each_kind(walk, part)}
        self._due: deque[Item] = deque()
        self._same: dict[int, bool] = {}
        self._room = threading.Semaphore(max(1, threads() // 2))

    def merged(self, walk: Walk, block: BlockLayer) -> None:
        if id(block) in self._chosen and id(block.layer) in walk.blocks:
            self._due.append((walk, block))

    def next(self) -> Callable[[], None] | None:
        """A cross-check that is due."""
        return functools.partial(self._check, self._due.popleft()) if self._due else None

    def finish(self) -> None:
        """Run the rest, and tell each walk the results."""
        for _ in spread(self._check, self._due):
            pass
        for walk in self._walks:
            self._check_other_layers(walk)
            for block in walk.planned:
                if id(block) in self._same:
                    (walk.cross_checked if self._same[id(block)] else walk.differing).append(block.path)

    def _check_other_layers(self, walk: Walk) -> None:
        """The chosen layer of a kind may be one that PEFT has to merge: then another one is checked."""
        done = {block.kind for block in walk.planned if id(block) in self._same}
        for block in walk.planned:
            if block.kind not in done and id(block.layer) in walk.blocks:
                done.add(block.kind)
                self._check((walk, block))

    def _check(self, item: Item) -> None:
        walk, block = item
        with self._room:
            self._same[id(block)] = walk.cross_check(block)


def _one_of_each_kind(walk: Walk, part: float) -> Iterator[BlockLayer]:
    """A layer of each kind, at this part of the way through the layers of its kind: 0.0 is the first layer."""
    kinds: dict[tuple[object, ...], list[BlockLayer]] = {}
    for block in walk.planned:
        kinds.setdefault(block.kind, []).append(block)
    yield from (blocks[int(part * len(blocks))] for blocks in kinds.values())
