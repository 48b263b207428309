"""The options of `merge-gate run` for how bases are read."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.terms import Access, Read

if TYPE_CHECKING:
    from merge_gate.records.config import Config


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--access",
        choices=[access.value for access in Access],
        help="how to read the weights of a base on the Hub: download them, stream them without using the disk, or "
        "stream them only if the disk is too small (auto) (default: as in the config, or auto)",
    )
    run.add_argument(
        "--read",
        choices=[read.value for read in Read],
        help="read every tensor of a base (whole), or only the tensors that adapters touch (touched). The value "
        "touched needs the record of an earlier whole read in --cache. The value auto means touched for a base that is "
        "not memory-mapped (default: as in the config, or auto)",
    )


def configured(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration, in which the options replace what it says."""
    if not (arguments.access or arguments.read):
        return config
    specs = []
    for spec in config.adapters:
        access, read = Access(arguments.access or spec.base.access), Read(arguments.read or spec.base.read)
        specs.append(replace(spec, base=replace(spec.base, access=access, read=read)))
    return replace(config, adapters=tuple(specs))
