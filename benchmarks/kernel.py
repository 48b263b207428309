"""The merge alone, without files and start-up: the gate's blocks on every road, PEFT's own layers, and a floor.

In: a size. Out: one JSON object of seconds per adapter on stdout. The floor is one read of the touched weights
(`aminmax`) plus the low-rank product, both in cache-sized blocks and on all cores. All run in turn in one process, and
the least time of each counts. PEFT's merges are timed on the layers of one block of the model and scaled up.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from make_adapters import RANK
from make_base import SIZES, Pool, linear_shapes
from peft import LoraConfig
from peft.tuners.lora import bnb, layer

from merge_gate.engine.blocks.block_merge import measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.tensors.threads import Buffers, spread, threads

Layers = list[Any]
ROADS = {"lora": False, "dora": True, "8bit": False, "8bit_dora": True, "4bit": False, "4bit_dora": True}
"""Which of them have a magnitude."""


def tuner_layer(road: str, weight: torch.Tensor) -> Any:
    """A target module as PEFT wraps it, without the rest of the model."""
    rows, columns = weight.shape
    if road.startswith("8bit"):
        base: Any = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, device="meta")
        base.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        wrapped = bnb.Linear8bitLt
    elif road.startswith("4bit"):
        base = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", device="meta")
        base.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base)
        wrapped = bnb.Linear4bit
    else:
        base = torch.nn.Linear(columns, rows, bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        wrapped = layer.Linear
    config = LoraConfig(r=RANK, use_dora=ROADS[road], init_lora_weights=False)
    made = wrapped(base.to("cpu"), "default", config, r=RANK, lora_alpha=2 * RANK)
    for side in (made.lora_A, made.lora_B, made.lora_magnitude_vector):
        side.to(torch.float32)
    for side in (made.lora_A, made.lora_B):
        side["default"].weight.data.normal_(std=0.02)
    return made


def layers_of(road: str, weights: list[torch.Tensor]) -> Layers:
    return [tuner_layer(road, weight) for weight in weights]


def update_of(made: Any) -> LowRankUpdate:
    lora_a, lora_b = (side["default"].weight.data for side in (made.lora_A, made.lora_B))
    magnitude = made.lora_magnitude_vector["default"].weight.data if made.lora_magnitude_vector else None
    return LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=made.scaling["default"], magnitude=magnitude)


class PerThread(threading.local):
    """Each thread's buffers."""

    def __init__(self) -> None:
        self.buffers = Buffers()


PER_THREAD = PerThread()


def by_blocks(made: Any) -> None:
    """Every element merged and measured."""
    weight = made.get_base_layer().weight
    scales = getattr(weight, "SCB", None)
    measure_merge(merged_blocks(weight, update_of(made), PER_THREAD.buffers, row_scales=scales))


def by_sample(made: Any) -> None:
    """What estimates of rounding cost beside that."""
    weight = made.get_base_layer().weight
    rows = merged_blocks(weight, update_of(made), PER_THREAD.buffers).sampled()
    measure_merge(rows, figures=True)


def read_and_multiply(made: Any) -> None:
    """The floor."""
    weight, update, buffers = made.get_base_layer().weight.data, update_of(made), PER_THREAD.buffers
    for rows in buffers.blocks(*weight.shape, weight.device):
        product = buffers.take("product", weight[rows], torch.float32)
        torch.mm(update.lora_b[rows], update.lora_a, out=product)
        torch.aminmax(weight[rows])


def on_all_cores(function: Callable[[Any], None], layers: Layers) -> float:
    start = time.perf_counter()
    for _ in spread(function, layers):
        pass
    return time.perf_counter() - start


def by_peft(layers: Layers) -> float:
    """safe_merge and the check of the result that the script makes. The merged weight is thrown away."""
    start = time.perf_counter()
    for made in layers:
        base = made.get_base_layer()
        parameter, data = base.weight, base.weight.data
        made.merge(safe_merge=True)
        if base.weight.dtype.is_floating_point:
            torch.isfinite(base.weight).all()
        parameter.data = data
        if hasattr(parameter, "bnb_quantized"):  # PEFT marks the old one, and bitsandbytes would quantise it again
            parameter.bnb_quantized = True
        base.weight = parameter
        made.merged_adapters.clear()
    return time.perf_counter() - start


def least(work: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """The least seconds of each, all run in turn `repeat` times, after one turn that nobody counts (proofs, pages)."""
    turns = [{name: run() for name, run in work.items()} for _ in range(repeat + 1)]
    return {name: min(turn[name] for turn in turns[1:]) for name in work}


def main(size: dict[str, int], repeat: int) -> dict[str, float]:
    torch.set_num_threads(threads())
    warnings.filterwarnings("ignore", "Merge lora module to .-bit linear")
    pool, shapes = Pool(), list(linear_shapes(size).values())
    weights = [pool.tensor(*shape) for _ in range(size["layers"]) for shape in shapes]
    found: dict[str, float] = {}
    for road in ROADS:
        layers = layers_of(road, weights)
        few = layers_of(road, weights[: len(shapes)])
        scale = len(layers) / len(few)
        work: dict[str, Callable[[], float]] = {
            f"{road}_blocks_s": lambda made=layers: on_all_cores(by_blocks, made),
            f"{road}_peft_s": lambda made=few, scale=scale: by_peft(made) * scale,
        }
        if road == "lora":
            work["floor_s"] = lambda made=layers: on_all_cores(read_and_multiply, made)
            work["sample_s"] = lambda made=layers: on_all_cores(by_sample, made)
        found.update(least(work, repeat))
    return {
        **found,
        "touched_parameters": sum(weight.numel() for weight in weights),
        "modules": len(weights),
        "repeat": repeat,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = json.dumps(main(SIZES[arguments.size], arguments.repeat), indent=1)
    if arguments.out:
        arguments.out.write_text(result, encoding="utf-8")
    print(result)
