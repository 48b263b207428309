"""How much of an adapter is in a quantized release."""
