"""A base on its headers: what contradicts itself is refused, what is not part of the merge is listed."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merge_gate.engine.base import accounting
from merge_gate.engine.base.loaded_base import (
    ModelClass,
    Source,
    declared,
    refuse_other_packing,
    refuse_unknown_format,
)
from merge_gate.engine.base.tensor_map import tensor_map
from merge_gate.engine.tensors.quantized import loaded_dtypes
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Quantization
from tests.support import models
from tests.support.engine.base_headers import stored_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.models import Shelf, Tensors

O_PROJ = "model.layers.1.self_attn.o_proj"
LLAMA = ModelClass(class_name="LlamaForCausalLM")
WEIGHTS = "model.safetensors"


def changed(shelf: Shelf, root: Path, tensors: Tensors, *, without: tuple[str, ...] = (), base: str = "llama") -> Path:
    """A copy of a base with other tensors in its file."""
    directory = root / "base"
    shutil.copytree(shelf.base(base), directory)
    held = {name: one for name, one in models.read_tensors(directory, WEIGHTS).items() if name not in without}
    models.write_tensors(directory, held | tensors, WEIGHTS)
    return directory


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool])
def test_integers_for_a_float_parameter_are_refused(dtype: torch.dtype, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {f"{O_PROJ}.weight": torch.ones(32, 32).to(dtype)})
    with pytest.raises(CannotJudge, match="codes_for_numbers") as refused:
        accounting.account_for(str(base), LLAMA, "b", stored_tensors(base))
    assert refused.value.refusal.fields["tensor"] == f"{O_PROJ}.weight"


@pytest.mark.parametrize(
    "part", ["weight_scale", "weight_scale_inv", "scales", "SCB", "qweight", "weight.absmax", "base_layer.weight"]
)
def test_a_part_of_a_loaded_weight_that_is_not_loaded_is_refused(part: str, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {f"{O_PROJ}.{part}": torch.ones(2)})
    with pytest.raises(CannotJudge, match="stored_tensors_left_out") as refused:
        accounting.account_for(str(base), LLAMA, "b", stored_tensors(base))
    assert refused.value.refusal.fields["names"] == (f"{O_PROJ}.{part}",)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.fc.weight",
        "model.layers.2.self_attn.o_proj.weight_scale",
        "model.layers.1.self_attn.k_scale",
        "model.layers.1.self_attn.k_proj.k_scale",
        "visual.patch_embed.proj.weight",
        "value_head.weight",
    ],
)
def test_a_tensor_that_is_not_part_of_the_model_is_listed(name: str, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {name: torch.ones(2, 2)})
    account = accounting.account_for(str(base), LLAMA, "b", stored_tensors(base))
    assert (account.unloaded, account.incomplete) == ((name,), ())


def test_a_buffer_that_earlier_releases_stored_is_not_listed(shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert accounting.account_for(str(base), LLAMA, "b", stored_tensors(base)).unloaded == ()


def test_a_missing_parameter_of_the_own_class_is_named(shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {}, without=("lm_head.weight", "model.norm.weight"))
    account = accounting.account_for(str(base), LLAMA, "b", stored_tensors(base))
    assert account.incomplete == ("lm_head.weight", "model.norm.weight")
    assert account.map is not None
    facts = accounting.not_stored("b", account.incomplete, account.map, str(base)).fields
    assert (facts["names"], facts["read"], facts["elsewhere"]) == (account.incomplete, (WEIGHTS,), ())


def test_a_head_of_another_task_and_a_pooler_need_not_be_stored(shelf: Shelf, tmp_path: Path) -> None:
    head = ModelClass(class_name="LlamaForSequenceClassification", num_labels=2)
    assert (
        accounting.account_for(str(shelf.base("llama")), head, "b", stored_tensors(shelf.base("llama"))).incomplete
        == ()
    )
    poolers = ("pooler.dense.weight", "pooler.dense.bias")
    base = changed(shelf, tmp_path, {}, without=poolers, base="bert")
    account = accounting.account_for(str(base), ModelClass(class_name="BertModel"), "b", stored_tensors(base))
    assert account.incomplete == ()
    assert account.map is not None
    assert account.map.missing == set(poolers)


def test_a_tied_head_is_stored_once(shelf: Shelf) -> None:
    account = accounting.account_for(
        str(shelf.base("llama-tied")), LLAMA, "b", stored_tensors(shelf.base("llama-tied"))
    )
    assert (account.incomplete, account.unloaded) == ((), ())


def test_one_expert_that_is_not_there_makes_the_base_incomplete(shelf: Shelf, tmp_path: Path) -> None:
    held = models.read_tensors(shelf.base("mixtral"), WEIGHTS)
    lost = max(name for name in held if "experts" in name)
    base = changed(shelf, tmp_path, {}, without=(lost,), base="mixtral")
    account = accounting.account_for(str(base), ModelClass(class_name="MixtralForCausalLM"), "b", stored_tensors(base))
    assert [name.rpartition(".experts.")[0] for name in account.incomplete] == ["model.layers.1.mlp"]


def test_the_map_has_both_directions(shelf: Shelf) -> None:
    import transformers  # noqa: PLC0415 - a test of its class alone

    directory = str(shelf.base("mixtral"))
    found = tensor_map(transformers.MixtralForCausalLM, directory, stored_tensors(directory))
    parameters = {name for name, _ in found.model.named_parameters()}
    assert parameters == set(found.sources)
    assert set(found.targets()) == set(found.stored)
    fused = found.sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(fused) == 2 * 4
    assert all(found.targets()[name] == ("model.layers.0.mlp.experts.gate_up_proj",) for name in fused)


def test_parameters_are_counted_by_dtype_only_if_dtypes_differ() -> None:
    weight, norm = (
        torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size, dtype in ((6, torch.bfloat16), (2, torch.float32))
    )
    assert loaded_dtypes([norm, weight]) == (("bfloat16", 6), ("float32", 2))
    assert loaded_dtypes([weight]) == ()


def test_a_plain_base_that_loads_in_another_dtype_is_refused(tmp_path: Path) -> None:
    source = Source(directory=str(tmp_path), label="b")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4).half())
    for dtype in ("auto", "float32", "float16"):
        refuse_other_packing(model, dataclasses.replace(source, dtype=dtype), "none")
    with pytest.raises(CannotJudge, match=r"loaded_otherwise.*'asked_dtype': 'bfloat16'"):
        refuse_other_packing(model, dataclasses.replace(source, dtype="bfloat16"), "none")


def test_a_base_that_loads_in_another_quantization_is_refused(tmp_path: Path) -> None:
    source = Source(directory=str(tmp_path), label="b", quantization=Quantization.BNB_8BIT)
    with pytest.raises(CannotJudge, match=r"loaded_otherwise.*'quantization': 'none'"):
        refuse_other_packing(torch.nn.Linear(4, 4), source, "none")


def test_a_quantization_unknown_to_transformers_is_refused() -> None:
    method = declared(LlamaConfig(quantization_config={"quant_method": "no-such-method"}))
    with pytest.raises(CannotJudge, match=r"quantization_unknown.*'no-such-method'"):
        refuse_unknown_format(method, "b")


def test_stale_buffers_are_those_of_the_models_own_modules(shelf: Shelf, tmp_path: Path) -> None:
    """What else transformers merely ignores, such as an MTP head, is lost if a merge lacks it."""
    stale = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.position_ids",
    ]
    ignored = [
        "mtp.inv_freq",
        "mtp.layers.0.fc.weight",
        "mtp.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.bias",
    ]
    base = changed(shelf, tmp_path, {name: torch.ones(4) for name in (*stale, *ignored)})
    found = tensor_map(LlamaForCausalLM, str(base), stored_tensors(base))
    found = dataclasses.replace(found, unexpected=frozenset())
    assert set(found.unloaded) == {*stale, *ignored}
    assert set(accounting.stale_buffers(found)) == set(stale)
    found = dataclasses.replace(found, unexpected=frozenset(stale[:1]))
    assert set(accounting.stale_buffers(found)) == set(stale[1:])


@pytest.mark.parametrize(("shape", "is_mask"), [((1, 1, 4, 4), True), ((32,), False)])
def test_a_stored_mask_is_stale_and_a_bias_is_not(
    shape: tuple[int, ...], is_mask: bool, shelf: Shelf, tmp_path: Path
) -> None:
    name = "transformer.h.0.attn.bias"
    base = changed(shelf, tmp_path, {name: torch.ones(shape)}, base="gpt2")
    found = tensor_map(GPT2LMHeadModel, str(base), stored_tensors(base))
    assert list(found.unloaded) == [name]
    assert accounting.stale_buffers(found) == ((name,) if is_mask else ())
