"""Merge LoRA and other PEFT adapters into a scratch copy of their base and prove every parameter finite."""

__version__ = "0.1.0"
