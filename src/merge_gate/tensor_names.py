"""Names of tensors in an adapter's file: the base's module in them.

In: a name as PEFT saves it. Out: a name of the base. Knows PEFT's parts of names, and nothing of tensors.
"""

from __future__ import annotations

ADAPTER_PREFIX = "base_model.model."
"""What PEFT puts before the base's own names (peft/peft_model.py)."""

_PEFT_PARTS = ("lora_", "base_layer", "modules_to_save", "token_adapter", "original_module")


def module_of(name: str) -> str:
    """The base's module that a tensor of an adapter's file belongs to: what stands before PEFT's own parts."""
    parts = name.removeprefix(ADAPTER_PREFIX).split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(_PEFT_PARTS)), len(parts) - 1)
    return ".".join(parts[:cut])
