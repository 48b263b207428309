"""A keeper of cached verdicts, and how one verdict is put into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.cache.keeper import Keeper, Keeping, base_directory
from merge_gate.records.config import Config
from merge_gate.records.files import Entry
from merge_gate.worker.protocol import DeviceChosen
from tests.support.cache.lines import line

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.cache.verdicts import Line

CPU = DeviceChosen(device="cpu", device_name="a CPU")


def keeper(
    one: Entry,
    *,
    cache: bool = True,
    device: str = "cpu",
    secret: str = "",
    notify: Callable[[str], object] = pytest.fail,
    **keeping: Any,
) -> Keeper:
    place = Path(base_directory(one)).parent / "cache"
    return Keeper(
        Config(path="gate.yml", sha256="0" * 64, adapters=()),
        Keeping(cache=str(place) if cache else None, **keeping),
        device=device,
        quick=False,
        environ={"MERGE_GATE_CACHE_KEY": secret},
        notify=notify,
    )


def keep(run: Keeper, one: Entry, device: DeviceChosen = CPU, **changes: Any) -> Line | None:
    """What a run keeps that has merged on this device."""
    run.device_chosen(device)
    run.digests.start(base_directory(one))
    run.digests.wait()
    judged = line(one)
    return run.keep(one, replace(judged, adapter=replace(judged.adapter, **changes)))
