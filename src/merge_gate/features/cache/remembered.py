"""What earlier runs found out, so that this run need not: its device, and the digests of bases.

In: the store of a cache directory, and what identifies a device, or the files of a base now. Out: what is
stored about them, or None.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.files.identity import base_identity
from merge_gate.run.verdict_key import Json, libraries
from merge_gate.worker.device import cpu_name, has_card
from merge_gate.worker.protocol import DeviceChosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_gate.features.cache.store import Store
    from merge_gate.records.files import FileIdentity

# --- devices ---------------------------------------------------------------------------------------------------------

_CARD_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class StoredDevices:
    """The device that a run would merge on, which is part of every key. A card is valid until the machine restarts."""

    def __init__(self, requested: str, store: Store, boot: str | None, environ: Mapping[str, str]) -> None:
        self._requested, self._store, self._boot, self._environ = requested, store, boot, environ

    def lookup(self) -> DeviceChosen | None:
        """The device that torch would choose; None if only torch can tell."""
        if self._is_cpu:
            return DeviceChosen(device="cpu", device_name=cpu_name())
        name = self._name()
        match self._store.get("devices", name) if name is not None else None:
            case {"device": str(device), "name": str(name)}:
                return DeviceChosen(device=device, device_name=name)
        return None

    def store(self, device: DeviceChosen) -> None:
        name = self._name()
        if name is not None:
            self._store.put("devices", name, {"device": device.device, "name": device.device_name})

    @property
    def _is_cpu(self) -> bool:
        return self._requested == "cpu" or (self._requested == "auto" and not has_card())

    def _name(self) -> str | None:
        """The name of the stored device; None on a CPU, and if the system has no id of its start."""
        if self._is_cpu or self._boot is None:
            return None
        cards = (self._environ.get(variable, "") for variable in _CARD_VARIABLES)
        return _digest("\0".join((self._boot, self._requested, libraries()["torch"] or "", *cards)))


def boot_id(file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str | None:
    """An id that changes whenever this machine starts; None if the system has none."""
    with suppress(OSError):
        return file.read_text(encoding="ascii").strip() or None
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# --- digests of bases ------------------------------------------------------------------------------------------------

SETTLED_NS = 2_000_000_000
CLOCK_DRIFT_S = 2.0
"""The system's own corrections of the clock stay below this. Setting the clock does not."""


class StoredDigests:
    """Digests of bases that earlier runs on this machine hashed. With `fresh`, they are only written.

    They are valid under three conditions:

    1. Each file has the same device, inode, size, and times. A write changes ctime, which no program can set back.
    2. The machine has not restarted: device and inode numbers mean nothing elsewhere.
    3. No one has set the clock since, and no time was less than two seconds old when hashing began. A write within one
       tick of the clock would not show.
    """

    def __init__(self, store: Store, boot: str | None, *, fresh: bool = False) -> None:
        self._store, self._boot, self._fresh = store, boot, fresh

    def lookup(self, directory: str, identity: tuple[FileIdentity, ...]) -> dict[str, str] | None:
        """The digests of the weight files in `directory`, whose files have this identity now."""
        if self._fresh or self._boot is None or not identity:
            return None
        match self._store.get("bases", _name_of(directory)):
            case {"machine": str(machine), "offset_s": float(offset_s), "files": files, "sha256": dict(digests)}:
                is_same = machine == self._boot and files == _as_json(identity) and digests
                is_set = abs(offset_s - clock_offset_s()) > CLOCK_DRIFT_S
                return digests if is_same and not is_set and all(map(_is_digest, digests.values())) else None
        return None

    def known(self, directory: str) -> dict[str, str] | None:
        """The digests of the weight files in `directory`, as its files are now.

        Raises:
            OSError: the directory cannot be read.
        """
        return self.lookup(directory, base_identity(directory))

    def store(
        self, directory: str, identity: tuple[FileIdentity, ...], digests: Mapping[str, str], began_ns: int
    ) -> None:
        """Store digests. Hashing began at `began_ns` (by the clock of files), when the files had this identity."""
        newest = max((max(file.mtime_ns, file.ctime_ns) for file in identity), default=began_ns)
        if self._boot is None or newest > began_ns - SETTLED_NS:
            return
        document = {
            "machine": self._boot,
            "offset_s": clock_offset_s(),
            "files": _as_json(identity),
            "sha256": dict(digests),
        }
        self._store.put("bases", _name_of(directory), document)


def _is_digest(value: Json) -> bool:
    return isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2


def _as_json(identity: tuple[FileIdentity, ...]) -> Json:
    return [list(astuple(file)) for file in identity]


def _name_of(directory: str) -> str:
    """A digest of the real path, so that a shared cache does not show the layout of a disk."""
    return _digest(str(Path(directory).resolve()))


def clock_offset_s() -> float:
    """How far the clock of files is ahead of the clock that no one can set."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
