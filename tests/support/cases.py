"""The cases of `tests.support.faults` on disk: adapters, the configuration that lists them, and what a run gave."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from tests.support.faults import Case
    from tests.support.models import Shelf


@dataclass(frozen=True)
class Judged:
    """What the gate said of every case, by name, and the digests of all its input files before and after."""

    reports: Mapping[str, AdapterReport]
    bases: tuple[BaseReport, ...]
    before: Mapping[str, str]
    after: Mapping[str, str]
    adapters_directory: Path


def told(report: AdapterReport) -> str:
    """What the report says, for the message of a failing assertion."""
    findings = "\n".join(f"  {f.severity} {f.check} ({f.origin}, {f.tensor}): {f.message}" for f in report.findings)
    return f"{report.name}: {report.verdict}, cause {report.cause}\n{findings}"


def top_settings(case: Case) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(case.top.items()))


def lay_out(case: Case, shelf: Shelf, directory: Path) -> None:
    """A private copy of the healthy adapter, broken as the case says."""
    shutil.copytree(shelf.adapter(case.variant), directory)
    if case.break_ is not None:
        case.break_(directory)


def entry_for(case: Case, shelf: Shelf) -> dict[str, Any]:
    """The adapter's entry of the config; `...` takes a key away."""
    from tests.support.models import VARIANTS  # noqa: PLC0415

    entry: dict[str, Any] = {"name": case.name, "path": f"./{case.name}"}
    base = {"model": str(shelf.base(case.base or VARIANTS[case.variant].base)), "dtype": case.dtype}
    entry["base"] = base | dict(case.entry.get("base", {}))
    entry["base"] = {key: value for key, value in entry["base"].items() if value is not ...}
    return entry | {key: value for key, value in case.entry.items() if key != "base"}


def write_config_file(shelf: Shelf, root: Path, number: int, top: dict[str, Any], cases: list[Case]) -> Path:
    """JSON is YAML, and needs no quoting rules of our own."""
    path = root / f"gate-{number}.yml"
    config = {"version": 1, "adapters": [entry_for(case, shelf) for case in cases]} | top
    path.write_text(json.dumps(config, indent=2))
    return path


def gated(root: Path, adapters: list[dict[str, Any]], **top: Any) -> Report:
    """The report of a run over these entries on the CPU, in this process."""
    from merge_gate.config.load_config import load_config  # noqa: PLC0415
    from merge_gate.records.options import RunOptions  # noqa: PLC0415
    from merge_gate.run.flow import run_gate  # noqa: PLC0415

    path = root / "gate.yml"
    path.write_text(json.dumps({"version": 1, "adapters": adapters} | top))
    return run_gate(load_config(str(path)), RunOptions(device="cpu"))


def digests(*roots: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
