"""GGUF files of small models, as llama.cpp's converter writes them."""

from __future__ import annotations

import os
import struct
from types import MappingProxyType
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


def write_llama(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    kind: Type,
    embedding: Type,
    tokenizer: Mapping[str, Any] = MappingProxyType({"tokens": ["<s>", "a", "b"]}),
) -> None:
    """A Llama with its matrices in one type, the embedding and the head in another, and norms in float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    made = {}
    for name, values in tensors.items():
        stem, _, last = name.rpartition(".")
        used = embedding if "embed" in name or "lm_head" in name else kind
        made[f"{names.get_name(stem)}.{last}"] = converted(name, values, config), used
    write(path, "llama", made, keys_of(config), tokenizer)


def converted(name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of a Llama as llama.cpp's converter stores it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((permuted(values, count) for part, count in heads.items() if part in name), values)


def keys_of(config: Any) -> dict[str, float]:
    """The keys that llama.cpp's converter takes from a config."""
    return {
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[torch.Tensor, Type]],
    keys: Mapping[str, float],
    tokenizer: Mapping[str, Any] = MappingProxyType({"tokens": ["<s>", "a", "b"]}),
) -> None:
    """A file with these tensors and keys of a tokenizer. Vectors are in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
    for key, value in tokenizer.items():
        name = f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for name, (values, kind) in tensors.items():
        used = Type.F32 if values.dim() < 2 else kind
        writer.add_tensor(name, packed(values, used), raw_dtype=used)
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
