"""What is decomposed ahead has PEFT's bits, and whatever was not foreseen is decomposed when PEFT asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.adapter import svd_ahead
from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.weights import read_weights
from merge_gate.engine.base.loaded_base import Base, load_base
from merge_gate.engine.base.model_class import shape_for
from merge_gate.errors import Refused
from merge_gate.files.preflight import preflight
from tests.support import methods
from tests.support.engine.blocks_layers import threads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
PISSA: dict[str, Any] = {"r": 2, "init_lora_weights": "pissa"}
CASES = [
    methods.make_case("pissa", "llama-tall", "LoraConfig", target_modules=ALL, **PISSA),
    methods.make_case("pissa-conv1d", "gpt2", "LoraConfig", **PISSA, **GPT2),
    methods.make_case("kasa", "llama", "LoraConfig", r=2, target_modules=ALL, kasa_config=peft.KasaConfig()),
    methods.make_case("osf", "llama", "OSFConfig", target_modules=ALL, effective_rank=2),
    methods.make_case("psoft", "llama-tall", "PsoftConfig", target_modules=ALL, r=2),
    methods.make_case("tinylora", "llama-tall", "TinyLoraConfig", target_modules=ALL),
    methods.make_case("tinylora-conv1d", "gpt2", "TinyLoraConfig", **GPT2),
]


class Seen(TorchDispatchMode):
    """Counts the decompositions of this thread, as torch makes them, and those that were begun on others."""

    def __init__(self) -> None:
        super().__init__()
        self.here = self.ahead = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.here += func is torch.ops.aten._linalg_svd.default
        return func(*args, **(kwargs or {}))

    def forget(self) -> None:
        self.here = self.ahead = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Two threads, and who decomposes."""
    counter = Seen()
    begin, own = svd_ahead._Ahead._decompose, torch.linalg.svd

    def counted(self: Any, values: torch.Tensor) -> Any:
        counter.ahead += 1
        return begin(self, values)

    monkeypatch.setattr(svd_ahead, "threads", lambda: 2)
    monkeypatch.setattr(svd_ahead._Ahead, "_decompose", counted)
    with threads(2), counter:
        yield counter
    assert torch.linalg.svd is own, "what stood there stands there again"


def made(case: methods.Case, root: Path, dtype: str) -> Path:
    directory = methods.save_base(case.base, root / "base", dtype)
    methods.save_adapter(case, methods.load_base(case.base, directory), root / "adapter", base_directory=directory)
    return directory


def loaded_base(directory: Path, adapter: Path) -> Base:
    shape = shape_for(str(directory), preflight(str(adapter), allow_pickle=False))
    return load_base(str(directory), shape=shape, label="base")


def by_the_gate(base: Base, adapter: Path) -> nn.Module:
    files = preflight(str(adapter), allow_pickle=False)
    torch.manual_seed(0)
    with methods.quiet(), torch.no_grad():
        model: nn.Module = load_adapter(base, files, read_weights(files)).model
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = (dict(one.named_parameters()) | dict(one.named_buffers()) for one in (ours, theirs))
    assert mine.keys() == other.keys()
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_loaded_with_pefts_bits(case: methods.Case, dtype: str, tmp_path: Path, seen: Seen) -> None:
    directory = made(case, tmp_path, dtype)
    seen.forget()
    theirs = methods.load_adapter(methods.load_base(case.base, directory), tmp_path / "adapter")
    needed = seen.here
    assert needed > 1
    seen.forget()
    ours = by_the_gate(loaded_base(directory, tmp_path / "adapter"), tmp_path / "adapter")
    assert (seen.here, seen.ahead) == (1, needed - 1), "each is decomposed once, and all but the first are foreseen"
    assert_same(ours, theirs)


def test_a_weight_that_was_rewritten_since_is_decomposed_again(tmp_path: Path, seen: Seen) -> None:
    """PiSSA takes its factors from the weight; of two modules that share one, the second meets what is left of it."""
    directory = made(CASES[0], tmp_path, "float32")
    base = loaded_base(directory, tmp_path / "adapter")
    plain = methods.load_base(CASES[0].base, directory)
    for model in (base.model, plain):
        for layer in model.model.layers:
            layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    base.tensors = dict(base.model.named_parameters())
    seen.forget()
    ours = by_the_gate(base, tmp_path / "adapter")
    assert seen.here == 1 + len(plain.model.layers)
    assert_same(ours, methods.load_adapter(plain, tmp_path / "adapter"))


def test_a_weight_that_cannot_be_decomposed_is_refused_in_pefts_words(tmp_path: Path, seen: Seen) -> None:
    directory = made(CASES[3], tmp_path, "float32")
    base = loaded_base(directory, tmp_path / "adapter")
    plain = methods.load_base(CASES[3].base, directory)
    for model in (base.model, plain):
        model.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError) as theirs:
        methods.load_adapter(plain, tmp_path / "adapter")
    with pytest.raises(Refused) as ours:
        by_the_gate(base, tmp_path / "adapter")
    assert str(theirs.value).splitlines()[0] in ours.value.refusal.error.text
    assert seen.here


def test_what_asks_for_another_decomposition_begins_none(tmp_path: Path, seen: Seen) -> None:
    case = methods.make_case("olora", "llama", "LoraConfig", r=2, target_modules=ALL, init_lora_weights="olora")
    directory = made(case, tmp_path, "float32")
    seen.forget()
    ours = by_the_gate(loaded_base(directory, tmp_path / "adapter"), tmp_path / "adapter")
    assert (seen.here, seen.ahead) == (0, 0)
    assert_same(ours, methods.load_adapter(methods.load_base(case.base, directory), tmp_path / "adapter"))
