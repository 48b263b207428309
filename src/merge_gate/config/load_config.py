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

from pydantic import Field, WrapValidator

from merge_gate._internal.text import listing, quoted
from merge_gate.config.build import build_config
from merge_gate.config.model import DATE, NEEDED, Digest, Model, Text, Version, or_hole
from merge_gate.config.problems import read_models
from merge_gate.config.yaml_document import Loc, YamlDocument, end_of, read_yaml, refuse
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
    except FileNotFoundError:
        if os.path.islink(path):  # noqa: PTH114 (as below)
            target = quoted(os.readlink(path), 200)  # noqa: PTH115 (as below)
            refuse(path, f"this is a broken symbolic link to {target}", "fix the link, or name the file", line=0)
        refuse(path, "no such file", _suggest_file(path), line=0)
    except IsADirectoryError:
        refuse(path, "this is a directory, expected a YAML file", _suggest_file(path), line=0)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        refuse(path, f"the file cannot be read: {reason}", "check its name and permissions")
    if len(raw) > MAX_BYTES:
        refuse(path, f"the file is larger than {MAX_BYTES:,} bytes", "check that this is the configuration")
    return raw


def _suggest_file(path: str) -> str:
    """Name the YAML file that the user may have meant, or the YAML files of the directory."""
    is_directory = os.path.isdir(path)  # noqa: PTH112 (False where pathlib raises, such as a name too long)
    directory, asked = (Path(path), "") if is_directory else (Path(path).parent, Path(path).name)
    try:
        names = sorted(file.name for file in directory.iterdir() if file.suffix in {".yml", ".yaml"})
    except PermissionError:
        return f"{quoted(str(directory))} may not be read"
    except OSError:
        return f"the directory {quoted(str(directory))} does not exist"
    contents = listing(map(quoted, names)) or "no YAML file"
    return nearest(asked, names) or f"{quoted(str(directory))} holds {contents}"


def _text(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        refuse(path, f"byte 0x{error.object[error.start]:02x} is not UTF-8", "save the file as UTF-8", *end_of(before))


# --- the baseline ----------------------------------------------------------------------------------------------------


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
    """Validate the values of a baseline. Each entry names exactly one adapter: failures are accepted one by one.

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
