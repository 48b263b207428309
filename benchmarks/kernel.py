"""The merge alone, without files and start-up: the gate's bound and sample, its blocks, PEFT's own layer, and a floor.

In: a size. Out: one JSON object of seconds per adapter on stdout. The floor is one read of the touched weights
(`aminmax`) plus the low-rank product, both in cache-sized blocks and on all cores: nothing that merges every element
can be faster. All run in turn in one process, and the least time of each counts.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from make_adapters import RANK
from make_base import SIZES, Pool, linear_shapes
from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from merge_gate.engine.lowrank import Scratch, delta_norm_sq, merge_measured, merge_sample, merged_bound
from merge_gate.engine.threads import spread, threads

LAYERS_OF_PEFT = 4
"""PEFT's merge is timed on so many layers and scaled up: it is the same work for each of them."""


def lora_layers(size: dict[str, int]) -> list[Linear]:
    """The model's target modules as PEFT wraps them, without the rest of the model."""
    pool, layers = Pool(), []
    for _ in range(size["layers"]):
        for rows, columns in linear_shapes(size).values():
            base = torch.nn.Linear(columns, rows, bias=False, device="meta")
            base.weight = torch.nn.Parameter(pool.tensor(rows, columns), requires_grad=False)
            layer = Linear(base, "default", LoraConfig(r=RANK), r=RANK, lora_alpha=2 * RANK)
            for side in (layer.lora_A, layer.lora_B):
                side.to(torch.float32)["default"].weight.data.normal_(std=0.02)
            layers.append(layer)
    return layers


class Buffers(threading.local):
    """Each thread's scratch."""

    def __init__(self) -> None:
        self.scratch = Scratch()


def parts(layer: Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    factors = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
    return layer.get_base_layer().weight.detach(), *factors


def by_bound(layers: list[Linear]) -> None:
    """What the gate does with an adapter whose values are nowhere near the limit."""
    buffers = Buffers()

    def settle(layer: Linear) -> None:
        weight, lora_a, lora_b = parts(layer)
        merged_bound(1.0, lora_a, lora_b, 2.0, weight.dtype)
        merge_sample(weight, lora_a, lora_b, 2.0, scratch=buffers.scratch)
        delta_norm_sq(lora_a, lora_b, 2.0)

    for _ in spread(settle, layers):
        pass


def by_blocks(layers: list[Linear]) -> None:
    """What it does with the others, and with --exhaustive."""
    buffers = Buffers()
    for _ in spread(lambda layer: merge_measured(*parts(layer), 2.0, scratch=buffers.scratch, figures=False), layers):
        pass


def by_peft(layers: list[Linear]) -> None:
    """safe_merge and the check of the result that baselines (a) and (b) make. The merged weight is thrown away."""
    for layer in layers:
        kept = layer.get_base_layer().weight.data
        layer.merge(safe_merge=True)
        torch.isfinite(layer.get_base_layer().weight).all()
        layer.get_base_layer().weight.data = kept
        layer.merged_adapters.clear()


def floor(layers: list[Linear]) -> None:
    buffers = Buffers()

    def read_and_multiply(layer: Linear) -> None:
        weight, lora_a, lora_b = parts(layer)
        scratch = buffers.scratch
        for rows in scratch.blocks(*weight.shape, weight.device):
            torch.mm(lora_b[rows], lora_a, out=scratch.take("product", weight[rows], lora_a.dtype))
            torch.aminmax(weight[rows])

    for _ in spread(read_and_multiply, layers):
        pass


def seconds(function: Callable[[list[Linear]], None], layers: list[Linear]) -> float:
    start = time.perf_counter()
    function(layers)
    return time.perf_counter() - start


def main(size: dict[str, int], repeat: int) -> dict[str, float]:
    torch.set_num_threads(threads())
    layers = lora_layers(size)
    few = layers[: LAYERS_OF_PEFT * len(linear_shapes(size))]
    by_blocks(layers)  # proves the shapes: once per process, not once per adapter
    times: dict[str, list[float]] = {"bound_s": [], "blocks_s": [], "floor_s": [], "peft_s": []}
    for _ in range(repeat):
        times["bound_s"].append(seconds(by_bound, layers))
        times["blocks_s"].append(seconds(by_blocks, layers))
        times["floor_s"].append(seconds(floor, layers))
        times["peft_s"].append(seconds(by_peft, few) * len(layers) / len(few))
    least = {name: min(found) for name, found in times.items()}
    return {
        **least,
        "touched_parameters": sum(layer.get_base_layer().weight.numel() for layer in layers),
        "modules": len(layers),
        "repeat": repeat,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = json.dumps(main(SIZES[arguments.size], arguments.repeat), indent=1)
    if arguments.out:
        arguments.out.write_text(found, encoding="utf-8")
    print(found)
