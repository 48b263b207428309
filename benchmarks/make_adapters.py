"""Write N LoRA adapters (r = 16, all linear layers) for a base of make_base.py, in PEFT's own file names and keys.

In: the base's size, a directory, N, and the kind: `lora`, `dora`, or `head`, LoRA beside a trained `lm_head`. Out:
adapter-0000, adapter-0001, … with adapter_config.json and adapter_model.safetensors (float32, as PEFT saves what it
trained). lora_B is not zero: every merge changes its weight.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from make_base import SIZES, linear_shapes
from safetensors.torch import save_file

RANK = 16
KINDS = ("lora", "dora", "head")
WEIGHT_STD = 0.02
"""Of the weights of make_base.py: the length of a row, DoRA's magnitude, follows from it."""


def adapter_config(base: Path, kind: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": kind == "dora",
        "modules_to_save": ["lm_head"] if kind == "head" else None,
        "target_modules": [name.split(".")[-1] for name in linear_shapes(SIZES["tiny"])],
    }


def factors(size: dict[str, int], seed: int, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for index in range(size["layers"]):
        for name, (rows, columns) in linear_shapes(size).items():
            prefix = f"base_model.model.model.layers.{index}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
            if kind == "dora":
                length = WEIGHT_STD * columns**0.5
                noise = 1 + torch.randn(rows, generator=generator) * 0.02
                tensors[f"{prefix}.lora_magnitude_vector"] = noise * length
    if kind == "head":
        head = torch.randn(size["vocab"], size["hidden"], generator=generator) * WEIGHT_STD
        tensors["base_model.model.lm_head.weight"] = head.bfloat16()
    return tensors


def make_adapters(size: str, base: Path, directory: Path, count: int, kind: str = "lora") -> list[Path]:
    """Write those adapters that are not there yet. The config comes last and marks an adapter as complete."""
    paths = [directory / f"adapter-{number:04d}" for number in range(count)]
    for seed, path in enumerate(paths):
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        save_file(factors(SIZES[size], seed, kind), path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(adapter_config(base, kind), indent=2), encoding="utf-8")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("base", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--kind", choices=KINDS, default="lora")
    arguments = parser.parse_args()
    made = make_adapters(arguments.size, arguments.base, arguments.directory, arguments.count, arguments.kind)
    print(*made, sep="\n")
