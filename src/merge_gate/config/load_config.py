"""Reads a YAML file into a `Config`, or raises a `ConfigError` with all problems, each with its line and column.

It looks at names of directories, never into them, and uses no network and no torch. It imports pydantic, which is slow,
so commands import this module only when they need it.

The stages, in order:

1. bytes → text (size, encoding)                                    here
2. text → values with places; problems of YAML itself               `yaml_document`
3. values → types, unknown keys, ranges                             `model`, `problems`
4. names, directories, globs, defaults: what types cannot express   `build`, `paths`

A baseline goes through the same stages. Problems of stage 3 do not stop stage 4: the valid parts are
built, so that all problems are reported at once.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from merge_gate._internal.text import quoted
from merge_gate.config.build import build_config
from merge_gate.config.model import DATE, OR_NONE, Digest, Model, Text, Version
from merge_gate.config.paths import suggest_name
from merge_gate.config.problems import read_models
from merge_gate.config.yaml_document import KEY, Loc, YamlDocument, end_of, read_yaml, refuse
from merge_gate.judging.checks.table import CHECKS
from merge_gate.names.suggestions import nearest
from merge_gate.records.config import Config
from merge_gate.records.terms import Acceptance, BaselineEntry

MAX_BYTES = 1024 * 1024


def load_config(path: str, *, output: str | None = None, policy: str | None = None) -> Config:
    """Read and validate a configuration.

    Args:
        path: the YAML file, as the user named it; relative paths in it are relative to its directory.
        output: the output directory of the run, which globs skip.
        policy: the name of a policy, instead of the file's.

    Raises:
        ConfigError: the file cannot be read or is not valid; holds every problem, in the order of the file.
    """
    raw = _read_bytes(path)  # 1
    document = read_yaml(_text(raw, path), path)  # 2
    digest, directory = hashlib.sha256(raw).hexdigest(), Path(path).absolute().parent
    config = build_config(document, digest, path=path, directory=directory, output=output, policy=policy)  # 3 and 4
    if config.baseline_path is None:
        return config
    baseline = _text(_read_bytes(config.baseline_path), config.baseline_path)
    return replace(config, baseline=build_baseline(read_yaml(baseline, config.baseline_path)))


def _read_bytes(path: str) -> bytes:
    try:
        if Path(path).is_fifo():  # reading it would wait for a writer
            refuse(path, "this is a named pipe, expected a YAML file", "write the configuration to a file", line=0)
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        refuse(path, f"the file cannot be read: {reason}", _suggest_file(path), line=0)
    if len(raw) > MAX_BYTES:
        refuse(path, f"the file is larger than {MAX_BYTES:,} bytes", "check that this is the configuration")
    return raw


def _suggest_file(path: str) -> str:
    """Name the YAML file that the user may have meant, or the YAML files of the directory."""
    if os.path.islink(path):  # noqa: PTH114 (False where pathlib raises, such as a name too long)
        return f"fix the symbolic link to {quoted(os.readlink(path), 200)}"  # noqa: PTH115 (as above)
    place, written = (Path(path), "") if os.path.isdir(path) else (Path(path).parent, Path(path).name)  # noqa: PTH112 (as above)
    return suggest_name(place, written, "YAML file", lambda entry: entry.name.endswith((".yml", ".yaml")))


def _text(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        refuse(path, f"byte 0x{error.object[error.start]:02x} is not UTF-8", "save the file as UTF-8", *end_of(before))


# --- the baseline ----------------------------------------------------------------------------------------------------


class AcceptEntry(Model):
    """One known failure."""

    adapter: Digest
    cause: Text
    also: list[Text] | None = None
    reason: Text
    owner: Text
    until: Annotated[str, Field(pattern=DATE)]
    base: Digest | None = None
    dtype: Text | None = None
    quantization: Text | None = None


Accept = Annotated[AcceptEntry, OR_NONE]


class BaselineFile(Model):
    """Known failures of a fleet."""

    version: Version
    accept: list[Accept]


def build_baseline(document: YamlDocument) -> tuple[BaselineEntry, ...]:
    """Validate the values of a baseline. Each entry names exactly one adapter: failures are accepted one by one.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    file = read_models(document, BaselineFile)
    known: dict[tuple[str | None, ...], BaselineEntry] = {}
    for index, entry in enumerate(file.accept or []):
        loc: Loc = ("accept", index)
        if not (entry and entry.adapter and entry.cause and entry.until):
            continue
        for check in (entry.cause, *(entry.also or [])):
            if check not in CHECKS:
                hint = partial(nearest, check, CHECKS)
                document.report((*loc, "cause", KEY), f"unknown check {quoted(check)}", hint)
        try:
            until = dt.date.fromisoformat(entry.until)
        except ValueError:
            document.report((*loc, "until"), f"{quoted(entry.until)} is not a date", "write a date such as 2026-12-31")
            continue
        where = (entry.base, entry.dtype, entry.quantization)
        if any(where) and not all(where):
            message = 'an entry has "base", "dtype", and "quantization", or none of them'
            document.report(loc, message, "`merge-gate report baseline` writes all three")
        line, _ = document.place(loc)
        known_failure = entry.record(BaselineEntry, until=until.isoformat(), outcome=Acceptance.UNMATCHED, line=line)
        if (first := known.setdefault((entry.adapter, entry.cause, *where), known_failure)) is not known_failure:
            document.report(loc, "this adapter and cause are already accepted", f"first in line {first.line}")
    document.raise_problems()
    return tuple(known.values())
