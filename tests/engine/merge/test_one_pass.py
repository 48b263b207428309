"""Adapters that are merged in one pass over a base have the evidence that each has by itself."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter import load_adapter
from merge_gate.engine.adapter_evidence import MergeRequest, merge, merge_together
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.merge import adapter_merge, one_pass
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.refusals import Refused
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import runs
from tests.support.faults import configure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.models import Shelf

WEIGHTS = "adapter_model.safetensors"
SAMPLED = MeasureOptions(estimates=True)

TOGETHER = (
    "every-projection",
    "dora-all-linear",
    "embedding",
    "modules-to-save",
    "lora-bias",
    "pissa",
    "bias-all",
    "resized-vocabulary",
    "token-rows",
)
"""Variants of one base that go in blocks, through PEFT's merge, or both; some write to the base's tensors on load."""


def base_for(directory: Path, adapter: Path, dtype: str) -> Base:
    model_class = model_class_for(
        str(directory), preflight(str(adapter), allow_pickle=False), stored_tensors(directory)
    )
    return load_local(str(directory), model_class=model_class, label="base", dtype=dtype)


def request_for(base: Base, adapter: Path, **options: Any) -> MergeRequest:
    return MergeRequest(base=base, members=(preflight(str(adapter), allow_pickle=False),), consumers=runs(), **options)


def comparable(evidence: Evidence) -> str:
    """Its text, since NaN is not equal to NaN. Which layers PEFT cross-checks depends on the adapters before."""
    assert len(set(evidence.cross_checked)) == len(evidence.cross_checked)
    assert (evidence.forward.largest_difference or 0.0) < 1e-3  # of the cross-checked layers, in float32
    forward = dataclasses.replace(evidence.forward, largest_difference=None)
    checked = (str(len(evidence.cross_checked)),)
    return repr(dataclasses.replace(evidence, seconds=0.0, cross_checked=checked, forward=forward))


def changed(adapter: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(adapter, to)
    tensors = load_file(to / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    return to


@pytest.fixture
def adapters(shelf: Shelf, tmp_path: Path) -> list[Path]:
    """Good ones, one that is refused, one with NaN, one that overflows, one without effect, one that lacks a tensor."""
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "nan": lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan),
        "large": lambda tensors: [tensor.fill_(1e25) for tensor in tensors.values()],
        "zero": lambda tensors: [tensor.zero_() for tensor in tensors.values()],
        "lacking": lambda tensors: tensors.pop(next(iter(tensors))),
    }
    good = [shelf.adapter(name) for name in TOGETHER]
    elsewhere = shutil.copytree(good[0], tmp_path / "elsewhere")
    configure(target_modules=["absent"])(elsewhere)
    return [*good, elsewhere, *(changed(good[0], tmp_path / name, change) for name, change in changes.items())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_adapter_has_the_evidence_of_a_pass_of_its_own(dtype: str, shelf: Shelf, adapters: list[Path]) -> None:
    directory = shelf.base("llama")
    base = base_for(directory, adapters[0], dtype)
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    together = merge_together([request_for(base, adapter, measure_options=SAMPLED) for adapter in adapters])
    alone = [merge(request_for(base_for(directory, one, dtype), one, measure_options=SAMPLED)) for one in adapters]
    for adapter, one, expected in zip(adapters, together, alone, strict=True):
        assert one is not None
        assert comparable(one) == comparable(expected), adapter.name
    assert all(torch.equal(before[name], tensor) for name, tensor in base.tensors.items())
    assert [one is not None and one.refusal is not None for one in together] == [
        adapter.name == "elsewhere" for adapter in adapters
    ]


def test_adapters_are_cross_checked_in_different_layers(shelf: Shelf) -> None:
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    first, second = merge_together([request_for(base, adapter)] * 2)
    assert first is not None
    assert second is not None
    assert first.cross_checked != second.cross_checked
    assert len(first.cross_checked) == len(second.cross_checked) > 1
    assert len(merge(request_for(base, adapter)).cross_checked) == len(first.cross_checked)


def test_a_weight_is_merged_with_all_adapters_before_the_next(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own = adapter_merge.AdapterMerge.merge_in_blocks

    def merged(self: adapter_merge.AdapterMerge, block: Any, weight: torch.Tensor) -> Any:
        seen.append(block.target.name)
        return own(self, block, weight)

    monkeypatch.setattr(adapter_merge.AdapterMerge, "merge_in_blocks", merged)
    monkeypatch.setattr(one_pass, "spread", map)
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    merge_together([request_for(base, adapter)] * 3)
    assert seen == [name for name in dict.fromkeys(seen) for _ in range(3)]
    addresses = [base.tensors[name].data_ptr() for name in dict.fromkeys(seen)]
    assert addresses == sorted(addresses)


def test_an_adapter_that_raises_is_left_to_be_merged_by_itself(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [shelf.adapter("every-projection"), shelf.adapter("lora-bias")]
    base = base_for(shelf.base("llama"), adapters[0], "bfloat16")
    own = adapter_merge.AdapterMerge.finish

    def finish(self: adapter_merge.AdapterMerge) -> None:
        if not self.planned:  # the adapter that PEFT merges
            raise MemoryError
        own(self)

    requests = [request_for(base, adapter) for adapter in adapters]
    assert None not in merge_together(requests)
    monkeypatch.setattr(adapter_merge.AdapterMerge, "finish", finish)
    assert [evidence is None for evidence in merge_together(requests)] == [False, True]
    assert merge(requests[0]).refusal is None
    with pytest.raises(MemoryError):
        merge(requests[1])


def test_a_failed_cross_check_sends_its_adapter_through_peft(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    own, adapter_merges = adapter_merge.AdapterMerge.cross_check, list[adapter_merge.AdapterMerge]()

    def cross_check(self: adapter_merge.AdapterMerge, block: Any, merged: Any) -> bool:
        adapter_merges.append(self)
        return own(self, block, merged) and self is not adapter_merges[0]

    right = merge(request_for(base, adapter))
    monkeypatch.setattr(adapter_merge.AdapterMerge, "cross_check", cross_check)
    merged = merge_together([request_for(base, adapter)] * 2)
    first, second = sorted(filter(None, merged), key=lambda one: not one.differing)  # the order of threads decides
    assert first.differing
    assert (first.layers_in_blocks, first.layers_by_peft) == (0, right.layers_in_blocks)
    assert (second.differing, second.layers_in_blocks) == ((), right.layers_in_blocks)
    extremes = [{one.stats.name: one.stats.maximum for one in found.merges} for found in (first, second, right)]
    assert extremes[1] == extremes[2]
    assert {name: extremes[0][name] for name in extremes[2]} == extremes[2]


def test_adapters_of_one_kind_share_one_injection(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    injections: list[str] = []
    own = load_adapter.inject

    def inject(*args: Any, **options: Any) -> Any:
        injections.append(str(args[1].peft_type))
        return own(*args, **options)

    monkeypatch.setattr(load_adapter, "inject", inject)
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    together = merge_together([request_for(base, adapter)] * 3)
    assert len(injections) == 1
    assert base.pattern is None
    assert len({evidence.merges for evidence in together if evidence is not None}) == 1


def test_adapters_of_one_kind_are_refused_alike(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Refused("loftq_without_gpu")

    monkeypatch.setattr(adapter_evidence, "refuse_wrong_merges", refuse)
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    together = merge_together([request_for(base, adapter)] * 2)
    assert [evidence is not None and evidence.refusal is not None for evidence in together] == [True, True]
