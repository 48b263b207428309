"""The tensors of an adapter's own file.

In: what the preflight read. Out: tensors by their names, memory-mapped where the file is safetensors, or `Refused`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from merge_gate.errors import Refused
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Refusal
from merge_gate.records.terms import Origin
from merge_gate.text import quoted


def read_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Read every tensor of the file; what else a pickle may hold is left out.

    Raises:
        Refused: the restricted unpickler refuses the file (`file-corrupt`).
    """
    if files.weights is None:
        return {}
    path = Path(files.directory) / files.weights
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors: not tensors only, or not a pickle
        raise Refused(_unreadable_pickle(error)) from error
    items = state.items() if isinstance(state, dict) else ()
    return {name: tensor for name, tensor in items if isinstance(tensor, torch.Tensor)}


def _unreadable_pickle(error: Exception) -> Refusal:
    foreign = re.search(r"GLOBAL (\S+)", str(error))  # what the preflight leaves to torch, which has no list of it
    what = f"torch refuses {quoted(foreign[1])} in them" if foreign else type(error).__name__
    return Refusal(
        check="file-corrupt",
        message=f"the pickled weights are damaged, or hold something else than tensors ({what})",
        hint="do not load this file; ask who made it, and have the adapter saved as safetensors",
        origin=Origin.FILE,
    )
