"""The plan of a run → its shards: deterministic, complete, disjoint, the same on every machine.

In: a config, the entries to judge, and I of N. Out: the I-th part of them, and the `Shard` that its report carries.

1. Entries of one base stay together: a base is cut only where it is more than one machine's even share, or where there
   are machines left over. 2. A base is cut into parts of equal cost. 3. Parts go to the machine that has the least to
do, the largest first. Ties are broken by name, so that neither the order of files nor that of the config matters.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from merge_gate import __version__
from merge_gate.cache import key
from merge_gate.errors import UsageError
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.report import Shard
from merge_gate.records.terms import record
from merge_gate.shards.costs import Cost, Costs

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Set in each pod of a Kubernetes Indexed Job; counts from 0."""

PLAN_VERSION = 1
"""Rises when the same config and files are cut otherwise."""


def shard_of(text: str, environ: Mapping[str, str]) -> tuple[int, int]:
    """I and N of `I/N`; of `N` alone, with I by the pod of a Kubernetes Indexed Job.

    Raises:
        UsageError: I is more than N, or not to be found.
    """
    first, _, last = text.rpartition("/")
    if not first:
        given = environ.get(INDEX_VARIABLE, "")
        if not given.isdecimal() or not given.isascii():
            raise UsageError(
                f"--shard {text}: {INDEX_VARIABLE} is {given[:20]!r}, expected the number of this pod",
                hint="name the shard as I/N, or run in a Kubernetes Job with completionMode: Indexed",
            )
        first = str(int(given[:9]) + 1)
    index, count = int(first), int(last)
    if index > count:
        raise UsageError(f"--shard {index}/{count}: there is no shard {index} of {count}", hint="shards count from 1")
    return index, count


def part_of(
    config: Config, specs: Sequence[AdapterSpec], index: int, count: int, *, quick: bool
) -> tuple[tuple[AdapterSpec, ...], Shard]:
    """The entries of shard `index` of `count`, in the order of the config, and what its report says of itself."""
    costs = Costs(config)
    shards = assign({spec.name: costs.of(spec) for spec in specs}, count)
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
        "quick": quick,
        "shards": count,
        "entries": [[spec.name, list(spec.base.dtypes), shards[spec.name]] for spec in specs],
    }
    shard = Shard(
        index=index,
        count=count,
        plan_sha256=key.key_of(plan),
        versions_sha256=key.key_of([key.own_code(), key.libraries()]),
        entries=entries,
        positions=tuple(positions),
    )
    return tuple(ours), shard


@record
class _Part:
    """Entries of one base for one machine."""

    base: tuple[str, str]
    names: tuple[str, ...]
    cost: int


def assign(costs: Mapping[str, Cost], count: int) -> dict[str, int]:
    """The shard of each entry, counted from 0."""
    load = [(0, shard) for shard in range(count)]
    assigned: dict[str, int] = {}
    for part in sorted(_parts(costs, count), key=lambda one: (-one.cost, one.base, one.names)):
        busy, shard = heapq.heappop(load)
        heapq.heappush(load, (busy + part.cost, shard))
        assigned |= dict.fromkeys(part.names, shard)
    return assigned


def _parts(costs: Mapping[str, Cost], count: int) -> list[_Part]:
    bases: dict[tuple[str, str], list[str]] = {}
    for name in sorted(costs):
        bases.setdefault(costs[name].base, []).append(name)
    whole = {base: _cost(names, costs) for base, names in bases.items()}
    even = max(sum(whole.values()) // count, 1)
    cuts = {base: min(max((2 * cost + even) // (2 * even), 1), len(bases[base])) for base, cost in whole.items()}
    waiting = [(-whole[base] // cuts[base], base) for base in sorted(bases)]
    heapq.heapify(waiting)
    left = count - sum(cuts.values())
    while left > 0 and waiting:  # a machine without work may as well take a part of the largest part
        _, base = heapq.heappop(waiting)
        if cuts[base] < len(bases[base]):
            cuts[base] += 1
            left -= 1
            heapq.heappush(waiting, (-whole[base] // cuts[base], base))
    return [part for base, names in sorted(bases.items()) for part in _cut(base, names, costs, cuts[base])]


def _cost(names: Sequence[str], costs: Mapping[str, Cost]) -> int:
    return max(costs[name].read_bytes for name in names) + sum(costs[name].merge_bytes for name in names)


def _cut(base: tuple[str, str], names: Sequence[str], costs: Mapping[str, Cost], pieces: int) -> list[_Part]:
    """As even as whole entries allow, the largest first."""
    load = [(0, piece) for piece in range(pieces)]
    held: list[list[str]] = [[] for _ in range(pieces)]
    for name in sorted(names, key=lambda one: (-costs[one].merge_bytes, one)):
        busy, piece = heapq.heappop(load)
        held[piece].append(name)
        heapq.heappush(load, (busy + costs[name].merge_bytes, piece))
    return [_Part(base=base, names=tuple(part), cost=_cost(part, costs)) for part in held]
