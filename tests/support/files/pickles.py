"""Pickled weights, and a pickle that calls a function."""

from __future__ import annotations

import io
import zipfile
from typing import Any


def packed(pickled: bytes) -> bytes:
    """A file of torch.save whose data.pkl is another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name in range(2):
            archive.writestr(f"archive/data/{name}", bytes(4 * 12))
    return buffer.getvalue()


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced
