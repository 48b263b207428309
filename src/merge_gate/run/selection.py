"""The adapters of a run, and the directories that it reads.

In: a configuration, and names of adapters. Out: their entries, and the places that nothing may be written to.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import MOST_FOREIGN, listing, quoted
from merge_gate.files.preflight import base_of
from merge_gate.names.suggestions import nearest
from merge_gate.records.config import AdapterSpec, Config


def select(config: Config, only: tuple[str, ...]) -> tuple[AdapterSpec, ...]:
    """The adapters to gate.

    Raises:
        UsageError: a name that the config does not list.
    """
    known = {spec.name for spec in config.adapters}
    unknown = [name for name in only if name not in known]
    if unknown:
        hint = nearest(unknown[0], known) or f"it lists {listing(sorted(known), 20)}"
        if known.issuperset(several := unknown[0].replace(",", " ").split()):
            hint = f"one at a time: {' '.join(f'--only {shlex.quote(name)}' for name in several)}"
        raise UsageError(
            f"--only {quoted(unknown[0], MOST_FOREIGN, '')}: {config.label} lists no such adapter", hint=hint
        )
    return tuple(spec for spec in config.adapters if not only or spec.name in only)


def inputs_of(config: Config) -> Iterator[tuple[str, str]]:
    """The directories of adapters and bases, as far as they are known by now, each with what is in it."""
    for spec in config.adapters:
        if spec.path:
            yield spec.path, f"the adapter {quoted(spec.name, 200)}"
        if spec.base.model:
            yield spec.base.model, f"the base {quoted(spec.base.label or spec.base.model, 200)}"
        elif spec.path and (named := base_of(spec.path)):
            yield str(Path(config.directory, named)), f"the base {quoted(named, 200)}"
