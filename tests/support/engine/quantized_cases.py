"""Adapters on bases that bitsandbytes quantized, and what plain PEFT makes of each."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from merge_gate.records.terms import Quantization
from tests.support import methods
from tests.support.gating import Bench

BASE = "llama-bias"
ON_LOADING = ("bnb-8bit", "bnb-4bit")
AS_STORED = ("fp4", "nf4-double")
QUANTIZATIONS = (*ON_LOADING, *AS_STORED)
Q = ["q_proj"]


def _case(name: str, kind: str, **kwargs: Any) -> methods.Case:
    return methods.make_case(name, BASE, kind, target_modules=Q, **kwargs)


CASES = (
    _case("lora", "LoraConfig", r=2),
    _case("lora-bias-only", "LoraConfig", r=2, bias="lora_only"),
    _case("lora-lm-head-saved", "LoraConfig", r=2, modules_to_save=["lm_head"]),
    _case("dora", "LoraConfig", r=2, use_dora=True),
    _case("hira", "HiraConfig", r=2),
    _case("vera", "VeraConfig", r=4),
    _case("oft", "OFTConfig", oft_block_size=4, use_cayley_neumann=False),
    _case("boft", "BOFTConfig", boft_block_size=4),
    _case("miss", "MissConfig", r=4),
    _case("road", "RoadConfig", group_size=4),
    _case("shira", "ShiraConfig", r=1, random_seed=3),
)
PVERA = _case("pvera", "PveraConfig", r=4)
"""Merges rightly into 8-bit only; tests/engine/adapter/test_known_defects.py shows what becomes of it in 4-bit."""
FAST = {("lora", "bnb-4bit")}
PAIRS = (*((case, quantization) for case in CASES for quantization in QUANTIZATIONS), (PVERA, "bnb-8bit"))
GRID = [
    pytest.param(case, quantization, marks=() if (case.name, quantization) in FAST else pytest.mark.slow)
    for case, quantization in PAIRS
]
LORA_BIAS = _case("lora-bias-term", "LoraConfig", r=2, lora_bias=True)


def stored(bench: Bench, quantization: str) -> tuple[Path, Quantization]:
    """Where the base lies, and what the config asks for: a checkpoint that is quantised already loads as it is."""
    plain = bench.base_directory(BASE, "float16")
    if quantization in ON_LOADING:
        return plain, Quantization(quantization)
    directory = bench.root / "bases" / BASE / quantization
    if not directory.exists():
        methods.load_base(BASE, plain, quantization).save_pretrained(directory)
    return directory, Quantization.NONE


def quantised(bench: Bench, quantization: str) -> nn.Module:
    key = (BASE, quantization)
    if key not in bench.loaded:
        directory, asked = stored(bench, quantization)
        bench.loaded[key] = methods.load_base(BASE, directory, None if asked is Quantization.NONE else quantization)
    return bench.loaded[key]
