"""Copies of modules are what `copy.deepcopy` makes of them, over the same tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from merge_gate.engine.tensors.module_copies import tensors_of


class Knot(nn.Module):
    """A tied parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 3)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.arange(3))


def test_tensors_are_other_objects_over_the_same_storage() -> None:
    knot = Knot()
    made = copy.deepcopy(knot, tensors_of(knot))
    assert made.first.weight is made.second.weight
    assert made.first.weight is not knot.first.weight
    assert made.first.weight.data_ptr() == knot.first.weight.data_ptr()
    assert made.seen.data_ptr() == knot.seen.data_ptr()
    private = copy.deepcopy(knot, tensors_of(knot, private=True))
    assert private.first.weight.data_ptr() != knot.first.weight.data_ptr()
    assert torch.equal(private.seen, knot.seen)
