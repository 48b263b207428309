"""One fleet on a CPU and on a card, by the real command, side by side.

In: a fleet and where it is written. Out: `Outcome`, with all that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.card import compare
from tests.support.card.fleets import Chosen, Fleet
from tests.support.command import Answer, merge_gate, strict_json


@dataclass(frozen=True, kw_only=True)
class Device:
    """What `--device` names, and the variables of a process that has it."""

    name: str
    environment: Mapping[str, str]


CPU = Device(name="cpu", environment={})


@dataclass(frozen=True, kw_only=True)
class Judged:
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


def judge(config: Path, device: Device, *, publishes: bool = False, words: tuple[str, ...] = ()) -> Judged:
    """Run the gate on one configuration."""
    output = config.with_suffix(f".{device.name.replace(':', '-')}")
    publish = ("--publish", output / "published") if publishes else ()
    answer = merge_gate(
        "run",
        config,
        "--device",
        device.name,
        "--output",
        output,
        *publish,
        *words,
        cwd=config.parent,
        **device.environment,
    )
    assert (output / "report.json").exists(), answer.said
    return Judged(answer=answer, report=strict_json(output / "report.json"), published=output / "published")


def judge_on_both(config: Path, card: Device, *, publishes: bool = False) -> tuple[Judged, Judged]:
    """The same configuration on the CPU and on a card."""
    with ThreadPoolExecutor(2) as pool:
        cpu, on_card = pool.map(lambda device: judge(config, device, publishes=publishes), (CPU, card))
    asked = "cuda:0" if card.name == "cuda" else card.name
    assert on_card.report["environment"]["device"] in {asked, card.name}, on_card.answer.said
    return cpu, on_card


def run_fleet(fleet: Fleet, directory: Path, chosen: Chosen, card: Device) -> Outcome:
    """Write a fleet, judge it on both devices, and compare."""
    adapters, differences = 0, []
    for config in fleet.write(directory, chosen):
        cpu, on_card = judge_on_both(config, card, publishes=fleet.publishes)
        adapters += len(cpu.report["adapters"])
        differences += compare.of_reports(cpu.report, on_card.report)
        if fleet.publishes:
            differences += compare.of_published(cpu.published, on_card.published)
    return Outcome(fleet=fleet.name, adapters=adapters, differences=differences)
