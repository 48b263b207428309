"""The key of a configuration for forward passes, which is an option of `merge-gate run`, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.records.features import WordKey
from merge_gate.records.terms import ForwardMode

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

FILE_KEYS = {
    "forward": WordKey(
        ForwardMode,
        description="Whether base and adapter are run on made-up inputs: {}. With auto, they are run if activations "
        "can leave the dtype, and the base is read whole and not streamed. With required, they are run in each dtype, "
        "and an adapter whose model was not run is not judged. Default: auto.",
        meaning="run base and adapter on made-up inputs, and check what their modules return: if activations can leave "
        "the dtype (auto), never (off), or judge no adapter without it (required) (default: as in the config, or auto)",
    )
}
"""By field of `AdapterSpec`."""


def is_requested(config: Config, _options: RunOptions) -> bool:
    """Whether a model may run."""
    return any(spec.forward is not ForwardMode.OFF for spec in config.adapters)
