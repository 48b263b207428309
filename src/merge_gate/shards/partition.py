"""Cuts a run into shards: completely, without overlap, and in the same way on every machine.

In: a configuration, its adapters, and I of N. Out: the adapters of shard I, and the `Shard` for its report.

1. Adapters of one base stay together. A base is cut only if it costs more than the even share of a machine, or if
   machines would have no work.
2. A base is cut into parts of equal cost.
3. The largest part goes first, and each part to the machine with the least work. Names break ties, so that the order of
   files and of the configuration does not matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from merge_gate import __version__
from merge_gate.cache import key
from merge_gate.errors import UsageError
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.options import RunOptions
from merge_gate.records.report import Shard
from merge_gate.records.terms import record
from merge_gate.shards.costs import Cost, Costs

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Kubernetes sets it in each pod of an Indexed Job. It counts from 0."""

PLAN_VERSION = 1
"""Raise it if the same configuration and files are cut differently."""


def shard_of(text: str, environ: Mapping[str, str]) -> tuple[int, int]:
    """I and N of `I/N`. For `N` alone, I is the number of the pod in a Kubernetes Indexed Job.

    Raises:
        UsageError: I is more than N, or there is no number of a pod.
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
    config: Config, specs: Sequence[AdapterSpec], options: RunOptions
) -> tuple[tuple[AdapterSpec, ...], Shard | None]:
    """The adapters of this run's shard, in the order of the config, and the shard for its report.

    All adapters and None if the run is not a shard.
    """
    if options.shard is None:
        return tuple(specs), None
    index, count = options.shard
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
        "shards": count,
        "entries": [[spec.name, list(spec.base.dtypes), shards[spec.name]] for spec in specs],
    }
    shard = Shard(
        index=index,
        count=count,
        plan_sha256=key.key_of(plan),
        versions_sha256=key.versions_digest(),
        entries=entries,
        positions=tuple(positions),
    )
    return tuple(ours), shard


@record
class _Part:
    """Adapters of one base for one machine."""

    base: tuple[str, str]
    names: tuple[str, ...]
    cost: int


def assign(costs: Mapping[str, Cost], count: int) -> dict[str, int]:
    """The shard of each name, counted from 0."""
    load = [(0, shard) for shard in range(count)]
    assigned: dict[str, int] = {}
    for part in sorted(_parts(costs, count), key=lambda part: (-part.cost, part.base, part.names)):  # 3
        busy, shard = heapq.heappop(load)
        heapq.heappush(load, (busy + part.cost, shard))
        assigned |= dict.fromkeys(part.names, shard)
    return assigned


def _parts(costs: Mapping[str, Cost], count: int) -> list[_Part]:
    """Steps 1 and 2: the parts, whose number is at least that of the machines if there are enough adapters."""
    bases: dict[tuple[str, str], list[str]] = {}
    for name in sorted(costs):
        bases.setdefault(costs[name].base, []).append(name)
    whole = {base: _cost(names, costs) for base, names in bases.items()}
    even = max(sum(whole.values()) // count, 1)
    cuts = {base: min(max((2 * cost + even) // (2 * even), 1), len(bases[base])) for base, cost in whole.items()}
    waiting = [(-whole[base] // cuts[base], base) for base in sorted(bases)]
    heapq.heapify(waiting)
    left = count - sum(cuts.values())
    while left > 0 and waiting:  # a machine without work takes a piece of the largest part
        _, base = heapq.heappop(waiting)
        if cuts[base] < len(bases[base]):
            cuts[base] += 1
            left -= 1
            heapq.heappush(waiting, (-whole[base] // cuts[base], base))
    return [part for base, names in sorted(bases.items()) for part in _cut(base, names, costs, cuts[base])]


def _cost(names: Sequence[str], costs: Mapping[str, Cost]) -> int:
    return max(costs[name].read_bytes for name in names) + sum(costs[name].merge_bytes for name in names)


def _cut(base: tuple[str, str], names: Sequence[str], costs: Mapping[str, Cost], pieces: int) -> list[_Part]:
    """Pieces of a base, as even as whole adapters allow."""
    load = [(0, piece) for piece in range(pieces)]
    cut: list[list[str]] = [[] for _ in range(pieces)]
    for name in sorted(names, key=lambda name: (-costs[name].merge_bytes, name)):
        busy, piece = heapq.heappop(load)
        cut[piece].append(name)
        heapq.heappush(load, (busy + costs[name].merge_bytes, piece))
    return [_Part(base=base, names=tuple(piece), cost=_cost(piece, costs)) for piece in cut]
