"""A weight that PEFT gets without a copy: if PEFT writes to it, it has its values again, and nothing else is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.mapped_factors import map_factors
from merge_gate.engine.adapter.template import parameters_of
from merge_gate.engine.adapter.weights import read_weights
from merge_gate.engine.adapter_evidence import MergeRequest, merge, merge_together
from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.merge import private_copies
from merge_gate.engine.merge.private_copies import PrivateCopies, slots_of
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.preflight import preflight
from merge_gate.sources.feed import LocalFeed, SourceError
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import source
from tests.support.models import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from merge_gate.engine.adapter.load_adapter import Loaded
    from merge_gate.engine.base.loaded_base import Base
    from tests.support.models import Shelf

ADAPTERS = ("every-projection", "dora-all-linear", "plain")


class FailingFeed(LocalFeed):
    """A feed that can be told to fail."""

    is_broken = False

    def read(self, file: str, start: int, into: memoryview) -> None:
        if self.is_broken:
            raise SourceError("the mount is gone")
        super().read(file, start, into)


def skeleton(directory: Path, feed: LocalFeed | None = None) -> Base:
    model_class, stored = ModelClass(class_name="LlamaForCausalLM"), stored_tensors(directory)
    with methods.quiet():
        return skeleton_of(source(directory), model_class, stored, feed or LocalFeed(str(directory)))


def loaded_on(base: Base, adapter: Path) -> tuple[Loaded, Any]:
    """The adapter with its factors in its file, and its first layer."""
    files = preflight(str(adapter), allow_pickle=False)
    with methods.quiet():
        loaded = load_adapter(base, files, weights := read_weights(files))
    loaded.mapped = map_factors(loaded.model, loaded.arrivals[0], weights)
    return loaded, next(module for module in loaded.model.modules() if isinstance(module, BaseTunerLayer))


def request(base: Base, adapter: Path) -> MergeRequest:
    return MergeRequest(base=base, members=(preflight(str(adapter), allow_pickle=False),))


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_a_write_of_peft_in_a_cross_check_reaches_no_other_adapter(
    is_before: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PEFT's merge, the write is in both merges that are compared: only the checksum shows it."""
    directory, adapters = shelf.base("llama"), [shelf.adapter(name) for name in ADAPTERS]
    base = skeleton(directory)
    right = [one for one in merge_together([request(base, adapter) for adapter in adapters]) if one is not None]
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
    merged = [one for one in merge_together([request(base, adapter) for adapter in adapters]) if one is not None]
    assert writes
    assert [len(one.differing) for one in merged].count(1) == 1
    assert sum(one.layers_by_peft == 0 for one in merged) == len(ADAPTERS) - 1
    assert [extremes(one) for one in merged] == [extremes(one) for one in right]
    assert base.hollow is not None
    assert base.hollow.kept_bytes() == 0
    assert not base.was_misread()
    assert [extremes(merge(request(base, one))) for one in adapters] == [extremes(one) for one in right]


def extremes(evidence: Any) -> dict[str, tuple[float, float]]:
    """Of the tensors that the adapter changes: PEFT's own merge lists the layers' biases, too."""
    return {one.stats.name: (one.stats.minimum, one.stats.maximum) for one in evidence.merges if one.changed}


def test_a_lent_weight_is_no_copy(shelf: Shelf) -> None:
    base = skeleton(shelf.base("llama"))
    loaded, layer = loaded_on(base, shelf.adapter("every-projection"))
    weight = layer.get_base_layer().weight
    place = weight.data_ptr()
    for lends in (True, False):
        with PrivateCopies(layer, slots_of(layer, loaded.slots), base, lends=lends) as copies:
            assert (weight.data_ptr() == place) is lends
            layer.merge(safe_merge=True)
            assert weight.data_ptr() != place
        assert weight.data_ptr() == place
        assert not copies.was_written


def test_values_that_the_load_of_the_base_has_changed_are_copied(shelf: Shelf) -> None:
    """They are not those of the file, so they could not be written once more."""
    base = skeleton(shelf.base("llama"))
    loaded, layer = loaded_on(base, shelf.adapter("every-projection"))
    weight = layer.get_base_layer().weight
    assert weight.data.any() is not None  # read without values
    assert base.was_misread()
    with PrivateCopies(layer, slots_of(layer, loaded.slots), base, lends=True):
        weight.data.mul_(2)
    assert same_bits(weight.data, stored(shelf.base("llama"), layer, loaded))


@pytest.mark.parametrize("failure", ["none", "of-the-feed", "of-memory"])
def test_nothing_stays_behind_after_a_write(failure: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shelf.base("llama")
    feed = FailingFeed(str(directory))
    base = skeleton(directory, feed)
    loaded, layer = loaded_on(base, shelf.adapter("every-projection"))
    weight, factors = layer.get_base_layer().weight, [factor for _, _, factor in parameters_of(layer)]
    before = [(factor.data_ptr(), factor.data.clone()) for factor in factors]
    place, outcome = weight.data_ptr(), []
    if failure == "of-memory":
        monkeypatch.setattr(private_copies, "_checksum", lambda _: fail(MemoryError()))
    try:
        with PrivateCopies(layer, slots_of(layer, loaded.slots), base, mapped=loaded.mapped, lends=True) as copies:
            weight.data.mul_(2)
            layer.merge(safe_merge=True)
            feed.is_broken = failure == "of-the-feed"
        outcome.append(copies.was_written)
    except (SourceError, MemoryError) as error:
        outcome.append(error)
    assert [type(one) for one in outcome] == [{"none": bool, "of-the-feed": SourceError}.get(failure, MemoryError)]
    assert outcome[0] is True or failure != "none"
    assert layer.merged_adapters == []
    assert weight.data_ptr() == place
    assert [factor.data_ptr() for factor in factors] == [address for address, _ in before]
    assert all(same_bits(factor.data, values) for factor, (_, values) in zip(factors, before, strict=True))
    assert base.hollow is not None
    assert not base.hollow.fill_touched()  # its pages were given back
    feed.is_broken = False
    with base.hollow.filled([weight.data]):
        assert same_bits(weight.data, stored(directory, layer, loaded))


def fail(error: Exception) -> int:
    raise error


def stored(directory: Path, layer: Any, loaded: Loaded) -> torch.Tensor:
    name = loaded.slots[id(layer.get_base_layer()), "weight"]
    return read_tensors(directory, "model.safetensors")[name]
