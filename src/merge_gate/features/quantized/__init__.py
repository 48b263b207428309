"""Measures how much of an adapter is in a quantized release: GGUF, bitsandbytes, GPTQ, AWQ, FP8, and more."""
