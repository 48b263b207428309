"""The tensors of an adapter's own file.

In: what the preflight read. Out: tensors by their names, memory-mapped if the file is safetensors, or `Refused`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from merge_gate.engine.base.loaded_base import first_line
from merge_gate.records.files import AdapterFiles
from merge_gate.records.refusals import Refused

_USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def read_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Read every tensor of the file; what else a pickle may hold is left out.

    Raises:
        Refused: the restricted unpickler refuses the file, or torch has no numbers of a tensor (`file-corrupt`).
    """
    if files.weights is None:
        return {}
    tensors = _tensors(Path(files.directory) / files.weights)
    for name, tensor in tensors.items():
        _refuse_unreadable(name, tensor)
    return tensors


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:  # the preflight has read the header: this torch lacks the dtype
            raise Refused("tensor_unreadable", text=first_line(error)) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors: not tensors only, or not a pickle
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # what the preflight leaves to torch, which has no list of it
        names = foreign[1] if foreign else None
        raise Refused("pickle_unreadable", error=type(error).__name__, names=names) from error
    items = state.items() if isinstance(state, dict) else ()
    return {name: tensor for name, tensor in items if isinstance(tensor, torch.Tensor)}


def _refuse_unreadable(name: str, tensor: torch.Tensor) -> None:
    """What PEFT cannot copy into a parameter: no values (meta device), quantized, or less than a byte each."""
    if (tensor.dtype in _USUAL and not tensor.is_meta) or tensor.layout is not torch.strided:
        return
    some = tensor.flatten()[:1]
    try:
        torch.zeros(some.shape).copy_(some)
    except (RuntimeError, NotImplementedError) as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise Refused("tensor_unreadable", name=name, is_meta=tensor.is_meta, dtype=dtype) from error
