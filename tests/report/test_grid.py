"""Where a tensor stands on the map, and what became of it."""

from __future__ import annotations

import dataclasses

import pytest

from merge_gate.records.measured import TensorMerge
from merge_gate.report.wording.grid import State, blocks, count_states, states
from tests.support.reports import tensors

ONE = tensors(1)[0]


def merge(module: str, own: str = "weight", **counts: int) -> TensorMerge:
    name = f"{module}.{own}" if module else own
    return dataclasses.replace(ONE, module=module, stats=dataclasses.replace(ONE.stats, name=name, **counts))


@pytest.mark.parametrize(
    ("module", "own", "stack", "layer", "row"),
    [
        ("model.layers.5.mlp.up_proj", "weight", "model.layers", "5", "mlp.up_proj"),
        ("model.layers.5.mlp.up_proj", "bias", "model.layers", "5", "mlp.up_proj.bias"),
        ("transformer.h.11.attn.c_attn", "weight", "transformer.h", "11", "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.w1", "weight", "model.layers", "3", "mlp.experts.7.w1"),
        ("layers.0", "weight", "layers", "0", "weight"),
        ("0.q", "weight", "", "0", "q"),
        ("lm_head", "weight", "", "", "lm_head"),
        ("classifier", "bias", "", "", "classifier.bias"),
        ("model.layer5.q", "weight", "", "", "model.layer5.q"),
    ],
)
def test_where_a_tensor_stands(module: str, own: str, stack: str, layer: str, row: str) -> None:
    (block,) = blocks((merge(module, own),))
    assert (block.stack, block.layers, block.modules, block.places) == (stack, (layer,), (row,), ((0, 0, 0),))


def test_layers_are_in_the_order_of_numbers_and_stacks_apart() -> None:
    names = ["enc.layers.10.q", "enc.layers.9.q", "dec.layers.0.q", "enc.layers.9.v"]
    first, second = blocks(tuple(merge(name) for name in names))
    assert (first.stack, first.layers, first.modules) == ("enc.layers", ("9", "10"), ("q", "v"))
    assert first.places == ((0, 0, 1), (1, 0, 0), (3, 1, 0))
    assert (second.stack, second.places) == ("dec.layers", ((2, 0, 0),))


def test_the_worst_state_counts() -> None:
    merges = (
        merge("a", nan=1, posinf=2),
        merge("b", neginf=1),
        dataclasses.replace(merge("c"), changed=False),
        merge("d"),
        merge("e"),
    )
    assert states(merges) == [State.NAN, State.INF, State.NO_EFFECT, State.FINITE, State.FINITE]
    assert count_states(merges) == [(State.NAN, 1), (State.INF, 1), (State.NO_EFFECT, 1), (State.FINITE, 2)]


def test_a_bias_that_is_not_trained_is_not_without_effect() -> None:
    bias = dataclasses.replace(merge("a", "bias"), changed=False)
    assert states((merge("a"), bias)) == [State.FINITE, State.UNTOUCHED]
    assert states((dataclasses.replace(merge("a"), changed=False), bias)) == [State.NO_EFFECT, State.NO_EFFECT]
