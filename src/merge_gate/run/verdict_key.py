"""The key of a verdict: one digest of everything that decides it, so the same key means the same verdict.

In: an `Entry`, the digests of its base, the device, and what the run trusts. Out: `material`, every value that the
verdict depends on as plain JSON, and `key_of`, its SHA-256.

The material lacks names that only the report shows (the adapter's name, its source, its line), so that an adapter may
move. It has names that findings mention (the base's label). It lacks time limits: they make `error`, which has no key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import merge_gate
from merge_gate.files.identity import identity_of
from merge_gate.records.files import BaseContent, Entry
from merge_gate.records.report import SCHEMA_VERSION, AdapterReport, Judged
from merge_gate.records.terms import QUANTIZED_BY, Verdict
from merge_gate.report.formats import fields
from merge_gate.worker.protocol import DeviceChosen

FORMAT = 1
"""Raise it when the same material could mean another verdict."""

LIBRARIES = (
    "torch", "transformers", "peft", *dict.fromkeys(QUANTIZED_BY.values()), "accelerate", "safetensors", "numpy",
    "huggingface_hub",
)  # fmt: skip
"""Every package whose code takes part in a load, a merge, or a measurement."""

Json = Any

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(material: Json) -> str:
    """The digest of a material, hex."""
    return hashlib.sha256(canonical(material)).hexdigest()


def canonical(value: Json) -> bytes:
    """JSON in the one form that is hashed."""
    return _CANONICAL.encode(value).encode()


def material_of_run(trusts: tuple[str, ...]) -> dict[str, Json]:
    """What all results of a run depend on. `trusts` has what the configuration allows (`Config.trusts`)."""
    return {"format": FORMAT, "gate": own_code(), "libraries": libraries(), "trusts": list(trusts)}


def material(entry: Entry, base: BaseContent, device: str, trusts: tuple[str, ...]) -> Json:
    """Everything that the verdict on an entry depends on. `device` is `cpu` or the name of the card."""
    spec = entry.spec
    return material_of_run(trusts) | {
        "schema": SCHEMA_VERSION,
        "version": merge_gate.__version__,
        "device": device,
        "base": _base(entry, base),
        "members": [
            # what PEFT reads of an adapter, and what the preflight reports about it
            {
                "files": [[fields.text(file.path), file.size_bytes, file.sha256] for file in member.files],
                "findings": fields.dump(member.findings),
                "named_base": _plain(member.named_base),
            }
            for member in entry.members
        ],
        "combine": _plain(spec.combine),  # with names, because a refusal names its adapters
        "checks": _plain(spec.checks),
        "expect": _plain(spec.expect),
        "forward": [str(spec.forward), entry.no_forward],
    }


def device_name(device: DeviceChosen) -> str:
    """The device in a material: any processor gives the same verdict."""
    return "cpu" if device.device == "cpu" else device.device_name


def _base(entry: Entry, content: BaseContent) -> Json:
    """`asked` is what `base-mismatch` compares: the last part of a path only, since a checkout may be anywhere."""
    spec, base = entry.spec.base, entry.base
    return {
        "weights": content.weights,
        "settings": content.settings,
        "dtype": entry.dtype,
        "quantization": str(spec.quantization),
        "label": _plain(base.name) if base else None,
        "revision": base.revision if base else None,
        "asked": {
            "model": _plain(spec.model and spec.model.rstrip("/").rpartition("/")[2]),
            "label": _plain(spec.label),
            "revision": spec.revision,
            "names": _plain(spec.names),
        },
    }


def _plain(value: Any) -> Json:
    """Records, tuples, and texts as JSON: with every field, so that a new one counts too."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclass_fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return fields.text(value) if isinstance(value, str) else value


@cache
def libraries(names: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """The versions that decide a verdict, with Python's and the kind of processor."""
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions | {"python": platform.python_version(), "machine": platform.machine()}


def versions_digest() -> str:
    """The digest of all code that decides a verdict. Machines with different digests may disagree."""
    return key_of([own_code(), libraries()])


@cache
def own_code() -> str:
    """The digest of the gate's own source: two checkouts of one version can reach different verdicts."""
    root = Path(merge_gate.__file__).parent
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    lines = (f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- the key in a report ---------------------------------------------------------------------------------------------

PLACE_VARIABLE = "MERGE_GATE_PLACE"
"""The action sets it, because its gate sees no variable of the runner."""
LONGEST_PLACE = 200
_CI_RUNS = (
    ("GITHUB_REPOSITORY", "GITHUB_RUN_ID"),
    ("CI_PROJECT_PATH", "CI_JOB_ID"),
    ("JOB_NAME", "BUILD_NUMBER"),
)
"""Variables that name a project and a run of it: GitHub's (and Gitea's), GitLab's, Jenkins'."""


def keyed(
    entry: Entry, report: AdapterReport, base: BaseContent, device: str, trusts: tuple[str, ...]
) -> tuple[AdapterReport, Json] | None:
    """The report of a verdict that was reached now and here, with its key, and the material of the key.

    None if no other run may reuse the verdict.
    """
    if not may_have_key(report) or not is_unchanged(entry):
        return None
    rests_on = material(entry, base, device, trusts)
    at, place = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), current_place(os.environ, platform.node())
    judged = Judged(key=key_of(rests_on), at=at, place=place, seconds=report.seconds)
    return replace(report, judged=judged), rests_on


def may_have_key(adapter: AdapterReport) -> bool:
    """Whether another run would reach the same verdict. `error` is about one run."""
    return adapter.verdict is not Verdict.ERROR and math.isfinite(adapter.seconds)


def current_place(environ: Mapping[str, str], machine: str) -> str:
    """The CI run (`acme/adapters run 123`), or the name of the machine. It contains no local path."""
    if environ.get(PLACE_VARIABLE):
        return environ[PLACE_VARIABLE][:LONGEST_PLACE]
    for project, run in _CI_RUNS:
        if environ.get(project) and environ.get(run):
            return f"{environ[project]} run {environ[run]}"[:LONGEST_PLACE]
    return machine[:LONGEST_PLACE] or "unknown"


def is_unchanged(entry: Entry) -> bool:
    """Whether every file of the adapter is still the file that was hashed."""
    for member in entry.members:
        for file in member.files:
            try:
                if identity_of(file.path, os.stat(f"{member.directory}/{file.path}")) != file.identity:  # noqa: PTH116
                    return False
            except OSError:
                return False
    return True
