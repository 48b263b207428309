"""The keys of a base for how it is read, which are options of `merge-gate run`, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.records.features import WordKey
from merge_gate.records.terms import Access, Read

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
    "read": WordKey(
        Read,
        description="How much of the base is read: {}. With whole, every tensor is read and measured. With touched, "
        "only the tensors that adapters change are read. The figures of the others come from an earlier run with the "
        "same --cache that read the whole base. With auto, the gate does this if there is such a run, and the base is "
        "streamed, larger than the memory, or on a network mount. Default: auto.",
        meaning="read every tensor of a base (whole), or only the tensors that adapters touch (touched). The value "
        "touched needs the record of an earlier whole read in --cache. The value auto means touched for a base that is "
        "not memory-mapped (default: as in the config, or auto)",
    ),
}
"""By field of `BaseSpec`."""


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001
    """The files of its bases show whether a run needs streams."""
    return False
