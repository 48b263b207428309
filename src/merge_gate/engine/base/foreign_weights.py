"""Refuses a base if transformers would load something other than the base's own tensors.

In: a loaded model, and the names that its files lack. Out: nothing, or an error. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from merge_gate.records.refusals import Undecidable


def refuse_foreign_weights(model: Any, missing: AbstractSet[str], label: str) -> None:
    """Refuse what transformers accepts: it initializes missing tensors, and loads an adapter from the base's directory.

    Raises:
        Undecidable: the files have no tensor of the class, or an adapter is in the base's directory.
    """
    if missing and {name for name, _ in model.named_parameters()} <= missing:
        raise Undecidable("base_of_another_class", base=label, class_name=type(model).__name__)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Undecidable("adapter_next_to_base", base=label)
