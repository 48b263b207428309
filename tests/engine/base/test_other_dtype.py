"""A base cast from another dtype is what `from_pretrained` gives in that dtype, whatever is merged into it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.weights import read_weights
from merge_gate.engine.base import loaded_base as bases
from merge_gate.engine.base import other_dtype
from merge_gate.engine.base.loaded_base import Base, ModelClass, load_base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.other_dtype import in_another_dtype
from merge_gate.engine.tensors.hollow import Hollow
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker.child import judge_job
from merge_gate.worker.confine import sandbox
from merge_gate.worker.protocol import BaseLoaded, Event, Group, Job, Merged, Task
from tests.support import methods
from tests.support.engine.base_headers import base_files, stored_tensors
from tests.support.engine.merges import merge_adapter
from tests.support.merged import kept
from tests.support.models import VARIANTS, among_transformers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from merge_gate.records.files import AdapterFiles
    from tests.support.models import Shelf

DTYPES = ["float16", "bfloat16"]
LOADED_AGAIN = {"mixtral", "qwen2-moe", "wav2vec2", "xlm-roberta"}
"""Experts that are fused while they are loaded are not the file's bytes; a weight norm is computed on loading, and a
bias that is tied is not the map's."""


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny bases' tensors are smaller than what is worth a page."""
    monkeypatch.setattr(other_dtype, "LEAST_ELEMENTS", 2)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker bounds its own process; here that is the one of all tests."""
    monkeypatch.setenv(sandbox.SWITCH, "off")


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


def loaded(directory: Path, dtype: str, class_name: str) -> Base:
    return load_base(str(directory), model_class=ModelClass(class_name=class_name), label="base", dtype=dtype)


def two(directory: Path, dtype: str, class_name: str) -> tuple[Base | None, Base]:
    """The base in the dtype, cast from that of its files, and loaded."""
    known = loaded(directory, "auto", class_name)
    cast = in_another_dtype(known, ModelClass(class_name=class_name), str(directory), dtype)
    return cast, loaded(directory, dtype, class_name)


def values(base: Base) -> dict[str, torch.Tensor]:
    with base.filled(base.tensors):
        found = {name: tensor.detach().clone() for name, tensor in base.tensors.items()}
    hidden = {name: buffer for name, buffer in base.model.named_buffers() if name not in found}
    return found | hidden


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name].nan_to_num(), right[name].nan_to_num())
        for name in left
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", methods.BASES)
def test_it_is_what_the_files_give(name: str, dtype: str, architectures: Path) -> None:
    directory = architectures / name
    if not directory.exists():
        methods.save_base(name, directory)
    cast, fresh = two(directory, dtype, type(methods.BASES[name]()).__name__)
    if name in LOADED_AGAIN:
        assert cast is None
        return
    assert cast is not None
    assert same(values(cast), values(fresh))
    assert cast.facts == fresh.facts
    assert cast.stats == fresh.stats
    assert cast.model.dtype == fresh.model.dtype
    assert repr(cast.model.config) == repr(fresh.model.config)
    assert not cast.was_misread()


def outcome(base: Base, files: AdapterFiles) -> tuple[Evidence, dict[str, torch.Tensor]]:
    with kept() as tensors:
        evidence = merge_adapter(base, files, measure_options=MeasureOptions(estimates=True))
    names = [merge.stats.name for merge in evidence.merges]  # an attempt that did not count has others
    return replace(evidence, seconds=0.0), {name: tensors[name] for name in names if name in tensors}


@pytest.mark.parametrize("name", [name for name, one in VARIANTS.items() if name != "prompt-tuning"])
def test_every_kind_of_lora_comes_to_the_same(name: str, shelf: Shelf) -> None:
    dtype = "float16"
    directory, adapter = shelf.base(VARIANTS[name].base), shelf.adapter(name)
    files = preflight(str(adapter), allow_pickle=True)
    model_class = model_class_for(str(directory), files, stored_tensors(directory))
    known = load_base(str(directory), model_class=model_class, label="base")
    cast = in_another_dtype(known, model_class, str(directory), dtype)
    if VARIANTS[name].base == "mixtral":
        assert cast is None
        return
    assert cast is not None
    fresh = load_base(str(directory), model_class=model_class, label="base", dtype=dtype)
    (ours, merged), (theirs, expected) = outcome(cast, files), outcome(fresh, files)
    if "six-labels" not in name:  # whose head no file has
        assert ours == theirs
    assert same(merged, expected)
    assert ours.refusal is None


ON_LLAMA = [case for case in methods.CASES if case.base == "llama"]


@pytest.fixture(scope="module")
def llama(architectures: Path) -> tuple[Path, Base, Base]:
    directory = architectures / "llama-for-methods"
    methods.save_base("llama", directory)
    known, fresh = (loaded(directory, dtype, "LlamaForCausalLM") for dtype in ("auto", "float16"))
    return directory, known, fresh


@pytest.mark.parametrize("case", ON_LLAMA[::2], ids=lambda case: case.name)
def test_every_method_comes_to_the_same(case: methods.Case, llama: tuple[Path, Base, Base], tmp_path: Path) -> None:
    directory, known, fresh = llama
    cast = in_another_dtype(known, ModelClass(class_name="LlamaForCausalLM"), str(directory), "float16")
    assert cast is not None
    methods.save_adapter(case, methods.load_base("llama", directory), tmp_path / "a", base_directory=directory)
    files = preflight(str(tmp_path / "a"), allow_pickle=False)
    (ours, merged), (theirs, expected) = outcome(cast, files), outcome(fresh, files)
    assert repr(ours) == repr(theirs)
    assert same(merged, expected)


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("lora-linear", False),
        ("lora-orthogonal", False),
        ("lora-dora", False),
        ("lora-mica", True),
        ("lora-kasa", True),
    ],
)
def test_no_weight_is_cast_to_load_a_lora_that_reads_none(
    name: str, is_read: bool, llama: tuple[Path, Base, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, known, _ = llama
    cast = in_another_dtype(known, ModelClass(class_name="LlamaForCausalLM"), str(directory), "float16")
    assert cast is not None
    case = methods.find(name)
    methods.save_adapter(case, methods.load_base("llama", directory), tmp_path / "a", base_directory=directory)
    files = preflight(str(tmp_path / "a"), allow_pickle=False)
    filled: list[int] = []
    fill = Hollow.filled
    monkeypatch.setattr(Hollow, "filled", lambda hollow, held: filled.append(len(held)) or fill(hollow, held))
    with methods.quiet():
        load_adapter(cast, files, read_weights(files))
    assert bool(filled) is is_read
    assert not cast.was_misread()


# --- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan])
def test_what_the_dtype_cannot_hold_is_counted(value: float, shelf: Shelf, tmp_path: Path) -> None:
    directory = tmp_path / "base"
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama-bfloat16"), dtype="auto")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = value
    model.save_pretrained(directory)
    cast, fresh = two(directory, "float16", "LlamaForCausalLM")
    assert cast is not None
    assert [one.name for one in cast.facts.nonfinite] == ["lm_head.weight"]
    assert cast.facts == fresh.facts
    assert cast.stats == fresh.stats


# --- where it cannot be shown to be the same, the files are loaded again ---------------------------------------------


def test_what_was_cast_before_is_not_cast_again(shelf: Shelf) -> None:
    shape = ModelClass(class_name="LlamaForCausalLM")
    known = loaded(shelf.base("llama"), "bfloat16", shape.class_name)
    assert in_another_dtype(known, shape, str(shelf.base("llama")), "float16") is None


def test_a_dtype_that_is_no_cast_away_is_loaded(shelf: Shelf) -> None:
    shape = ModelClass(class_name="LlamaForCausalLM")
    known = loaded(shelf.base("llama"), "auto", shape.class_name)
    assert in_another_dtype(known, shape, str(shelf.base("llama")), "float64") is None


class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A real load ends with the class's own step, which may read or write weights: here it scales one."""

    factor = 2.0

    def tie_weights(self, *positional: Any, **named: Any) -> Any:
        found = super().tie_weights(*positional, **named)
        if self.factor != 1:
            self.model.norm.weight.data.mul_(self.factor)
        return found


