"""What the gate measures is what a user of PEFT gets: the same tensors, the same dtype, the same bits."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.consumer import WholeTensors
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import lay_out
from tests.support.engine.local_bases import base_for
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.engine.plain_merge import Tensors, peft_merge
from tests.support.faults import Case
from tests.support.files.pickles import read_pickle
from tests.support.merged import kept
from tests.support.models import VARIANTS, Shelf
from tests.support.sampled import sampled

RANDOM = {"pissa-niter"}  # PEFT decomposes the base by a randomised method on every load: no two merges are alike
UNMERGEABLE = {"prompt-tuning", "tied-head", "tied-embedding"}
MERGEABLE = sorted(VARIANTS.keys() - RANDOM - UNMERGEABLE)
IN_ALL_DTYPES = ("plain", "dora", "every-projection", "bias-all", "modules-to-save")
"""Merged in every dtype, the others in bfloat16: tests/test_methods.py has every method in every dtype."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: there -0.0 is not 0.0, and NaN equals itself."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def read(adapter: Path) -> AdapterFiles:
    return preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle)


def given_to_consumers(base: Base, adapter: Path) -> tuple[Tensors, Evidence]:
    """The tensors that a sink gets."""
    seen: Tensors = {}
    sink = WholeTensors(seen.__setitem__)
    request = MergeRequest(base=base, members=(read(adapter),), consumers=(sink,), no_forward=NOT_RUN)
    evidence = adapter_evidence.merge(request)
    assert sink.names <= seen.keys()
    return {name: tensor for name, tensor in seen.items() if name in sink.names}, evidence


def gate_merge(base: Base, adapter: Path) -> tuple[Tensors, Evidence]:
    with kept() as seen:
        evidence = merge_adapter(base, read(adapter), no_forward=NOT_RUN)
    assert evidence.refusal is None, evidence.refusal
    return seen, evidence


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, "bfloat16") for variant in MERGEABLE), *itertools.product(IN_ALL_DTYPES, ("float32", "float16"))],
)
def test_the_measured_tensors_are_those_of_peft(variant: str, dtype: str, shelf: Shelf) -> None:
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    loaded = base_for(base, adapter, dtype)
    seen, evidence = gate_merge(loaded, adapter)
    before, after = peft_merge(base, adapter, dtype)
    changed = {name for name, value in after.items() if name not in before or not same(before[name], value)}
    assert seen
    assert changed - aliases(after, seen) <= seen.keys()
    assert [name for name, tensor in seen.items() if not same(tensor, after[name])] == []
    said = {merge.stats.name: merge for merge in evidence.merges}
    assert {name for name in seen if said[name].changed} == changed & seen.keys()
    assert evidence.parameters_checked == evidence.parameters_total == count(after)

    given, again = given_to_consumers(loaded, adapter)
    assert changed - aliases(after, given) <= given.keys()
    assert [name for name, tensor in given.items() if not same(tensor, after[name])] == []
    assert replace(again, seconds=0.0) == replace(evidence, seconds=0.0)


def aliases(after: Tensors, seen: Tensors) -> set[str]:
    """Names of a tied tensor besides the one that was measured."""
    measured = {after[name].data_ptr() for name in seen}
    return {name for name, value in after.items() if name not in seen and value.data_ptr() in measured}


def count(tensors: Tensors) -> int:
    return sum({value.data_ptr(): value.numel() for value in tensors.values()}.values())


@pytest.mark.parametrize("variant", ["plain", "dora", "bias-all", "modules-to-save", "conv1d"])
def test_the_figures_are_those_of_the_tensors(variant: str, shelf: Shelf) -> None:
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    _, evidence = gate_merge(base_for(base, adapter, "bfloat16"), adapter)
    before, after = peft_merge(base, adapter, "bfloat16")
    exact = peft_merge(base, adapter, "float32")[1]
    changed = [merge for merge in evidence.merges if merge.changed]
    assert changed
    for merge in changed:
        name = merge.stats.name
        values = after[name].float()
        assert merge.stats.minimum == values.min().item()
        assert merge.stats.maximum == values.max().item()
        assert merge.base_norm == pytest.approx(before[name].float().norm().item(), rel=1e-3)
        assert merge.unchanged_fraction == pytest.approx((before[name] == after[name]).float().mean().item())
        assert merge.delta_norm == pytest.approx((exact[name] - before[name].float()).norm().item(), rel=0.1)


def overflowing() -> list[Case]:
    return [case for case in FAULTS if case.cause in {"adapter-nonfinite", "merged-nonfinite"} and not case.top]


@pytest.mark.parametrize("case", sampled(overflowing(), overflowing()[::3]))
def test_what_is_broken_is_counted_as_peft_merges_it(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """PEFT's own check stops at the first bad layer; the gate goes on, as `safe_merge=False` would."""
    base, adapter = shelf.base(case.base or VARIANTS[case.variant].base), tmp_path / case.variant
    lay_out(case, shelf, adapter)
    seen, evidence = gate_merge(base_for(base, adapter, case.dtype), adapter)
    after = peft_merge(base, adapter, case.dtype, safe_merge=False)[1]
    broken = {name for name, value in after.items() if not torch.isfinite(value).all()}
    assert broken
    assert {merge.stats.name for merge in evidence.merges if not merge.stats.finite} == broken
    for merge in evidence.merges:
        values = after[merge.stats.name]
        assert merge.stats.nan == values.isnan().sum().item()
        assert merge.stats.posinf == values.isposinf().sum().item()
        assert merge.stats.neginf == values.isneginf().sum().item()
    assert [name for name in broken if not same(seen[name], after[name])] == []


def test_every_kind_of_adapter_is_held_against_peft() -> None:
    assert {case.variant for case in HEALTHY} <= {*MERGEABLE, *RANDOM}
