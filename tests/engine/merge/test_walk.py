"""PEFT's road, two layers at a time and with one delta for both merges, comes to what it comes to one after another."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.weights import read_weights
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.merge import walk
from merge_gate.engine.merge.twin import Deltas, Twins
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import MEASURE_ALL, Evidence
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def on_all_layers(case: methods.Case) -> methods.Case:
    def config() -> Any:
        made = case.config()
        made.target_modules = set(ALL)
        return made

    return dataclasses.replace(case, config=config)


def first_of_each_kind() -> dict[str, methods.Case]:
    """A case of every method of PEFT that merges into linear layers, on all of those of a Llama."""
    found: dict[str, methods.Case] = {}
    for case in methods.CASES:
        with methods.quiet():
            config = case.config()
        targets = getattr(config, "target_modules", None)
        if case.base == "llama" and isinstance(targets, (list, set)) and set(targets) <= ALL:
            found.setdefault(config.peft_type.value, on_all_layers(case))
    return found


KINDS = first_of_each_kind()


def made(case: methods.Case, root: Path) -> tuple[Path, Path]:
    base = methods.save_base(case.base, root / "base", "bfloat16")
    methods.save_adapter(case, methods.load_base(case.base, base), root / "adapter", base_directory=base)
    return base, root / "adapter"


def loaded_base(base: Path, adapter: Path) -> Base:
    model_class = model_class_for(str(base), preflight(str(adapter), allow_pickle=False), stored_tensors(base))
    return load_local(str(base), model_class=model_class, label="base")


def evidence_of(base: Path, adapter: Path) -> Evidence:
    evidence = merge_adapter(
        loaded_base(base, adapter), preflight(str(adapter), allow_pickle=False), measure_options=MEASURE_ALL
    )
    return dataclasses.replace(evidence, seconds=0.0)


@contextmanager
def one_after_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One layer at a time, and each delta made anew."""
    with monkeypatch.context() as patch:
        patch.setattr(walk, "threads", lambda: 1)
        patch.setattr(Twins, "of", lambda *_: nullcontext())
        yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Two cores, and the threads on which layers are merged."""
    found: list[threading.Thread] = []
    own = walk.Walk._made

    def merge(*given: Any, **named: Any) -> Any:
        found.append(threading.current_thread())
        return own(*given, **named)

    monkeypatch.setattr(walk, "threads", lambda: 2)
    monkeypatch.setattr(walk, "plan_blocks", lambda *_: [])
    monkeypatch.setattr(walk.Walk, "_made", merge)
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_evidence_is_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[threading.Thread]
) -> None:
    base, adapter = made(KINDS[kind], tmp_path)
    with one_after_another(monkeypatch):
        slow = evidence_of(base, adapter)
    assert set(seen) == {threading.main_thread()}
    assert slow.refusal is None
    seen.clear()
    assert evidence_of(base, adapter) == slow
    assert threading.main_thread() not in seen
    assert len(seen) == len(slow.targeted) > 1


@pytest.mark.parametrize("kind", ["LOHA", "OFT", "VERA"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_broken_is_told_the_same(
    kind: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[threading.Thread]
) -> None:
    base, adapter = made(KINDS[kind], tmp_path)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in sorted(tensors)[:2]:
        tensors[name].view(-1)[0] = value
    save_file(tensors, weights, {"format": "pt"})
    with one_after_another(monkeypatch):
        slow = evidence_of(base, adapter)
    assert not all(merge.stats.finite for merge in slow.merges) or value == 3e38
    assert repr(evidence_of(base, adapter)) == repr(slow), "by its text: NaN is not NaN"
    assert seen


def test_what_peft_cannot_merge_is_refused_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[threading.Thread]
) -> None:
    """A bias for layers that have none."""
    case = methods.make_case("lora-bias", "llama", "LoraConfig", r=2, target_modules=sorted(ALL), lora_bias=True)
    base, adapter = made(case, tmp_path)
    with one_after_another(monkeypatch):
        slow = evidence_of(base, adapter)
    assert slow.refusal is not None
    assert evidence_of(base, adapter) == slow
    assert seen


@pytest.mark.parametrize("name", ["lora-experts", "lora-experts-qwen", "lora-tied-tokens", "lora-pissa"])
def test_layers_within_layers_and_on_weights_that_are_not_the_bases_are_left_to_the_walk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[threading.Thread]
) -> None:
    base, adapter = made(methods.find(name), tmp_path)
    with one_after_another(monkeypatch):
        slow = evidence_of(base, adapter)
    assert slow.layers_by_peft
    seen.clear()
    assert evidence_of(base, adapter) == slow
    assert threading.main_thread() in seen


def test_merges_that_draw_numbers_draw_them_in_the_order_of_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[threading.Thread]
) -> None:
    """No method of today's PEFT does, but for dropout in a model that trains."""
    case = methods.make_case("lokr", "llama", "LoKrConfig", r=2, target_modules=sorted(ALL), rank_dropout=0.5)
    base, adapter = made(case, tmp_path)

    def merges() -> dict[str, Any]:
        files = preflight(str(adapter), allow_pickle=False)
        loaded_on = loaded_base(base, adapter)
        with methods.quiet(), torch.no_grad():
            loaded = load_adapter(loaded_on, files, read_weights(files))
            loaded.model.train()
            torch.manual_seed(0)
            one = walk.Walk(base=loaded_on, loaded=loaded, measure_options=MEASURE_ALL)
            one.plan()
            one.finish()
        return one.ledger.merges

    with one_after_another(monkeypatch):
        slow = merges()
    assert merges() == slow


# --- the delta of both merges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "is_free"), [("LOHA", True), ("BOFT", True), ("C3A", False), ("FROD", False)])
def test_a_delta_is_used_twice_only_where_it_does_not_depend_on_the_weights_dtype(
    kind: str, is_free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_anew: list[int] = []
    own = Deltas._made

    def count(self: Deltas, *given: Any, **named: Any) -> Any:
        made_anew.append(id(self._layer))
        return own(self, *given, **named)

    monkeypatch.setattr(Deltas, "_made", count)
    monkeypatch.setattr(walk, "threads", lambda: 1)
    base, adapter = made(KINDS[kind], tmp_path)
    layers = len(evidence_of(base, adapter).targeted)
    assert (len(made_anew) < 2 * layers) == is_free


class Layer:
    """What `Deltas` sees of a layer."""

    def __init__(self, delta: Any) -> None:
        self.delta = delta

    def get_delta_weight(self, adapter: str) -> Any:
        del adapter
        return self.delta.clone()


def test_a_delta_that_was_written_to_is_made_anew() -> None:
    layer = Layer(torch.ones(3))
    with Deltas(layer) as deltas:
        layer.get_delta_weight("default").mul_(2)
        with deltas.second_merge(reuses=True):
            assert torch.equal(layer.get_delta_weight("default"), torch.ones(3))
    assert "get_delta_weight" not in vars(layer)


def test_a_delta_of_zeros_shows_nothing() -> None:
    for value, shown in ((0.0, False), (1.0, True)):
        layer = Layer(torch.full((3,), value))
        with Deltas(layer) as deltas:
            layer.get_delta_weight("default")
            with deltas.second_merge(reuses=False) as found:
                layer.get_delta_weight("default")
        assert found == [shown]
