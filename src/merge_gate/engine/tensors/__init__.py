"""Tensors by themselves: measured, dequantized, cast, moved. Imports no PEFT and no model."""