class Unscaled(Scaled):
    factor = 1.0


@pytest.mark.parametrize("model_class", [Scaled, Unscaled])
def test_a_class_that_changes_what_it_loads_is_loaded(model_class: type[Scaled], shelf: Shelf) -> None:
    known = loaded(shelf.base("llama"), "auto", "LlamaForCausalLM")
    with among_transformers(model_class) as name:
        cast = in_another_dtype(known, ModelClass(class_name=name), str(shelf.base("llama")), "float16")
    assert (cast is None) == (model_class is Scaled)


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "float16", "float32"), ["bfloat16"]),
        (("float16", "bfloat16"), ["auto"]),
        (("float32",), ["auto"]),
        (("auto", "float16"), ["auto"]),
        (("float16", "float64"), ["auto", "float64"]),
    ],
)
def test_the_files_are_loaded_once_as_they_are(
    dtypes: tuple[str, ...], expected: list[str], shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = heard(monkeypatch)
    events = run(shelf.base("llama-bfloat16"), shelf.adapter("bfloat16-base"), dtypes)
    assert loads == expected
    facts = [event.facts for event in events if isinstance(event, BaseLoaded)]
    assert [one.dtype for one in facts] == [dtype.replace("auto", "bfloat16") for dtype in dtypes]
    merged = [event.evidence for event in events if isinstance(event, Merged)]
    assert [one.base for one in merged] == facts
    assert all(one.refusal is None and one.parameters_checked == one.parameters_total for one in merged)
    assert all(one.layers_by_peft == 0 for one in merged)


def test_what_would_not_be_mapped_is_not_loaded_for_a_cast(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = heard(monkeypatch)
    events = run(shelf.base("mixtral"), shelf.adapter("per-expert"), ("float16",))
    assert loads == ["float16"]
    assert [type(event).__name__ for event in events][-1] == "Merged"


def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes in which bases will have been loaded from their files."""
    loads: list[str] = []
    load = bases.load_base

    def from_files(*directory: str, **settings: Any) -> Base:
        loads.append(settings["dtype"])
        return load(*directory, **settings)

    monkeypatch.setattr(bases, "load_base", from_files)
    return loads


def run(base: Path, adapter: Path, dtypes: tuple[str, ...]) -> list[Event]:
    files = preflight(str(adapter), allow_pickle=False)
    groups = tuple(
        Group(
            base=BaseKey(model="base", revision=None, dtype=dtype, quantization="none"),
            directory=str(base),
            files=base_files(base),
            tasks=(Task(index=index, files=(files,)),),
        )
        for index, dtype in enumerate(dtypes)
    )
    return list(judge_job(Job(groups=groups, device="cpu"), lambda _: None, Sandbox()))


def test_files_that_changed_in_between_are_loaded_again(shelf: Shelf, tmp_path: Path) -> None:
    directory = tmp_path / "base"
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama-bfloat16"), dtype="auto")
    model.save_pretrained(directory)
    files = preflight(str(shelf.adapter("bfloat16-base")), allow_pickle=False)
    groups = tuple(
        Group(
            base=BaseKey(model="llama", revision=None, dtype=dtype, quantization="none"),
            directory=str(directory),
            files=base_files(directory),
            tasks=(Task(index=index, files=(files,)),),
        )
        for index, dtype in enumerate(("bfloat16", "float16"))
    )
    seen = []
    for event in judge_job(Job(groups=groups, device="cpu"), lambda _: None, Sandbox()):
        if isinstance(event, Merged):
            tensors = load_file(directory / "model.safetensors")
            tensors["model.norm.weight"][3] = math.nan
            (directory / "model.safetensors").unlink()  # the mapping of the old one lives on
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        if isinstance(event, BaseLoaded):
            seen.append(len(event.facts.nonfinite))
    assert seen == [0, 1]


@pytest.mark.parametrize("name", ["tall", "dora", "dora-all-linear"])
def test_an_adapter_in_blocks_leaves_no_cast_behind(name: str, shelf: Shelf) -> None:
    """Memory: each cast is let go of after its layer, also where PEFT reads the weights of DoRA to begin with."""
    directory = shelf.base(VARIANTS[name].base)
    shape = ModelClass(class_name="LlamaForCausalLM")
    cast = in_another_dtype(loaded(directory, "auto", shape.class_name), shape, str(directory), "float16")
    assert cast is not None
    assert cast.hollow is not None
    evidence = merge_adapter(cast, preflight(str(shelf.adapter(name)), allow_pickle=False))
    assert (evidence.refusal, evidence.layers_by_peft) == (None, 0)
    assert evidence.layers_in_blocks > 0
    assert not any(place.kept or cast.hollow._exists(place) for place in cast.hollow._places.values())
