"""The inputs of the benchmarks, made when they are first asked for and kept: bases, adapters, configs, commands.

In: a work directory. Out: argument lists that measure.py can run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from make_adapters import make_adapters
from make_base import make_base

HERE = Path(__file__).parent
PYTHON = sys.executable
GATE = str(Path(sys.executable).with_name("merge-gate"))


@dataclass(frozen=True, slots=True)
class Inputs:
    """One base and its adapters under a work directory."""

    work: Path
    size: str

    @property
    def base(self) -> Path:
        return make_base(self.size, self.work / f"base-{self.size}")

    def adapters(self, count: int) -> list[Path]:
        return make_adapters(self.size, self.base, self.work / f"adapters-{self.size}", count)

    def config(self, count: int) -> Path:
        path = self.work / f"{self.size}-{count}.yml"
        lines = [f"version: 1\nbase: {{model: {self.base}}}\nadapters:", *(f"  - {a}" for a in self.adapters(count))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def report(self, count: int) -> Path:
        return self.work / f"report-{self.size}-{count}"

    def gate(self, count: int) -> list[str]:
        return [GATE, "run", str(self.config(count)), "--output", str(self.report(count))]

    def check(self, count: int) -> list[str]:
        return [GATE, "check", str(self.config(count))]

    def script(self, name: str, count: int) -> list[str]:
        return [PYTHON, str(HERE / f"{name}.py"), str(self.base), *map(str, self.adapters(count))]
