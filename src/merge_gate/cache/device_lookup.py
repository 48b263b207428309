"""Finds the device that a run would merge on, which is part of every key, without torch if possible.

In: the requested device, the system's files, and the devices that earlier runs stored. Out: a `MergeDevice`, or None if
only torch can answer; then the run asks its worker.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.cache.key import libraries
from merge_gate.records.terms import record
from merge_gate.worker.device import cpu_name, has_card

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_gate.cache.store import Store

_KIND = "devices"
_CARD_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@record
class MergeDevice:
    """`device` is torch's name for it (`cpu`, `cuda:1`), `name` that of the processor or the card."""

    device: str
    name: str

    @property
    def in_key(self) -> str:
        """Any processor gives the same verdict; cards differ by model."""
        return "cpu" if self.device == "cpu" else self.name


class KnownDevices:
    """The devices that earlier runs stored in a cache directory. They are valid until the machine restarts."""

    def __init__(self, requested: str, store: Store | None, environ: Mapping[str, str]) -> None:
        self._requested, self._store, self._environ = requested, store, environ

    def lookup(self) -> MergeDevice | None:
        """The device that torch would choose; None if it is not known."""
        if self._is_cpu:
            return MergeDevice(device="cpu", name=cpu_name())
        name = self._name()
        document = self._store.get(_KIND, name) if self._store is not None and name is not None else None
        match document:
            case {"device": str(device), "name": str(name)}:
                return MergeDevice(device=device, name=name)
        return None

    def store(self, device: MergeDevice) -> None:
        name = self._name()
        if self._store is not None and name is not None:
            self._store.put(_KIND, name, {"device": device.device, "name": device.name})

    @property
    def _is_cpu(self) -> bool:
        return self._requested == "cpu" or (self._requested == "auto" and not has_card())

    def _name(self) -> str | None:
        """The name of the stored device; None on a CPU, and if the system has no id of its start."""
        start = None if self._is_cpu else boot_id()
        if start is None:
            return None
        cards = (self._environ.get(variable, "") for variable in _CARD_VARIABLES)
        parts = (start, self._requested, libraries()["torch"] or "", *cards)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def boot_id() -> str | None:
    """An id that changes whenever this machine starts; None if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    return None
