"""Copies of modules are what `copy.deepcopy` makes of them, over the same tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from merge_gate.engine.tensors.module_copies import copied, tensors_of
from tests.support import methods


class Own(nn.Module):
    """A class that says itself how it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own()
        made.copies = self.copies + 1
        return made


class Knot(nn.Module):
    """Modules that know each other, a tied parameter, and attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 3)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.arange(3))
        self.attention = nn.MultiheadAttention(2, 1)
        self.own = Own()
        self.__dict__["parent"] = self
        self.call = self.first.forward
        self.names = OrderedDict(a=[1, 2], b={"c": (3, self.first.bias)})


def described(model: nn.Module) -> list[object]:
    """Everything about the modules but their identity."""
    numbers = {id(module): number for number, module in enumerate(model.modules())}
    return [
        (
            numbers[id(module)],
            type(module),
            sorted(vars(module)),
            {name: numbers[id(one)] for name, one in module._modules.items() if one is not None},
            {name: one.tolist() for name, one in module._parameters.items() if one is not None},
            {name: one.tolist() for name, one in module._buffers.items() if one is not None},
            module.training,
        )
        for module in model.modules()
    ]


def test_a_copy_is_what_deepcopy_makes() -> None:
    knot = Knot()
    ours, theirs = copied(knot, tensors_of(knot)), copy.deepcopy(knot, tensors_of(knot))
    assert described(ours) == described(theirs) == described(knot)
    assert (ours.own.copies, theirs.own.copies) == (1, 1)
    assert ours.parent is ours
    assert ours.call.__self__ is ours.first
    assert ours.names["b"]["c"][1] is ours.first.bias
    assert ours.names["a"] == [1, 2]
    assert ours.names["a"] is not knot.names["a"]


def test_tensors_are_other_objects_over_the_same_storage() -> None:
    knot = Knot()
    made = copied(knot, tensors_of(knot))
    assert made.first.weight is made.second.weight
    assert made.first.weight is not knot.first.weight
    assert made.first.weight.data_ptr() == knot.first.weight.data_ptr()
    assert made.seen.data_ptr() == knot.seen.data_ptr()
    private = copied(knot, tensors_of(knot, private=True))
    assert private.first.weight.data_ptr() != knot.first.weight.data_ptr()
    assert torch.equal(private.seen, knot.seen)


@pytest.mark.parametrize("name", ["lora-linear", "lora-dora", "lora-embedding"])
def test_a_copy_of_peft_s_model_has_no_module_of_the_original(name: str) -> None:
    case = methods.find(name)
    with methods.quiet():
        model: Any = get_peft_model(methods.BASES[case.base](), case.config())
    made = copied(model, tensors_of(model))
    assert described(made) == described(model)
    assert not {id(module) for module in made.modules()} & {id(module) for module in model.modules()}
