"""Estimates what an adapter and its base cost, from names and sizes on disk: the same on every machine.

In: a configuration and its adapters. Out: a `Cost` for each. It reads sizes, and the base's name in
adapter_config.json. Files on the Hub count as size 0, because one machine may have them in its cache and another not.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_gate.files.identity import base_bytes
from merge_gate.files.json_object import read_as_transformers
from merge_gate.limits.time_limit import ANSWER_LIMIT_S, within
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import CONFIG_NAME
from merge_gate.records.terms import record

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
    """The costs of one config's entries."""

    def __init__(self, config: Config) -> None:
        self._home = Path(config.directory)
        self._specs = {spec.name: spec for spec in config.adapters}
        self._bases: dict[str, int] = {}

    def of(self, spec: AdapterSpec) -> Cost:
        """A merge reads the weights of the base and of the adapter, once for each dtype."""
        members = [self._specs[name] for name in spec.combine.adapters] if spec.combine is not None else [spec]
        model = spec.base.model or _named_base(members[0], self._home)
        base_bytes = self._base_bytes(model) if model and Path(model).is_absolute() else 0
        own_bytes = sum(_weight_bytes(member.path) for member in members if member.path)
        dtypes = len(spec.base.dtypes)
        return Cost(
            base=(self._name(model), spec.base.revision or ""),
            read_bytes=dtypes * (LOAD_BYTES + base_bytes),
            merge_bytes=dtypes * (MERGE_BYTES + base_bytes + own_bytes),
        )

    def _name(self, model: str) -> str:
        """A directory, relative to the configuration: a checkout may be elsewhere on another machine."""
        return os.path.relpath(model, self._home) if Path(model).is_absolute() else model

    def _base_bytes(self, directory: str) -> int:
        if directory not in self._bases:
            self._bases[directory] = base_bytes(directory) or 0
        return self._bases[directory]


def _named_base(spec: AdapterSpec, home: Path) -> str:
    """The base that adapter_config.json names, resolved as in `files/resolve.py`; empty if it names none."""
    named = _read_base_name(spec.path) if spec.path else ""
    try:
        return str(home / named) if named and within(ANSWER_LIMIT_S, (home / named).is_dir) else named
    except (OSError, ValueError):  # a mount that does not answer, or a name that no file system allows
        return named


def _read_base_name(directory: str) -> str:
    config = read_as_transformers(Path(directory, CONFIG_NAME), _LONGEST_CONFIG_BYTES) or {}
    named = config.get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


def _weight_bytes(directory: str) -> int:
    """The size of the weights alone, because other files may differ from machine to machine."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name.startswith("adapter_model."))
    except OSError:
        return 0
