"""Figures of whole bases that earlier runs measured, so that a later run reads only the tensors that adapters touch.

In: the digests of a base, and how it is loaded. Out: a `BaseRecord` for each model class that an earlier run measured,
or none. A record has a seal like a verdict, and applies only to the same bytes, code, and versions.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_gate.cache.key import FORMAT, key_of, libraries, own_code
from merge_gate.records.measured import BaseRecord, RecordedRun
from merge_gate.report.formats.fields import UnreadableError, dump, load

if TYPE_CHECKING:
    from merge_gate.cache.store import Store
    from merge_gate.records.files import BaseContent
    from merge_gate.records.terms import BaseKey

Json = Any

KIND = "base-records"
MOST_CLASSES = 16
"""A base is measured as one or two classes. A document does not grow beyond this number."""


class BaseRecords:
    """The records of one cache directory. With `fresh`, they are only written.

    `place` names this run. A run that trusts more (pickles, a base's own code) has records of its own: `trusts`.
    """

    def __init__(self, store: Store, place: str, *, fresh: bool = False, trusts: tuple[str, ...] = ()) -> None:
        self._store, self._place, self._fresh, self._trusts = store, place, fresh, trusts

    def lookup(self, base: BaseKey, content: BaseContent) -> tuple[BaseRecord, ...]:
        """What earlier runs measured of a base of this content, loaded in this dtype."""
        if self._fresh:
            return ()
        rests_on = _material(base, content, self._trusts)
        return _from_document(self._store.get(KIND, key_of(rests_on)), rests_on)

    def store(self, base: BaseKey, content: BaseContent, found: BaseRecord) -> None:
        """Add a record of this run, in place of an earlier one of the same class and head."""
        rests_on = _material(base, content, self._trusts)
        key = key_of(rests_on)
        others = [
            one for one in _from_document(self._store.get(KIND, key), rests_on) if one.model_class != found.model_class
        ]
        run = RecordedRun(at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), place=self._place)
        records = [replace(found, run=run), *others][:MOST_CLASSES]
        self._store.put(KIND, key, {"material": rests_on, "records": dump(tuple(records))})


def _material(base: BaseKey, content: BaseContent, trusts: tuple[str, ...]) -> Json:
    """Everything that the figures depend on. The base's name is not part of it: a base may move."""
    return {
        "format": FORMAT,
        "gate": own_code(),
        "libraries": libraries(),
        "weights": content.weights,
        "settings": content.settings,
        "dtype": base.dtype,
        "quantization": base.quantization,
        "trusts": list(trusts),
    }


def _from_document(document: Json, material: Json) -> tuple[BaseRecord, ...]:
    try:
        if not isinstance(document, dict) or document.get("material") != material:
            return ()
        found: tuple[BaseRecord, ...] = load(tuple[BaseRecord, ...], document.get("records"), "records")
    except (UnreadableError, RecursionError):
        return ()
    return tuple(one for one in found if one.run is not None and one.is_plausible)
