"""Cuts a run into shards: completely, without overlap, and in the same way on every machine.

In: a configuration, its adapters, and I of N. Out: the adapters of shard I, and the `Shard` for its report. It reads no
file.

1. Adapters of one base stay together. A base is cut only if it has more adapters than the even share of a machine, or
   if machines would have no work.
2. A base is cut into parts with equal numbers of adapters.
3. The largest part goes first, and each part to the machine with the fewest adapters. Names break ties, so that the
   order of the configuration does not matter.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Mapping, Sequence

from merge_gate import __version__
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.report import Shard
from merge_gate.run.verdict_key import key_of, versions_digest

PLAN_VERSION = 2
"""Raise it if the same configuration is cut differently."""


def part_of(
    config: Config, specs: Sequence[AdapterSpec], number: tuple[int, int]
) -> tuple[tuple[AdapterSpec, ...], Shard]:
    """The adapters of shard I of N, in the order of the config, and the shard for its report."""
    index, count = number
    shards = assign({spec.name: _base_of(spec, config.directory) for spec in specs}, count)
    ours: list[AdapterSpec] = []
    positions: list[int] = []
    entries = 0
    for spec in specs:
        if shards[spec.name] == index - 1:
            ours.append(spec)
            positions.extend(range(entries, entries + len(spec.base.dtypes)))
        entries += len(spec.base.dtypes)
    plan = {
        "plan": PLAN_VERSION,
        "version": __version__,
        "config": config.sha256,
        "baseline": repr(config.baseline),
        "shards": count,
        "entries": [[spec.name, list(spec.base.dtypes), str(spec.forward), shards[spec.name]] for spec in specs],
    }
    shard = Shard(
        index=index,
        count=count,
        plan_sha256=key_of(plan),
        versions_sha256=versions_digest(),
        entries=entries,
        positions=tuple(positions),
    )
    return tuple(ours), shard


def assign(bases: Mapping[str, tuple[str, str]], count: int) -> dict[str, int]:
    """The shard of each adapter, counted from 0, by the base of each adapter."""
    load = [(0, shard) for shard in range(count)]
    assigned: dict[str, int] = {}
    for names in sorted(_parts(bases, count), key=lambda names: (-len(names), names)):  # 3
        busy, shard = heapq.heappop(load)
        heapq.heappush(load, (busy + len(names), shard))
        assigned |= dict.fromkeys(names, shard)
    return assigned


def _parts(bases: Mapping[str, tuple[str, str]], count: int) -> Iterator[list[str]]:
    """Steps 1 and 2: the names in each part. There is a part for each machine if there are enough adapters."""
    adapters: dict[tuple[str, str], list[str]] = {}
    for name in sorted(bases):
        adapters.setdefault(bases[name], []).append(name)
    shares = {base: (2 * len(names) * count + len(bases)) // (2 * len(bases)) for base, names in adapters.items()}
    cuts = {base: min(max(shares[base], 1), len(names)) for base, names in adapters.items()}
    while sum(cuts.values()) < min(count, len(bases)):  # a machine without work takes a piece of the largest part
        cuts[max(cuts, key=lambda base: (len(adapters[base]) / cuts[base], base))] += 1
    for base, names in adapters.items():
        yield from (names[piece :: cuts[base]] for piece in range(cuts[base]))


def _base_of(spec: AdapterSpec, home: str) -> tuple[str, str]:
    """The base in the configuration; empty if only adapter_config.json names it."""
    model = spec.base.model or ""
    if os.path.isabs(model):  # noqa: PTH117 - a Hub id is no path
        model = os.path.relpath(model, home)  # a checkout may be elsewhere on another machine
    return model, spec.base.revision or ""
