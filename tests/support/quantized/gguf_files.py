"""GGUF files of small models, as llama.cpp's converter writes them."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def packed(values: torch.Tensor, kind: Type) -> np.ndarray[Any, Any]:
    return gguf.quants.quantize(np.ascontiguousarray(values.float().numpy()), kind)


def roundtrip(values: torch.Tensor, kind: Type) -> torch.Tensor:
    """The values after they were quantized."""
    made = gguf.quants.dequantize(packed(values, kind), kind)
    return torch.from_numpy(np.ascontiguousarray(made)).reshape(values.shape)


def permuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in the order of llama.cpp."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.transpose(1, 2).reshape(values.shape)


def write_llama(path: Path, tensors: Mapping[str, torch.Tensor], config: Any, kind: Type, embedding: Type) -> None:
    """A Llama with its matrices in one type, the embedding and the head in another, and norms in float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b"])
    for name, values in tensors.items():
        stem, _, last = name.rpartition(".")
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)  # noqa: PLW2901
        used = Type.F32 if values.dim() < 2 else embedding if "embed" in name or "lm_head" in name else kind
        writer.add_tensor(f"{names.get_name(stem)}.{last}", packed(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def resize(path: Path, name: str, shape: tuple[int, ...], size_bytes: int) -> None:
    """Give the last tensor of a file another shape, and so many bytes, which take no space on the disk."""
    content = path.read_bytes()
    place = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    path.write_bytes(content[:place] + dimensions + content[place + len(dimensions) :])
    os.truncate(path, len(content) + size_bytes)
