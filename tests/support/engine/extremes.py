"""Weights and updates at the ends of a dtype's range."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from merge_gate.engine.blocks.delta import LowRankUpdate

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
EXPONENTS = st.integers(-30, 12)


def update_of(rows, columns, rank, *, seed, b_size=0.1, a_size=0.1, scaling=2.0, dtype=torch.float32, transposed=False):
    """Factors of any size, with rows, columns and single values that stand out."""
    generator = torch.Generator().manual_seed(seed)
    lora_b = torch.randn(rows, rank, generator=generator)
    lora_a = torch.randn(rank, columns, generator=generator)
    lora_b *= 10 ** torch.randn(rows, 1, generator=generator).clamp(-2, 1)
    lora_a *= 10 ** torch.randn(1, columns, generator=generator).clamp(-2, 1)
    a, b = lora_a.mul(a_size).to(dtype), lora_b.mul(b_size).to(dtype)
    return LowRankUpdate(lora_a=a, lora_b=b, scaling=scaling, transposed=transposed)


def weight_of(update, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(update.shape, generator=generator).mul(size).to(dtype)


def visit(merge) -> list[int]:
    """The blocks that have to be merged with PEFT's roundings."""
    candidates, rows_of, seen = merge.candidates(), merge.dense_rows(), []
    assert candidates is not None

    def merged(number: int) -> tuple[float, float]:
        seen.append(number)
        values = rows_of(merge.slices[number]).merged
        return values.min().item(), values.max().item()

    candidates.visit(merged)
    return seen
