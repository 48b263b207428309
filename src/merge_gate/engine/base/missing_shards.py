"""A base of which transformers would load something else than its own tensors.

In: a loaded model, and the names that its files lack. Out: nothing, or an error. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from merge_gate.errors import Undecidable
from merge_gate.records.refusals import AdapterNextToBase, BaseOfAnotherClass


def refuse_strangers(model: Any, made_up: AbstractSet[str], label: str) -> None:
    """Transformers makes up whatever the files lack, and adds an adapter that lies beside them.

    Raises:
        Undecidable: no tensor of the class is in the files, or an adapter lies in the base's directory.
    """
    if made_up and {name for name, _ in model.named_parameters()} <= made_up:
        raise Undecidable(BaseOfAnotherClass(base=label, class_name=type(model).__name__))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Undecidable(AdapterNextToBase(base=label))
