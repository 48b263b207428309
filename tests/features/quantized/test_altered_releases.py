"""A release that has the delta, and is altered otherwise, is not said to be sound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.models import Tensors
from tests.support.quantized.quantizers import MemoryRelease
from tests.support.quantized.releases import Bench

QUERY, DOWN = "model.layers.2.self_attn.q_proj.weight", "model.layers.4.mlp.down_proj.weight"
NORM, EMBEDDING, HEAD = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"
Alter = Callable[[Tensors, Tensors], None]


def exchange(tensors: Tensors, _: Tensors) -> None:
    tensors[QUERY][[3, 9]] = tensors[QUERY][[9, 3]]


def empty_row(tensors: Tensors, _: Tensors) -> None:
    tensors[QUERY][7] *= 0.01


def one_value(tensors: Tensors, _: Tensors) -> None:
    tensors[DOWN][5, 5] = 3.0


def half_of_the_rows(tensors: Tensors, base: Tensors) -> None:
    """Twice in some rows, and not at all in others: once on average."""
    for name in (QUERY, DOWN):
        delta, half = tensors[name] - base[name], len(base[name]) // 2
        tensors[name] += torch.cat((delta[:half], -delta[half:]))


def half_of_the_columns(tensors: Tensors, base: Tensors) -> None:
    for name in (QUERY, DOWN):
        delta, half = tensors[name] - base[name], base[name].shape[1] // 2
        tensors[name] += torch.cat((delta[:, :half], -delta[:, half:]), 1)


def scaled(tensors: Tensors, _: Tensors) -> None:
    tensors[QUERY] *= 1.06


def row_of_embedding(tensors: Tensors, _: Tensors) -> None:
    tensors[EMBEDDING][10] = tensors[EMBEDDING][11]


def noisy_embedding(tensors: Tensors, _: Tensors) -> None:
    embedding = tensors[EMBEDDING]
    embedding += 0.03 * embedding.std() * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))


def scaled_head(tensors: Tensors, _: Tensors) -> None:
    tensors[HEAD] *= 1.05


def value_of_norm(tensors: Tensors, _: Tensors) -> None:
    tensors[NORM][4] += 0.05


def without_embedding(tensors: Tensors, _: Tensors) -> None:
    del tensors[EMBEDDING]


ALTERED: tuple[tuple[Alter, str], ...] = (
    (exchange, "unexplained"),
    (empty_row, "unexplained"),
    (one_value, "unexplained"),
    (half_of_the_rows, "unexplained"),
    (half_of_the_columns, "unexplained"),
    (scaled, "unexplained"),
    (row_of_embedding, "base-changed"),
    (noisy_embedding, "base-changed"),
    (scaled_head, "base-changed"),
    (value_of_norm, "base-changed"),
    (without_embedding, "not-carried"),
)
QUANTIZERS = {"rounded": "", "gptq": "slow", "clipped": "nightly", "float8": "nightly"}


@pytest.mark.parametrize(
    ("alter", "expected", "quantizer"),
    [
        pytest.param(*case, quantizer, marks=[getattr(pytest.mark, mark)] if mark else [])
        for quantizer, mark in QUANTIZERS.items()
        for case in ALTERED
    ],
)
def test_an_altered_release_is_not_sound(bench: Bench, alter: Alter, expected: str, quantizer: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in bench.faulty("right", "lora", 0.03, torch.clone).items()}
    alter(tensors, bench.tensors())
    found = bench.findings(MemoryRelease(tensors, quantizer), "lora", 0.03)
    assert expected in {one.check for one in found}, [one.message for one in found if one.check != "strength"]
