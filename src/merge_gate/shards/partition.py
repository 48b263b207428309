"""Cuts a run into shards: completely, without overlap, and in the same way on every machine.

In: a configuration, its adapters, and I of N. Out: the adapters of shard I, and the `Shard` for its report. It reads
the sizes of files, and the base's name in adapter_config.json.

1. Adapters of one base stay together. A base is cut only if it costs more than the even share of a machine, or if
   machines would have no work.
2. A base is cut into parts of equal cost.
3. The largest part goes first, and each part to the machine with the least work. Names break ties, so that the order of
   files and of the configuration does not matter.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from merge_gate import __version__
from merge_gate._internal.errors import UsageError
from merge_gate.cache.key import key_of, versions_digest
from merge_gate.files.identity import base_bytes
from merge_gate.files.json_object import read_as_transformers
from merge_gate.limits.time_limit import ANSWER_LIMIT_S, within
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import CONFIG_NAME
from merge_gate.records.options import RunOptions
from merge_gate.records.report import Shard
from merge_gate.records.terms import record

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


def assign(costs: Mapping[str, Cost], count: int) -> dict[str, int]:
    """The shard of each name, counted from 0."""
    load = [(0, shard) for shard in range(count)]
    assigned: dict[str, int] = {}
    for negative_cost, _, names in sorted(_parts(costs, count)):  # 3
        busy, shard = heapq.heappop(load)
        heapq.heappush(load, (busy - negative_cost, shard))
        assigned |= dict.fromkeys(names, shard)
    return assigned


def _parts(costs: Mapping[str, Cost], count: int) -> Iterator[tuple[int, tuple[str, str], list[str]]]:
    """Steps 1 and 2: the parts, whose number is at least that of the machines if there are enough adapters.

    A part is its negative cost, its base, and the names of its adapters.
    """
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
    for base, names in bases.items():
        yield from ((-_cost(piece, costs), base, piece) for piece in _cut(names, costs, cuts[base]))


def _cost(names: Sequence[str], costs: Mapping[str, Cost]) -> int:
    return max(costs[name].read_bytes for name in names) + sum(costs[name].merge_bytes for name in names)


def _cut(names: Sequence[str], costs: Mapping[str, Cost], pieces: int) -> list[list[str]]:
    """Pieces of a base, as even as whole adapters allow."""
    load = [(0, piece) for piece in range(pieces)]
    cut: list[list[str]] = [[] for _ in range(pieces)]
    for name in sorted(names, key=lambda name: (-costs[name].merge_bytes, name)):
        busy, piece = heapq.heappop(load)
        cut[piece].append(name)
        heapq.heappush(load, (busy + costs[name].merge_bytes, piece))
    return cut


# --- costs -----------------------------------------------------------------------------------------------------------

MERGE_BYTES = 64 << 20
LOAD_BYTES = 256 << 20
"""The fixed cost of a merge and of a load, in bytes. With tiny bases it is the whole cost."""

_LONGEST_CONFIG_BYTES = 1 << 20


@record
class Cost:
    """The base of an adapter, what it costs to read the base once, and what the adapter's own merges cost."""

    base: tuple[str, str]
    read_bytes: int
    merge_bytes: int


class Costs:
    """The costs of one config's entries, by names and sizes on disk: the same on every machine.

    Files on the Hub have no size here, because one machine may have them in its cache and another not.
    """

    def __init__(self, config: Config) -> None:
        self._home = Path(config.directory)
        self._specs = {spec.name: spec for spec in config.adapters}
        self._bytes_of = cache(lambda directory: base_bytes(directory) or 0)

    def of(self, spec: AdapterSpec) -> Cost:
        """A merge reads the weights of the base and of the adapter, once for each dtype."""
        members = [self._specs[name] for name in spec.combine.adapters] if spec.combine is not None else [spec]
        model = spec.base.model or _named_base(members[0], self._home)
        base, size_bytes = model, 0
        if Path(model).is_absolute():
            base = os.path.relpath(model, self._home)  # a checkout may be elsewhere on another machine
            size_bytes = self._bytes_of(model)
        own_bytes = sum(_weight_bytes(member.path) for member in members if member.path)
        dtypes = len(spec.base.dtypes)
        return Cost(
            base=(base, spec.base.revision or ""),
            read_bytes=dtypes * (LOAD_BYTES + size_bytes),
            merge_bytes=dtypes * (MERGE_BYTES + size_bytes + own_bytes),
        )


def _named_base(spec: AdapterSpec, home: Path) -> str:
    """The base that adapter_config.json names, resolved as in `files/resolve.py`; empty if it names none."""
    config = read_as_transformers(Path(spec.path, CONFIG_NAME), _LONGEST_CONFIG_BYTES) if spec.path else None
    named = (config or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    try:
        return str(home / named) if within(ANSWER_LIMIT_S, (home / named).is_dir) else named
    except (OSError, ValueError):  # a mount that does not answer, or a name that no file system allows
        return named


def _weight_bytes(directory: str) -> int:
    """The size of the weights alone, because other files may differ from machine to machine."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name.startswith("adapter_model."))
    except OSError:
        return 0
