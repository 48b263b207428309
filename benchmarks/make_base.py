"""Write a Llama-shaped base with pseudo-random weights, shard by shard: never more than one shard in memory.

In: a size and a directory. Out: config.json, *.safetensors and their index, as `save_pretrained` would lay them out.
The values come from one pool of 16 Mi normal numbers, read at another offset for every tensor: as large as real
weights, and made in seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "pico": {"hidden": 64, "inter": 128, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 256},
    "tiny": {"hidden": 256, "inter": 704, "layers": 4, "heads": 8, "kv_heads": 2, "vocab": 1024},
    "0.1b": {"hidden": 768, "inter": 2048, "layers": 12, "heads": 12, "kv_heads": 12, "vocab": 16000},
    "1.1b": {"hidden": 2048, "inter": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000},
    "7b": {"hidden": 4096, "inter": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8b": {"hidden": 4096, "inter": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "70b": {"hidden": 8192, "inter": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocab": 128256},
    "70b-slice": {"hidden": 8192, "inter": 28672, "layers": 4, "heads": 64, "kv_heads": 8, "vocab": 1024},
    "8b-slice": {"hidden": 4096, "inter": 14336, "layers": 6, "heads": 32, "kv_heads": 8, "vocab": 8192},
}
"""TinyLlama 1.1B, Llama 2 7B, Llama 3 8B and 70B by their published dimensions; `0.1b` is for the table of methods,
`tiny` for smoke runs, `pico` for many adapters. A slice has some layers of a model: its peak of memory in less time."""

SHARD_LAYERS = 4
POOL_ELEMENTS = 1 << 24


def config(size: dict[str, int]) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": size["hidden"],
        "intermediate_size": size["inter"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "vocab_size": size["vocab"],
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def linear_shapes(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Module name inside a layer → (out, in)."""
    hidden, inter = size["hidden"], size["inter"]
    kv = hidden * size["kv_heads"] // size["heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }


class Pool:
    """Tensors of any shape out of one buffer of normal numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._numbers = (torch.randn(POOL_ELEMENTS, generator=generator) * 0.02).bfloat16()
        self._offset = 0

    def tensor(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        self._offset = (self._offset + 7919) % POOL_ELEMENTS
        repeats = -(-count // POOL_ELEMENTS)
        return self._numbers.roll(self._offset).repeat(repeats)[:count].view(shape)


def layer(pool: Pool, size: dict[str, int], index: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}"
    tensors = {f"{prefix}.{name}.weight": pool.tensor(*shape) for name, shape in linear_shapes(size).items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(size["hidden"], dtype=torch.bfloat16)
    return tensors


def shards(pool: Pool, size: dict[str, int]):
    yield {
        "model.embed_tokens.weight": pool.tensor(size["vocab"], size["hidden"]),
        "model.norm.weight": torch.ones(size["hidden"], dtype=torch.bfloat16),
        "lm_head.weight": pool.tensor(size["vocab"], size["hidden"]),
    }
    for start in range(0, size["layers"], SHARD_LAYERS):
        shard: dict[str, torch.Tensor] = {}
        for index in range(start, min(start + SHARD_LAYERS, size["layers"])):
            shard |= layer(pool, size, index)
        yield shard


def make_base(name: str, directory: Path) -> Path:
    """Write the base, unless the directory holds it already. The index comes last and marks it as complete."""
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        return directory
    size = SIZES[name]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(size), indent=2), encoding="utf-8")
    count = 1 + -(-size["layers"] // SHARD_LAYERS)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards(Pool(), size), start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    index_file.write_text(json.dumps(index, indent=1), encoding="utf-8")
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    print(make_base(arguments.size, arguments.directory))
