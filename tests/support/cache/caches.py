"""The cache of one run, and how one verdict is stored in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.features.cache.verdict_cache import Cache, CachedVerdict
from merge_gate.files.base_watch import base_directory
from merge_gate.records.files import Entry
from merge_gate.records.options import RunOptions
from merge_gate.records.report import AdapterReport
from merge_gate.worker.protocol import DeviceChosen
from tests.support.cache.verdicts import BASE, judged

CPU = DeviceChosen(device="cpu", device_name="a CPU")
CARD = DeviceChosen(device="cuda", device_name="a card")


def open_cache(
    entry: Entry,
    *,
    directory: bool = True,
    device: DeviceChosen | None = CPU,
    requested: str = "cpu",
    secret: str = "",
    notify: Callable[[str], object] = pytest.fail,
    **options: Any,
) -> Cache:
    """A cache in a directory next to the entry's base, of a run that merges on `device`."""
    place = Path(base_directory(entry)).parent / "cache"
    cache = Cache(
        RunOptions(device=requested, cache=str(place) if directory else None, **options),
        (),
        environ={"MERGE_GATE_CACHE_KEY": secret},
        notify=notify,
    )
    if device is not None:
        cache.set_device(device)
    return cache


def store(cache: Cache, entry: Entry, **changes: Any) -> AdapterReport | None:
    """Store the verdict of a run on this entry."""
    verdict = judged(entry)
    adapter = replace(verdict.adapter, **changes)
    return cache.store(entry, CachedVerdict(adapter=adapter, base=verdict.base), BASE)


def is_hit(cache: Cache, entry: Entry) -> bool:
    found = cache.lookup(entry, BASE)
    assert found is None or found.adapter.cached
    return found is not None
