"""Validates a baseline file: a YAML document in, `BaselineEntry`s or a `ConfigError` with all problems out.

Each entry names exactly one adapter. Patterns are not allowed, so that failures are accepted one by one.
"""

from __future__ import annotations

import datetime as dt
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, WrapValidator

from merge_gate.config.model import DATE, NEEDED, Digest, Model, Text, Version, or_hole
from merge_gate.config.problems import read_models
from merge_gate.judging.checks.table import CHECKS
from merge_gate.names.suggestions import nearest
from merge_gate.records.terms import Acceptance, BaselineEntry
from merge_gate.text import quoted

if TYPE_CHECKING:
    from merge_gate.config.yaml_document import Loc, YamlDocument


class AcceptEntry(Model):
    """One known failure."""

    adapter: Digest = NEEDED
    cause: Text = NEEDED
    also: list[Text] | None = None
    reason: Text = NEEDED
    owner: Text = NEEDED
    until: Annotated[str, Field(pattern=DATE)] = NEEDED


Accept = Annotated[AcceptEntry, WrapValidator(or_hole)]


class BaselineFile(Model):
    """Known failures of a fleet."""

    version: Version = NEEDED
    accept: list[Accept] = NEEDED


def build_baseline(document: YamlDocument) -> tuple[BaselineEntry, ...]:
    """Validate the values of a baseline.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    file = read_models(document, BaselineFile)
    known: dict[tuple[str, str], BaselineEntry] = {}
    for index, entry in enumerate(file.accept or []):
        loc: Loc = ("accept", index)
        if not (entry and entry.adapter and entry.cause and entry.until):
            continue
        for check in (entry.cause, *filter(None, entry.also or [])):
            if check not in CHECKS:
                document.report(loc, f"unknown check {quoted(check)}", partial(nearest, check, CHECKS), key="cause")
        try:
            until = dt.date.fromisoformat(entry.until)
        except ValueError:
            document.report((*loc, "until"), f"{quoted(entry.until)} is not a date", "write a date such as 2026-12-31")
            continue
        line = document.value_at(loc).line
        known_failure = entry.record(BaselineEntry, until=until.isoformat(), outcome=Acceptance.UNMATCHED, line=line)
        if (first := known.setdefault((entry.adapter, entry.cause), known_failure)) is not known_failure:
            document.report(loc, "this adapter and cause are already accepted", f"first in line {first.line}")
    document.raise_problems()
    return tuple(known.values())
