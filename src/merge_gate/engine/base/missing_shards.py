"""A base of which transformers would load something else than its own tensors.

In: a loaded model, and the names that its files lack. Out: nothing, or an error. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from merge_gate.errors import EngineError


def refuse_strangers(model: Any, made_up: AbstractSet[str], label: str) -> None:
    """Transformers makes up whatever the files lack, and adds an adapter that lies beside them.

    Raises:
        EngineError: no tensor of the class is in the files, or an adapter lies in the base's directory.
    """
    if made_up and {name for name, _ in model.named_parameters()} <= made_up:
        raise EngineError(
            f"base {label} holds none of the tensors of {type(model).__name__}: transformers would make up all of them",
            hint="name the base that the adapter was trained on: this one has another class (text and images, where "
            "the adapter is for text alone), or other names in its files",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EngineError(
            f"base {label} has an adapter_config.json beside its weights: transformers loads that adapter with it",
            hint="take adapter_config.json out of the base's directory, or name the plain base",
            check="base-inconsistent",
        )
