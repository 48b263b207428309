"""What the gate reads of a base before a worker gets it (files/base_files.py)."""

from dataclasses import replace
from pathlib import Path

from merge_gate.files.base_files import loaded_files, read_base
from merge_gate.files.headers import open_regular, parse_file
from merge_gate.records.files import BaseFiles, StoredTensor


def base_files(directory: Path | str) -> BaseFiles:
    """As the preflight of a run reads it."""
    return read_base(str(directory), name="base", allow_pickle=True)


def stored_tensors(directory: Path | str) -> tuple[StoredTensor, ...]:
    """The headers alone, also of a base that the preflight would refuse."""
    found: list[StoredTensor] = []
    for file in loaded_files(str(directory)).files:
        if file.endswith(".safetensors"):
            with open_regular(str(Path(directory, file))) as opened:
                found += (replace(one, file=file) for one in parse_file(opened))
    return tuple(found)
