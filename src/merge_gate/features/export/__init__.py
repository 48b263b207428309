"""Exports an adapter as a plain LoRA, in the form that servers apply alike."""
