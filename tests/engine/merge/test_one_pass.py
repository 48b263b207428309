"""Adapters that are merged in one pass over a base have the evidence that each has by itself."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate.engine.adapter import load_adapter as loading
from merge_gate.engine.adapter.inject import parameters_of
from merge_gate.engine.adapter.load_adapter import Loaded, load_adapter
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.merge import adapter_merge
from merge_gate.engine.merge.private_copies import factors_in_memory, map_factors, private_copies, targets_of
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import MeasureOptions
from tests.support import methods
from tests.support.engine.local_bases import base_for, edited_adapter, load_local
from tests.support.engine.merges import comparable, request_for
from tests.support.faults import configure
from tests.support.models import Shelf, read_tensors, save_adapter

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
    return [*good, elsewhere, *(edited_adapter(good[0], tmp_path / name, change) for name, change in changes.items())]


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
    own = loading.inject

    def inject(*args: Any, **options: Any) -> Any:
        injections.append(str(args[1].peft_type))
        return own(*args, **options)

    monkeypatch.setattr(loading, "inject", inject)
    adapter = shelf.adapter("every-projection")
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    together = merge_together([request_for(base, adapter)] * 3)
    assert len(injections) == 1
    assert base.pattern is None
    assert len({evidence.merges for evidence in together if evidence is not None}) == 1


def test_adapters_of_one_kind_are_refused_alike(shelf: Shelf, tmp_path: Path) -> None:
    """PEFT would merge both into the tensor that they share."""
    directory, both = shelf.base("llama-tied"), ["embed_tokens", "lm_head"]
    save_adapter(directory, tmp_path, LoraConfig(r=2, target_modules=both, task_type="CAUSAL_LM"))
    together = merge_together([request_for(base_for(directory, tmp_path, "bfloat16"), tmp_path)] * 2)
    assert [evidence.refusal.fields["defect"] for evidence in together] == ["merged-twice"] * 2


ADAPTERS = ("every-projection", "dora-all-linear", "plain")


def skeleton(directory: Path) -> Base:
    with methods.quiet():
        return load_local(
            str(directory), model_class=ModelClass(class_name="LlamaForCausalLM"), label="base", is_mapped=False
        )


def loaded_on(base: Base, adapter: Path) -> tuple[Loaded, Any]:
    """The adapter with its factors in its file, and its first layer."""
    files = preflight(str(adapter), allow_pickle=False)
    with methods.quiet():
        loaded = load_adapter(base, files, weights := read_weights(files))
    loaded.mapped = map_factors(loaded.model, loaded.arrivals[0], weights)
    return loaded, next(module for module in loaded.model.modules() if isinstance(module, BaseTunerLayer))


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_a_write_in_a_cross_check_reaches_no_other_adapter(is_before, shelf, monkeypatch) -> None:
    directory, adapters = shelf.base("llama"), [shelf.adapter(name) for name in ADAPTERS]
    base = skeleton(directory)
    right = [one for one in merge_together([request_for(base, adapter) for adapter in adapters]) if one is not None]
    writes: list[Any] = []
    own: Callable[..., None] = lora.Linear.merge

    def merge_and_write(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        weight, is_first = self.get_base_layer().weight.data, not writes
        if is_first:
            writes.append(self)
        if is_first and is_before:
            weight.mul_(2)
        own(self, safe_merge, adapter_names)
        if is_first and not is_before:
            weight.mul_(2)

    monkeypatch.setattr(lora.Linear, "merge", merge_and_write)
    base = skeleton(directory)
    merged = [one for one in merge_together([request_for(base, adapter) for adapter in adapters]) if one is not None]
    assert writes
    assert [len(one.differing) for one in merged].count(1) == is_before  # after the merge, nothing reads the copy
    assert sum(one.layers_by_peft == 0 for one in merged) == len(ADAPTERS) - is_before
    assert [extremes(one) for one in merged] == [extremes(one) for one in right]
    assert base.lazy.kept_bytes() == 0
    assert not base.was_misread()
    assert [extremes(merge(request_for(base, one))) for one in adapters] == [extremes(one) for one in right]


def extremes(evidence: Any) -> dict[str, tuple[float, float]]:
    """Of the tensors that the adapter changes: PEFT's own merge lists the layers' biases, too."""
    return {one.stats.name: (one.stats.minimum, one.stats.maximum) for one in evidence.merges if one.changed}


@pytest.mark.parametrize("failure", [None, MemoryError])
def test_nothing_stays_behind_after_a_write(failure: type[Exception] | None, shelf: Shelf) -> None:
    directory = shelf.base("llama")
    base = skeleton(directory)
    loaded, layer = loaded_on(base, shelf.adapter("every-projection"))
    weight, factors = layer.get_base_layer().weight, [factor for _, _, factor in parameters_of(layer)]
    before = [(factor.data_ptr(), factor.data.clone()) for factor in factors]
    place = weight.data_ptr()
    with (
        pytest.raises(failure) if failure is not None else nullcontext(),
        private_copies(layer, targets_of(layer, loaded.base_names), base, mapped=loaded.mapped),
    ):
        weight.data.mul_(2)
        layer.merge(safe_merge=True)
        if failure is not None:
            raise failure
    assert layer.merged_adapters == []
    assert weight.data_ptr() == place
    assert [factor.data_ptr() for factor in factors] == [address for address, _ in before]
    assert all(same_bits(factor.data, values) for factor, (_, values) in zip(factors, before, strict=True))
    assert not base.lazy.fill_touched()  # its pages were given back
    with base.lazy.filled([weight.data]):
        name = loaded.base_names[id(layer.get_base_layer()), "weight"]
        assert same_bits(weight.data, read_tensors(directory, "model.safetensors")[name])


def test_factors_of_a_file_are_copied_for_a_merge(shelf: Shelf) -> None:
    """A tensor in a file has another alignment than torch's, and PEFT's bits may depend on that."""
    loaded, layer = loaded_on(skeleton(shelf.base("llama")), shelf.adapter("every-projection"))
    factors = [factor for _, _, factor in parameters_of(layer)]
    before = [(factor.data_ptr(), factor.data.clone()) for factor in factors]
    with factors_in_memory(layer, loaded.mapped):
        for factor, (place, values) in zip(factors, before, strict=True):
            assert factor.data_ptr() % 64 == 0
            assert factor.data_ptr() != place
            assert same_bits(factor.data, values)
    assert [factor.data_ptr() for factor in factors] == [place for place, _ in before]
