"""The cache of one run, and how one verdict is stored in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from merge_gate.features.cache.feature import VerdictCache
from merge_gate.features.cache.store import Seal
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.records.files import Entry
from merge_gate.records.options import RunOptions
from merge_gate.run.flow import Run
from merge_gate.run.verdict_key import device_name, keyed
from merge_gate.worker.protocol import DeviceChosen
from tests.support.cache.verdicts import judged
from tests.support.judged_entry import BASE

CPU = DeviceChosen(device="cpu", device_name="a CPU")
CARD = DeviceChosen(device="cuda", device_name="a card")


def a_run(options: RunOptions, notify: Callable[[str], object] = pytest.fail) -> Run:
    """A run without inputs, as far as a cache knows it. Its worker finds a card."""
    made = SimpleNamespace(
        options=options,
        inputs=(),
        config=SimpleNamespace(trusts=()),
        view=SimpleNamespace(note=notify),
        watch=BaseWatch(),
        worker=SimpleNamespace(choose_device=lambda _: CARD),
        groups=(),
    )
    return cast("Run", made)


def open_cache(
    entry: Entry,
    *,
    requested: str = "cpu",
    secret: str = "",
    notify: Callable[[str], object] = pytest.fail,
    run: Run | None = None,
    **options: Any,
) -> VerdictCache:
    """A cache in a directory next to the entry's base."""
    place = Path(base_directory(entry)).parent / "cache"
    own = RunOptions(device=requested, features=options)
    return VerdictCache(run or a_run(own, notify), str(place), Seal(secret))


def store(cache: VerdictCache, entry: Entry, device: DeviceChosen = CPU) -> None:
    """Store the verdict of a run on this entry."""
    verdict = judged(entry)
    made = keyed(entry, verdict.adapter, BASE, device_name(device), ())
    assert made is not None
    cache.decided(made[0], verdict.base, made[1])


def is_hit(cache: VerdictCache, entry: Entry, device: DeviceChosen = CPU) -> bool:
    found = cache.lookup(entry, BASE, device)
    assert found is None or found.adapter.cached
    return found is not None
