"""The inputs of the benchmarks, made when they are first asked for and kept: bases, adapters, configs, commands.

In: a work directory, and the `Job` to be done. Out: argument lists that measure.py can run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from make_adapters import make_adapters
from make_base import make_base

HERE = Path(__file__).parent
PYTHON = sys.executable
GATE = str(Path(sys.executable).with_name("merge-gate"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be gated, and what the script does as well: so many adapters of a kind, on a base as it is loaded."""

    count: int = 1
    kind: str = "lora"
    quantization: str = "none"
    dtypes: tuple[str, ...] = ("auto",)
    combine: str | None = None

    @property
    def name(self) -> str:
        parts = (self.kind, str(self.count), self.quantization, *self.dtypes, self.combine or "")
        return "-".join(part for part in parts if part not in {"", "none", "auto"})


@dataclass(frozen=True, slots=True)
class Inputs:
    """One base and its adapters under a work directory."""

    work: Path
    size: str

    @property
    def base(self) -> Path:
        return make_base(self.size, self.work / f"base-{self.size}")

    def adapters(self, job: Job) -> list[Path]:
        beside = "" if job.kind == "lora" else f"-{job.kind}"
        return make_adapters(self.size, self.base, self.work / f"adapters-{self.size}{beside}", job.count, job.kind)

    def config(self, job: Job) -> Path:
        adapters = [{"path": str(path)} for path in self.adapters(job)]
        if job.combine is not None:
            names = [Path(one["path"]).name for one in adapters]
            weights = [1 / len(names)] * len(names)
            combine = {"method": job.combine, "adapters": names, "weights": weights, "density": 0.5}
            adapters.append({"name": COMBINED, "combine": combine})
        base = {"model": str(self.base), "quantization": job.quantization, "dtype": list(job.dtypes)}
        path = self.work / f"{self.size}-{job.name}.yml"
        path.write_text(json.dumps({"version": 1, "base": base, "adapters": adapters}, indent=1), encoding="utf-8")
        return path

    def report(self, job: Job) -> Path:
        return self.work / f"report-{self.size}-{job.name}"

    def gate(self, job: Job) -> list[str]:
        only = ["--only", COMBINED] if job.combine else []
        return [GATE, "run", str(self.config(job)), "--output", str(self.report(job)), *only]

    def check(self, job: Job) -> list[str]:
        return [GATE, "check", str(self.config(job))]

    def script(self, name: str, job: Job) -> list[str]:
        options = ["--quantization", job.quantization] if job.quantization != "none" else []
        options += ["--dtype", *job.dtypes] if job.dtypes != ("auto",) else []
        options += ["--combine", job.combine] if job.combine else []
        return [PYTHON, str(HERE / f"{name}.py"), str(self.base), *map(str, self.adapters(job)), *options]


COMBINED = "combined"
