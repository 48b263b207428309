"""The header of a safetensors file by its path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.files.headers import open_regular, parse_file

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.files import StoredTensor


def header_of(path: Path) -> tuple[StoredTensor, ...]:
    with open_regular(str(path)) as file:
        return parse_file(file)
