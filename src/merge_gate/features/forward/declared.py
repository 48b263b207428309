"""The option of `merge-gate run` for forward passes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.terms import ForwardMode

if TYPE_CHECKING:
    from merge_gate.records.config import Config


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--forward",
        choices=[mode.value for mode in ForwardMode],
        help="run base and adapter on made-up inputs, and check what their modules return: if activations can leave "
        "the dtype (auto), never (off), or judge no adapter without it (required) (default: as in the config, or auto)",
    )


def configured(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration, in which the option replaces what it says."""
    if arguments.forward is None:
        return config
    mode = ForwardMode(arguments.forward)
    return replace(config, adapters=tuple(replace(spec, forward=mode) for spec in config.adapters))
