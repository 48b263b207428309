"""Finds the base's module in the name of a tensor, as PEFT saves it in an adapter's file."""

from __future__ import annotations

ADAPTER_PREFIX = "base_model.model."
"""The prefix that PEFT puts before the base's own names (peft/peft_model.py)."""

_PEFT_PARTS = ("lora_", "base_layer", "modules_to_save", "token_adapter", "original_module")


def module_of(name: str) -> str:
    """The base's module that a tensor of an adapter's file belongs to: its name without PEFT's parts."""
    parts = name.removeprefix(ADAPTER_PREFIX).split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(_PEFT_PARTS)), len(parts) - 1)
    return ".".join(parts[:cut])
