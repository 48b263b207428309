"""Which verdicts need not be reached again, and which are kept for later runs.

In: entries whose names became files, what the run measured. Out: lines of the report that an earlier run reached on the
same key (cache/key.py), and marks on those of this run. Judges nothing, writes to the cache directory only.

1. A line is taken over only where base and adapter are, byte for byte, what it was reached on.   `take_over`
2. A line is kept only once it is known what it rests on: the digest of the base is taken, and base and adapter are
   still the files that were read.                                                                `keep`
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from merge_gate.cache import verdicts
from merge_gate.cache.key import Circumstances, key_of, libraries, material
from merge_gate.cache.place import this_place
from merge_gate.cache.seal import from_environment
from merge_gate.cache.seen import SeenBases, this_start
from merge_gate.cache.store import Store
from merge_gate.cache.verdicts import Line, Reached
from merge_gate.files.base_digests import BaseDigests
from merge_gate.files.identity import identity_of
from merge_gate.records.terms import record
from merge_gate.worker.device import cpu_name, has_card
from merge_gate.worker.process import WorkerProcess
from merge_gate.worker.protocol import DeviceChosen, Event, Job

if TYPE_CHECKING:
    from merge_gate.cache.resume import Left
    from merge_gate.records.config import Config
    from merge_gate.records.files import Entry
    from merge_gate.report.formats.fields import Json

_DEVICES = "devices"
_CARD_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@record
class Keeping:
    """What a run is asked to keep and to take over. `fresh`: nothing is taken over (`--no-cache`)."""

    cache: str | None = None
    fresh: bool = False
    left: Left | None = None


NOTHING = Keeping()


class Keeper:
    """The verdicts of one run that may be those of others."""

    def __init__(
        self,
        config: Config,
        keeping: Keeping,
        *,
        device: str,
        quick: bool,
        environ: Mapping[str, str],
        notify: Callable[[str], None],
    ) -> None:
        self._config, self._keeping, self._wanted, self._quick = config, keeping, device, quick
        self._environ = environ
        for line in keeping.left.notes if keeping.left is not None else ():
            notify(line)
        self._seal = from_environment(environ)
        self._store = Store(keeping.cache, self._seal, notify) if keeping.cache is not None else None
        self._place = this_place(environ)
        self._device: str | None = None
        self.device_name = ""
        self.device = device
        self.digests = BaseDigests(SeenBases(self._store, fresh=keeping.fresh) if self._store else None)

    def close(self) -> None:
        """Let go of the cache directory."""
        if self._store is not None:
            self._store.tidy()
            self._store.close()

    @property
    def looks_back(self) -> bool:
        """Whether there is anything that could be taken over."""
        if self._keeping.left:
            return True
        return self._store is not None and not self._keeping.fresh and not self._store.is_empty(verdicts.KIND)

    # --- taking over -----------------------------------------------------------------------------------------------

    def take_over(self, entries: Iterable[tuple[int, Entry]]) -> Iterator[tuple[int, Line]]:
        """The entries that need not be judged, each with its line."""
        if not self.looks_back or not self._know_device():
            return
        listed = list(entries)
        for _, entry in listed:
            self.digests.start(base_directory(entry))
        self.digests.wait()
        for index, entry in listed:
            line = self._line_of(entry)
            if line is not None and _is_there(entry) and self.digests.holds(base_directory(entry)):
                yield index, line

    def _line_of(self, entry: Entry) -> Line | None:
        rests_on = self._material(entry)
        if rests_on is None:
            return None
        key = key_of(rests_on)
        for line in self._keeping.left.of(key) if self._keeping.left else ():
            if verdicts.is_sealed(line, rests_on, self._seal) and (found := verdicts.today(line, entry)):
                return found
        if self._store is None or self._keeping.fresh:
            return None
        found_there = self._store.get_sealed(verdicts.KIND, key)
        return verdicts.restored(found_there[1], found_there[0], rests_on, entry) if found_there else None

    def _material(self, entry: Entry) -> Json | None:
        content = self.digests.content(base_directory(entry))
        if content is None or self._device is None:
            return None
        circumstances = Circumstances(
            device=self._device,
            quick=self._quick,
            allow_pickle=self._config.allow_pickle,
            trust_remote_code=self._config.trust_remote_code,
        )
        return material(entry, content, circumstances)

    # --- keeping ---------------------------------------------------------------------------------------------------

    def keep(self, entry: Entry, line: Line) -> Line | None:
        """The line with its mark, kept; None while it is not known what it rests on."""
        rests_on = self._material(entry)
        if rests_on is None or not verdicts.can_be_kept(line.adapter) or not _is_there(entry):
            return None
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        reached = Reached(at=at, place=self._place, seconds=line.adapter.seconds)
        marked, document = verdicts.sealed(line, rests_on, reached, self._seal)
        if self._store is not None:
            self._store.put(verdicts.KIND, key_of(rests_on), document)
        return marked

    # --- the device ------------------------------------------------------------------------------------------------

    def device_chosen(self, event: DeviceChosen) -> None:
        """The worker has said what it merges on."""
        self.device, self.device_name = event.device, event.device_name
        self._device = "cpu" if event.device == "cpu" else event.device_name
        name = self._device_record()
        if self._store is not None and name is not None:
            self._store.put(_DEVICES, name, {"device": event.device, "name": event.device_name})

    def _know_device(self) -> bool:
        """Find out what would be merged on, by torch only where nothing else says it."""
        if self._wanted == "cpu" or (self._wanted == "auto" and not has_card()):
            self.device, self.device_name, self._device = "cpu", cpu_name(), "cpu"
            return True
        name = self._device_record()
        known = self._store.get(_DEVICES, name) if self._store is not None and name is not None else None
        if isinstance(known, dict) and isinstance(known.get("device"), str) and isinstance(known.get("name"), str):
            self.device_chosen(DeviceChosen(device=known["device"], device_name=known["name"]))
            return True

        def listen(event: Event) -> None:
            if isinstance(event, DeviceChosen):
                self.device_chosen(event)

        with WorkerProcess() as child:
            child.run(Job(groups=(), device=self._wanted), listen, is_overdue=lambda: False)
        return self._device is not None

    def _device_record(self) -> str | None:
        """The name of what is known of this machine's cards, until it starts anew; None on a CPU."""
        start = this_start()
        if start is None or (self._wanted in {"auto", "cpu"} and not has_card()):
            return None
        seen = [
            start,
            self._wanted,
            libraries()["torch"] or "",
            *(self._environ.get(one, "") for one in _CARD_VARIABLES),
        ]
        return hashlib.sha256("\0".join(seen).encode("utf-8", "surrogateescape")).hexdigest()


def base_directory(entry: Entry) -> str:
    """The directory of the base that an entry is merged into; of one that has a base, as all that are merged do."""
    if entry.base is None:
        raise AssertionError("an entry without a base is settled before it is looked for")
    return entry.base.directory


def _is_there(entry: Entry) -> bool:
    """Whether every file of the adapter is still the one that was hashed."""
    for member in entry.members:
        for file in member.files:
            try:
                if identity_of(file.path, os.stat(f"{member.directory}/{file.path}")) != file.identity:  # noqa: PTH116
                    return False
            except OSError:
                return False
    return True
