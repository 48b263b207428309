"""The options of one run, as the command line gives them."""

from __future__ import annotations

from merge_gate.records.terms import Access, Read, record


@record
class RunOptions:
    """What a run is asked for, next to its configuration.

    Attributes:
        device: The requested device: `auto`, `cpu`, `cuda`, or `cuda:N`.
        output: The directory that the reports go to; None writes none.
        only: Names of adapters; empty for all in the configuration.
        shard: (I, N), the I-th of N parts of the run; None for all of it.
        given_up: Pairs of an adapter that is not merged, and why: the machines that tried to were lost.
        access: How the weights of bases on the Hub are read (`--access`); None reads them as the configuration says.
        read: How much of the bases is read (`--read`); None reads as much as the configuration says.
        publish: The directory for the merged models of adapters that pass (`--publish`); None as the configuration has
            it.
        max_shard_bytes: The most bytes of tensors in a published file (`--max-shard-size`); None as the configuration
            says, or as the base's files are.
        cache: The directory in which verdicts are stored and found (`--cache`); None for none.
        refresh: Whether it is only written to (`--refresh`).
        is_plan: Whether the run stops before it merges, and writes nothing (`--plan`).
    """

    device: str = "auto"
    output: str | None = None
    only: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    given_up: tuple[tuple[str, str], ...] = ()
    access: Access | None = None
    read: Read | None = None
    publish: str | None = None
    max_shard_bytes: int | None = None
    cache: str | None = None
    refresh: bool = False
    is_plan: bool = False


def is_device(text: str) -> bool:
    """Whether a text is a value of `RunOptions.device`."""
    name, _, index = text.partition(":")
    return text in {"auto", "cpu", "cuda"} or (name == "cuda" and index.isascii() and index.isdecimal())
