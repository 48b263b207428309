"""One fleet on a CPU and on a card, by the real command, side by side.

In: a fleet and where it is written. Out: `Outcome`, with all that differs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.card import compare
from tests.support.card.fleets import Chosen, Fleet
from tests.support.command import Answer, environment, merge_gate, strict_json

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What `--device` names, and the variables of a process that has it. A real card has its own numbers."""

    name: str
    environment: Mapping[str, str]
    is_real: bool = False


CPU = Device(name="cpu", environment={})


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run: the command's answer, its report, and where it published."""

    answer: Answer
    report: Mapping[str, Any]
    published: Path

    def verdicts(self) -> dict[str, tuple[str, str | None]]:
        return {entry["name"]: (entry["verdict"], entry["cause"]) for entry in self.report["adapters"]}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A fleet on both devices."""

    fleet: str
    adapters: int
    differences: list[compare.Difference]

    def count(self, *kinds: str) -> int:
        """How many adapters and bases have a difference of these kinds."""
        return len({difference.name for difference in self.differences if difference.kind in kinds})


def judge(config: Path, device: Device, *, publishes: bool = False) -> Run:
    """Run the gate on one configuration."""
    output = config.with_suffix(f".{device.name.replace(':', '-')}")
    publish = ("--publish", output / "published") if publishes else ()
    answer = merge_gate(
        "run", config, "--device", device.name, "--output", output, *publish, cwd=config.parent, **device.environment
    )
    assert (output / "report.json").exists(), answer.said
    return Run(answer=answer, report=strict_json(output / "report.json"), published=output / "published")


def judge_on_both(config: Path, card: Device, *, publishes: bool = False) -> tuple[Run, Run]:
    """The same configuration on the CPU and on a card."""
    with ThreadPoolExecutor(2) as pool:
        cpu, on_card = pool.map(lambda device: judge(config, device, publishes=publishes), (CPU, card))
    assert on_card.report["environment"]["device"].startswith("cuda"), on_card.answer.said
    return cpu, on_card


def run_fleet(fleet: Fleet, directory: Path, chosen: Chosen, card: Device) -> Outcome:
    """Write a fleet, judge it on both devices, and compare the reports, and published models with PEFT's own merges.

    A simulated card has to publish the CPU's bits, too.
    """
    adapters, differences = 0, []
    for config in fleet.write(directory, chosen):
        cpu, on_card = judge_on_both(config, card, publishes=fleet.publishes)
        adapters += len(cpu.report["adapters"])
        differences += compare.of_reports(cpu.report, on_card.report, is_real=card.is_real)
        if fleet.publishes and not card.is_real:
            differences += compare.of_published(cpu.published, on_card.published)
        if fleet.publishes:
            differences += of_pefts_merges(config, on_card.published, card)
    return Outcome(fleet=fleet.name, adapters=adapters, differences=differences)


def of_pefts_merges(config: Path, published: Path, device: Device) -> list[compare.Difference]:
    """Tensors of published models that are not what PEFT's own merge on the same device gives."""
    words = [sys.executable, "-m", "tests.support.card.peft_merges", config, published, device.name]
    env = environment(**device.environment)
    env["PYTHONPATH"] = os.pathsep.join([*env.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]).lstrip(os.pathsep)
    answer = subprocess.run([*map(str, words)], env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return [
        compare.Difference(name, f"bits of {tensor}", "PEFT's", "others")
        for name, tensors in json.loads(answer.stdout).items()
        for tensor in tensors
    ]
