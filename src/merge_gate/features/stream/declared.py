"""The key of a base for how it is read, which is an option of `merge-gate run`, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.records.features import WordKey
from merge_gate.records.terms import Access

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

BASE_KEYS = {
    "access": WordKey(
        Access,
        description="How the weights of a base on the Hub are read: {}. With download, they go into the Hub's cache. "
        "With stream, they are read by ranges and never written to disk. With auto, they are streamed if they do not "
        "fit on the disk. Default: auto.",
        meaning="how to read the weights of a base on the Hub: download them, stream them without using the disk, or "
        "stream them only if the disk is too small (auto) (default: as in the config, or auto)",
    ),
}
"""By field of `BaseSpec`."""

_WHOLE = "every run reads all of the base; remove it"
GONE, GONE_KEYS = {"--read": _WHOLE}, {"read": _WHOLE}


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001
    """The files of its bases show whether a run needs streams."""
    return False
