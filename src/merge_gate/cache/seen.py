"""Digests of bases that are known, because nothing can have changed since they were taken on this machine.

In: a base's directory, and the identity of its files. Out: the digest of its weights, or None: it must be read. A
record holds where the files' bytes are the system's to vouch for:

1. Every file has its device, inode, size and times: a write changes the time of change, which no program sets back.
2. It is the same start of the same machine: numbers of devices and inodes mean nothing elsewhere.
3. The clock has not been set since, and no time was less than two seconds old when the digest was begun: a write within
   the clock's own tick would not show.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_gate.cache.store import Store
    from merge_gate.records.files import FileIdentity

Json = Any

KIND = "bases"
SETTLED_NS = 2_000_000_000
CLOCK_DRIFT_S = 2.0
"""The clock's own regulation stays below this; whoever sets it does not."""


class SeenBases:
    """The records of one cache directory. With `fresh` none is read."""

    def __init__(self, store: Store, *, fresh: bool = False) -> None:
        self._store, self._fresh = store, fresh

    def known(self, directory: str, identity: tuple[FileIdentity, ...]) -> str | None:
        """The digest of the weights in `directory`, whose files have this identity now."""
        machine = this_start()
        if self._fresh or machine is None:
            return None
        record = self._store.get(KIND, _name(directory))
        if not isinstance(record, dict) or record.get("machine") != machine:
            return None
        offset, digest = record.get("offset_s"), record.get("sha256")
        if not isinstance(offset, float) or abs(offset - clock_offset_s()) > CLOCK_DRIFT_S:
            return None
        if record.get("files") != _as_json(identity) or not identity:
            return None
        return digest if isinstance(digest, str) and len(digest) == hashlib.sha256().digest_size * 2 else None

    def learned(self, directory: str, identity: tuple[FileIdentity, ...], digest: str, began_ns: int) -> None:
        """Note a digest that was begun at `began_ns` (of the clock of files), of files that had this identity then."""
        machine = this_start()
        newest = max((max(one.mtime_ns, one.ctime_ns) for one in identity), default=began_ns)
        if machine is None or newest > began_ns - SETTLED_NS:
            return
        record = {"machine": machine, "offset_s": clock_offset_s(), "files": _as_json(identity), "sha256": digest}
        self._store.put(KIND, _name(directory), record)


def _as_json(identity: tuple[FileIdentity, ...]) -> Json:
    return [list(astuple(one)) for one in identity]


def _name(directory: str) -> str:
    """The real path, as a digest: a cache that is shared tells nobody how a machine's disks are laid out."""
    return hashlib.sha256(str(Path(directory).resolve()).encode("utf-8", "surrogateescape")).hexdigest()


def this_start() -> str | None:
    """What tells this start of this machine from every other; None where the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    return None


def clock_offset_s() -> float:
    """How far the clock of files is ahead of the one that nobody can set."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
