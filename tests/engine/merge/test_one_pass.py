"""Adapters that are merged in one pass over a base have the evidence that each has by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter import load_adapter
from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.merge import adapter_merge
from merge_gate.records.measured import MeasureOptions
from merge_gate.records.refusals import Refused
from tests.support.engine.local_bases import base_for
from tests.support.engine.merges import comparable, request_for
from tests.support.faults import configure
from tests.support.models import Shelf, read_tensors, write_tensors

SAMPLED = MeasureOptions(estimates=True)

TOGETHER = (
    "every-projection", "dora-all-linear", "embedding", "modules-to-save", "lora-bias", "pissa", "bias-all",
    "resized-vocabulary", "token-rows",
)  # fmt: skip
"""Variants of one base that go in blocks, through PEFT's merge, or both; some write to the base's tensors on load."""


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
    broken = [shutil.copytree(good[0], tmp_path / name) for name in changes]
    for adapter in broken:
        tensors = read_tensors(adapter)
        changes[adapter.name](tensors)
        write_tensors(adapter, tensors)
    return [*good, elsewhere, *broken]


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
