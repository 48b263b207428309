"""What every run knows of publications: their options, when they are asked for, and the kinds of findings on models."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import foreign, size_bytes

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

KINDS = Path(__file__).with_name("kinds.csv")
NOT_PUBLISHED, EARLIER_MODEL, PUBLISHED_FILES = "not-published", "earlier-model", "published-files"
STOP_TOKENS, TOKENIZER_SIZE = "stop-tokens", "tokenizer-size"
_SIGN = (
    "merge-gate signs nothing and checks no signature; use `cosign attest-blob` or actions/attest, with "
    "merge-gate.json as the predicate, and `cosign verify-blob-attestation`"
)
GONE = dict.fromkeys(("attest", "--key", "--attestation", "--max-age"), _SIGN)


def add_options(run: argparse.ArgumentParser) -> None:
    published = run.add_argument_group("publish the merged models")
    published.add_argument(
        "--publish",
        type="name",
        metavar="DIR",
        help="write the merged model of each adapter that passes to DIR/NAME (default: as in the config)",
    )
    published.add_argument(
        "--max-shard-size",
        type=_size_argument,
        metavar="SIZE",
        help="the maximum size of the tensors in one file, such as 5GB (default: the same files as the base)",
    )


def _size_argument(text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{foreign(text)} is no size, expected one such as 5GB or 500MiB") from None


def configured(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration, in which the options replace what it says.

    Raises:
        UsageError: nothing is published, and there is a size for its files.
    """
    from merge_gate.records.config import PublishSpec

    wanted, directory, largest = config.publish, arguments.publish, arguments.max_shard_size
    if directory is not None:
        wanted = replace(wanted or PublishSpec(directory="", label=""), directory=directory, label=directory)
    if largest is not None and wanted is None:
        raise UsageError("--max-shard-size needs --publish", hint="add --publish DIR")
    return replace(config, publish=wanted and replace(wanted, max_shard_bytes=largest or wanted.max_shard_bytes))


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001 - `configured` has read them
    return config.publish is not None
