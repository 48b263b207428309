"""Bases made of safetensors files without torch, and what is written of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

SHARDS = ["steps", "embed.weight", "norm.weight", "layer.weight", "mtp.weight"]
_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}


def lay_base(directory: Path, files: Mapping[str, Shapes]) -> dict[str, bytes]:
    """Write weight files with random values, and return the bytes of each tensor."""
    dice = random.Random(0)
    tensors: dict[str, bytes] = {}
    for name, shapes in files.items():
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        data = b""
        for tensor, (dtype, shape) in shapes.items():
            size = _BYTES[dtype]
            for factor in shape:
                size *= factor
            tensors[tensor] = dice.randbytes(size)
            entries[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
            data += tensors[tensor]
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        (directory / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
    (directory / "config.json").write_text("{}")
    return tensors


def lay_shards(directory: Path) -> dict[str, bytes]:
    """A base of two shards with an index, one tensor of which transformers would not load."""
    files: dict[str, Shapes] = {
        "model-00001-of-00002.safetensors": {
            "steps": ("I64", (3,)),
            "embed.weight": ("BF16", (10, 4)),
            "norm.weight": ("BF16", (5,)),
        },
        "model-00002-of-00002.safetensors": {"layer.weight": ("BF16", (4, 4)), "mtp.weight": ("BF16", (4, 4))},
    }
    tensors = lay_base(directory, files)
    listed = {tensor: file for file, shapes in files.items() for tensor in shapes}
    total = sum(map(len, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
