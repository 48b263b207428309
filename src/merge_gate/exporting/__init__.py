"""Exports an adapter as a plain LoRA that every server applies the same way."""
