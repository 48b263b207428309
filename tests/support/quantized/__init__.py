"""Quantized releases, right and wrong, for the tests of their verification."""
