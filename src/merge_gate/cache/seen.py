"""Digests of bases that earlier runs on this machine computed, of files that cannot have changed since.

In: the directory of a base, and the identity of its files. Out: the digests of its weight files, or None: then they
have to be read. A record is valid under three conditions:

1. Each file has the same device, inode, size, and times. A write changes ctime, which no program can set back.
2. The machine has not restarted: device and inode numbers mean nothing elsewhere.
3. No one has set the clock since, and no time was less than two seconds old when hashing began. A write within one
   tick of the clock would not show.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.cache.device_lookup import boot_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_gate.cache.store import Store
    from merge_gate.records.files import FileIdentity

Json = Any

KIND = "bases"
SETTLED_NS = 2_000_000_000
CLOCK_DRIFT_S = 2.0
"""The system's own corrections of the clock stay below this. Setting the clock does not."""


class SeenBases:
    """The records of one cache directory. With `fresh`, they are only written."""

    def __init__(self, store: Store, *, fresh: bool = False) -> None:
        self._store, self._fresh = store, fresh

    def lookup(self, directory: str, identity: tuple[FileIdentity, ...]) -> dict[str, str] | None:
        """The digests of the weight files in `directory`, whose files have this identity now."""
        boot = boot_id()
        if self._fresh or boot is None:
            return None
        record = self._store.get(KIND, _name(directory))
        if not isinstance(record, dict) or record.get("machine") != boot:
            return None
        offset, digests = record.get("offset_s"), record.get("sha256")
        if not isinstance(offset, float) or abs(offset - clock_offset_s()) > CLOCK_DRIFT_S:
            return None
        if record.get("files") != _as_json(identity) or not identity:
            return None
        if not isinstance(digests, dict) or not digests or not all(map(_is_digest, digests.values())):
            return None
        return digests

    def store(
        self, directory: str, identity: tuple[FileIdentity, ...], digests: Mapping[str, str], began_ns: int
    ) -> None:
        """Store digests. Hashing began at `began_ns` (by the clock of files), when the files had this identity."""
        boot = boot_id()
        newest = max((max(file.mtime_ns, file.ctime_ns) for file in identity), default=began_ns)
        if boot is None or newest > began_ns - SETTLED_NS:
            return
        record = {
            "machine": boot,
            "offset_s": clock_offset_s(),
            "files": _as_json(identity),
            "sha256": dict(digests),
        }
        self._store.put(KIND, _name(directory), record)


def _is_digest(value: Json) -> bool:
    return isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2


def _as_json(identity: tuple[FileIdentity, ...]) -> Json:
    return [list(astuple(file)) for file in identity]


def _name(directory: str) -> str:
    """A digest of the real path, so that a shared cache does not show the layout of a disk."""
    return hashlib.sha256(str(Path(directory).resolve()).encode("utf-8", "surrogateescape")).hexdigest()


def clock_offset_s() -> float:
    """How far the clock of files is ahead of the clock that no one can set."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
