"""The key of a verdict: one digest of everything that decides it, so the same key means the same verdict.

In: an `Entry`, the digests of its base, the device, and what the run trusts. Out: `material`, every value that the
verdict depends on as plain JSON, and `key_of`, its SHA-256.

The material lacks names that only the report shows (the adapter's name, its source, its line), so that an adapter may
move. It has names that findings mention (the base's label). It lacks time limits: they make `error`, which is not
stored.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import merge_gate
from merge_gate.records.config import Combine, Expect
from merge_gate.records.files import AdapterFiles, BaseContent, Entry
from merge_gate.records.report import SCHEMA_VERSION
from merge_gate.records.terms import QUANTIZED_BY
from merge_gate.report.formats import fields

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
        "members": [_files(member) for member in entry.members],
        "combine": _combine(spec.combine),
        "checks": [
            [setting.check, str(setting.severity), setting.limit, setting.error_limit, setting.of_base]
            for setting in spec.checks
        ],
        "expect": _expect(spec.expect),
    }


def _base(entry: Entry, content: BaseContent) -> Json:
    """`asked` is what `base-mismatch` compares: the last part of a path only, since a checkout may be anywhere."""
    spec, base = entry.spec.base, entry.base
    return {
        "weights": content.weights,
        "settings": content.settings,
        "dtype": entry.dtype,
        "quantization": str(spec.quantization),
        "label": fields.text(base.name) if base else None,
        "revision": base.revision if base else None,
        "asked": {
            "model": fields.text(spec.model.rstrip("/").rpartition("/")[2]) if spec.model is not None else None,
            "label": fields.text(spec.label) if spec.label is not None else None,
            "revision": spec.revision,
            "names": [fields.text(name) for name in spec.names],
        },
    }


def _files(adapter: AdapterFiles) -> Json:
    """What PEFT reads of an adapter, and what the preflight reports about it."""
    return {
        "files": [[fields.text(file.path), file.size_bytes, file.sha256] for file in adapter.files],
        "findings": fields.dump(adapter.findings),
    }


def _combine(combine: Combine | None) -> Json:
    if combine is None:
        return None
    return {
        "method": combine.method,
        "adapters": [fields.text(name) for name in combine.adapters],  # a refusal names them
        "weights": list(combine.weights),
        "density": combine.density,
        "sign": combine.majority_sign_method,
        "seed": combine.seed,
    }


def _expect(expect: Expect | None) -> Json:
    if expect is None:
        return None
    return asdict(expect) | {"sha256": [list(pair) for pair in expect.sha256]}  # also a key that is new


@cache
def libraries() -> dict[str, str | None]:
    """The versions that decide a verdict, with Python's and the kind of processor."""
    versions: dict[str, str | None] = {name: _version(name) for name in LIBRARIES}
    return versions | {"python": platform.python_version(), "machine": platform.machine()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_digest() -> str:
    """The digest of all code that decides a verdict: machines with different ones may disagree."""
    return key_of([own_code(), libraries()])


@cache
def own_code() -> str:
    """The digest of the gate's own source: two checkouts of one version can reach different verdicts."""
    root = Path(merge_gate.__file__).parent
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    lines = (f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
