"""The options of one run, as the command line gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from merge_gate.records.terms import record


@record
class RunOptions:
    """What a run is asked for, next to its configuration.

    Attributes:
        device: The requested device: `auto`, `cpu`, `cuda`, or `cuda:N`.
        output: The directory that the reports go to; None writes none.
        only: Names of adapters; empty for all in the configuration.
        lost_adapters: Pairs of an adapter that is not merged, and why: the machines that tried to were lost.
        is_plan: Whether the run stops before it merges, and writes nothing (`--plan`).
        features: The options of the command line by their names. Each feature reads its own.
    """

    device: str = "auto"
    output: str | None = None
    only: tuple[str, ...] = ()
    lost_adapters: tuple[tuple[str, str], ...] = ()
    is_plan: bool = False
    features: Mapping[str, Any] = field(default_factory=dict)


def is_device(text: str) -> bool:
    """Whether a text is a value of `RunOptions.device`."""
    name, _, index = text.partition(":")
    return text in {"auto", "cpu", "cuda"} or (name == "cuda" and index.isascii() and index.isdecimal())
