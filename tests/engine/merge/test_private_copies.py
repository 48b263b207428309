"""A layer over copies: what PEFT writes to them reaches no other adapter, and nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate.engine.adapter.inject import parameters_of
from merge_gate.engine.adapter.load_adapter import Loaded, load_adapter
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.merge.private_copies import factors_in_memory, map_factors, private_copies, targets_of
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.preflight import preflight
from tests.support import methods
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import request_for
from tests.support.models import Shelf, read_tensors

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
def test_a_write_in_a_cross_check_reaches_no_other_adapter(
    is_before: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert base.lazy is not None
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
    assert base.lazy is not None
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
