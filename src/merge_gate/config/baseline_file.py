"""The baseline's YAML file → known failures, strict; every problem keeps its line and column.

In: a document of that file. Out: `KnownFailure`s, or a `ConfigError` with all problems in the order of the file. An
entry is of one adapter: there are no patterns, so that what is not finite is accepted one by one.
"""

from __future__ import annotations

import datetime as dt
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, WrapValidator

from merge_gate.config.model import DATE, NEEDED, Digest, Model, Text, Version, or_hole
from merge_gate.config.problems import read_models
from merge_gate.config.suggestions import nearest
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import KnownFailure
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


def build_baseline(document: YamlDocument) -> tuple[KnownFailure, ...]:
    """Validate the values of a baseline.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    file = read_models(document, BaselineFile)
    known: dict[tuple[str, str], KnownFailure] = {}
    for index, entry in enumerate(file.accept or []):
        loc: Loc = ("accept", index)
        if not (entry and entry.adapter and entry.cause and entry.until):
            continue
        for check in (entry.cause, *(one for one in entry.also or [] if one)):
            if check not in CHECKS:
                document.report(loc, f"there is no check {quoted(check)}", partial(nearest, check, CHECKS), key="cause")
        try:
            until = dt.date.fromisoformat(entry.until)
        except ValueError:
            document.report((*loc, "until"), f"{quoted(entry.until)} is no day", "write a day such as 2026-12-31")
            continue
        one = entry.record(KnownFailure, until=until, line=document.there(loc).line)
        if (first := known.setdefault((one.adapter, one.cause), one)) is not one:
            document.report(loc, "this adapter and cause are accepted already", f"first in line {first.line}")
    document.raise_problems()
    return tuple(known.values())
