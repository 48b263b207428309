"""Sizes as people write them: `5GB`, `500 MiB`. It imports the standard library only: the command line uses it."""

from __future__ import annotations

import re

SIZE = r"^[1-9]\d{0,11}(\.\d{1,3})? ?(KB|MB|GB|TB|KiB|MiB|GiB|TiB)$"

_FACTORS = {"K": 1, "M": 2, "G": 3, "T": 4}


def size_bytes(text: str) -> int:
    """The size in bytes. KB is 1,000 bytes, as in transformers, and KiB is 1,024.

    Raises:
        ValueError: the text is no size.
    """
    if not re.fullmatch(SIZE, text, re.ASCII):
        raise ValueError(text)
    number, letter, is_binary = re.fullmatch(r"([\d.]+) ?([KMGT])(i?)B", text, re.ASCII).groups()  # type: ignore[union-attr] # it matched above
    return int(float(number) * (1024 if is_binary else 1000) ** _FACTORS[letter])
