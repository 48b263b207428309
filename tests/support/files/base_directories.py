"""Bases as files, written without torch: safetensors by names, dtypes and shapes, an index, and a config.json.

In: what a base should hold. Out: its files. Values are one byte repeated: only names and shapes matter.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_gate.files.headers import DTYPE_BITS

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.up_proj"
Shape = tuple[str, tuple[int, ...]]
PLAIN: dict[str, Shape] = {
    "model.embed_tokens.weight": ("BF16", (8, 4)),
    f"{LAYER}.weight": ("BF16", (8, 4)),
    "model.norm.weight": ("F32", (4,)),
    "lm_head.weight": ("BF16", (8, 4)),
}
GPTQ = {"weight": None, "qweight": ("I32", (1, 8)), "scales": ("F16", (1, 8)), "g_idx": ("I32", (4,))}
"""Parts of one layer, for `plus`."""


def safetensors(tensors: Mapping[str, Shape], fill: bytes = b"\0") -> bytes:
    """A file of these tensors, all bytes of it `fill`."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + fill * end


def index(**files: list[str]) -> bytes:
    """An index; a file's name has `__` for each dot."""
    listed = {name: file.replace("__", ".") for file, names in files.items() for name in names}
    return json.dumps({"metadata": {}, "weight_map": listed}).encode()


def lay(directory: Path, files: Mapping[str, bytes], **config: Any) -> Path:
    for name, content in {"config.json": json.dumps({"model_type": "llama"} | config).encode(), **files}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def plus(**parts: Shape | None) -> dict[str, Shape]:
    """The plain base with other tensors in one layer: `weight__absmax` is its `weight.absmax`; None takes one away."""
    changed: dict[str, Shape | None] = {f"{LAYER}.{name.replace('__', '.')}": part for name, part in parts.items()}
    return {name: part for name, part in (PLAIN | changed).items() if part is not None}
