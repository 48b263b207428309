"""The time of `merge-gate verify`, against `sha256sum` of the same bytes plus `merge-gate run` of the same adapter.

    python benchmarks/verify.py --size tiny|1.1b|7b [--repeat 3] [--work DIR] [--memory]

In: a size of make_base.py. Out: a table on standard output. The finished model is made by hand, tensor by tensor, so
that it needs no memory: the base's files, with W + delta in float32, rounded once. `verify` then has to merge twice,
because PEFT's usual order of rounding gives other bits. `exact` is the same with PEFT's usual order, as
`merge-gate run --publish` writes it. `--memory` also runs each `verify` in a cgroup (limited.py, as root), and prints
its peak of anonymous and shared memory. `--repeat 0` measures no time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import limited
import torch
from make_adapters import make_adapters
from make_base import make_base
from measure import alternate
from safetensors import safe_open
from safetensors.torch import save_file

ORDERS = ("exact", "once")
RATIO, LIMIT_GIB = 1.5, 1.5


def merge(base: Path, adapter: Path, out: Path, *, order: str) -> None:
    """The base's shards, one at a time, with the adapter in them."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
        names = set(factors.keys())

        def delta(name: str) -> torch.Tensor | None:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" not in names:
                return None
            a, b = (factors.get_tensor(f"{stem}.lora_{part}.weight").float() for part in "AB")
            return (b @ a) * (config["lora_alpha"] / config["r"])

        out.mkdir(parents=True, exist_ok=True)
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, out)
                continue
            with safe_open(file, "pt") as shard:
                tensors = {}
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    weight, added = shard.get_tensor(name), delta(name)
                    if added is not None and order == "exact":
                        weight = weight + added.to(weight.dtype)
                    elif added is not None:
                        weight = (weight.float() + added).to(weight.dtype)
                    tensors[name] = weight
            save_file(tensors, out / file.name, {"format": "pt"})


def main() -> None:
    """Make the inputs once, and alternate the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/merge-gate-verify"))
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    base = make_base(asked.size, asked.work / asked.size / "base")
    (adapter,) = make_adapters(asked.size, base, asked.work / asked.size / "adapters", 1)
    gate = [sys.executable, "-P", "-m", "merge_gate"]
    reports = asked.work / "reports"
    commands = {"run": [*gate, "run", str(adapter), "--base", str(base), "-o", str(reports / "run")]}
    for order in ORDERS:
        out = asked.work / asked.size / order
        if not out.exists():
            merge(base, adapter, out, order=order)
        files = [str(file) for file in sorted(out.glob("*.safetensors"))]
        commands[f"sha256sum {order}"] = ["sha256sum", *files]
        words = [str(out), "--base", str(base), "--adapter", str(adapter), "-o", str(reports / order)]
        commands[f"verify {order}"] = [*gate, "verify", *words]
    if asked.repeat:
        show(alternate(commands, repeat=asked.repeat))
    for order in ORDERS if asked.memory else ():
        held = limited.run(commands[f"verify {order}"])
        print(f"verify {order}: peak memory of the cgroup {held.peak_bytes / (1 << 30):.2f} GiB, wanted {LIMIT_GIB}")


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    """Print the figures of each command, and the ratios."""
    for name, figures in found.items():
        print(name, json.dumps(figures))
    for order in ORDERS:
        wanted = found["run"]["wall_s"] + found[f"sha256sum {order}"]["wall_s"]
        print(f"verify {order}: {found[f'verify {order}']['wall_s'] / wanted:.2f} of run + sha256sum, wanted {RATIO}")


if __name__ == "__main__":
    main()
