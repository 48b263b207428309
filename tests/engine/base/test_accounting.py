"""A base on its headers: what contradicts itself is refused, and what its files lack is brought or made up.

tests/test_bases.py has the bases that pass, and most of those that do not.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from merge_gate.engine.base import accounting
from merge_gate.engine.base.loaded_base import ModelClass, Source, refuse_other_packing
from merge_gate.engine.base.tensor_map import tensor_map
from merge_gate.engine.tensors.quantized import loaded_dtypes
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Quantization, Severity, Verdict
from tests.support import models
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import edited_base
from tests.support.gating import Gate
from tests.support.models import Shelf, Tensors

pytestmark = pytest.mark.usefixtures("single_thread")

O_PROJ = "model.layers.1.self_attn.o_proj"
LLAMA = ModelClass(class_name="LlamaForCausalLM")


def changed(shelf: Shelf, root: Path, tensors: Tensors, base: str = "llama") -> Path:
    """A copy of a base with other tensors in its file."""
    return edited_base(shelf.base(base), root / "base", lambda _: tensors)


@pytest.mark.parametrize(
    "part", ["weight_scale", "weight_scale_inv", "scales", "SCB", "qweight", "weight.absmax", "base_layer.weight"]
)
def test_a_part_of_a_loaded_weight_that_is_not_loaded_is_refused(part: str, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path, {f"{O_PROJ}.{part}": torch.ones(2)})
    with pytest.raises(CannotJudge, match="stored_tensors_left_out") as refused:
        accounting.account_for(str(base), LLAMA, "b", stored_tensors(base))
    assert refused.value.refusal.fields["names"] == (f"{O_PROJ}.{part}",)


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
def test_a_stored_mask_is_stale_and_a_bias_is_not(shape, is_mask, shelf, tmp_path) -> None:
    name = "transformer.h.0.attn.bias"
    base = changed(shelf, tmp_path, {name: torch.ones(shape)}, base="gpt2")
    found = tensor_map(GPT2LMHeadModel, str(base), stored_tensors(base))
    assert list(found.unloaded) == [name]
    assert accounting.stale_buffers(found) == ((name,) if is_mask else ())


Q = "model.layers.0.self_attn.q_proj"
Config = LoraConfig | LNTuningConfig


def config(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", *targets], task_type="CAUSAL_LM", **settings)


NORMS = LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("lacking", "adapter", "brought"),
    [
        pytest.param(f"{Q}.weight", config(), False, id="a delta on a weight"),
        pytest.param(f"{Q}.weight", config(use_dora=True), False, id="DoRA on a weight"),
        pytest.param(f"{Q}.bias", config(), False, id="a bias next to the weight that is merged"),
        pytest.param(f"{Q}.bias", config(lora_bias=True), False, id="a delta on a bias"),
        pytest.param(f"{Q}.bias", config(bias="all"), True, id="a trained bias"),
        pytest.param("lm_head.weight", config(modules_to_save=["lm_head"]), True, id="a trained head"),
        pytest.param("lm_head.weight", config(), False, id="a head that the adapter lacks"),
        pytest.param("model.norm.weight", NORMS, True, id="a trained norm"),
        pytest.param("model.embed_tokens.weight", config(trainable_token_indices=[1, 2]), False, id="some rows"),
    ],
)
def test_a_parameter_that_no_file_has_makes_the_base_incomplete(lacking, adapter, brought, shelf, tmp_path) -> None:
    out = tmp_path / "adapter"
    models.save_adapter(shelf.base("llama"), out, adapter)
    base = edited_base(shelf.base("llama"), tmp_path / "base", lambda tensors: [tensors.pop(lacking)])
    judgement = Gate().judge(out, base)
    expected = (Verdict.PASSED, None) if brought else (Verdict.ERROR, "base-incomplete")
    assert (judgement.verdict, judgement.cause) == expected, str(judgement)
    found = [(one.severity, one.tensor) for one in judgement.findings if one.check == "base-incomplete"]
    assert found == [(Severity.NOTE if brought else Severity.ERROR, lacking)]
    assert not any(one.check == "untrained-tensors" for one in judgement.findings)


@pytest.mark.parametrize(
    ("adapter", "made_up"),
    [
        pytest.param(config(), [], id="both are saved"),
        pytest.param(config(trainable_token_indices=[3, 69]), [], id="tokens"),
        pytest.param(config(modules_to_save=["embed_tokens", "lm_head"]), [], id="both are trained"),
        pytest.param(config("embed_tokens"), ["lm_head.weight"], id="a LoRA on the embedding, which is saved alone"),
        pytest.param(config("lm_head"), ["model.embed_tokens.weight"], id="a LoRA on the head, which is saved alone"),
    ],
)
def test_rows_of_a_vocabulary_that_no_file_has_are_warned_of(adapter, made_up, tmp_path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base("llama", base)
    models.save_adapter(base, out, adapter, rows=70)
    assert warned_of(out, base) == made_up


def warned_of(adapter: Path, base: Path) -> list[str | None]:
    judgement = Gate().judge(adapter, base)
    assert judgement.verdict is Verdict.PASSED, str(judgement)
    return [one.tensor for one in judgement.findings if one.check == "untrained-tensors"]


INDEX = "model.safetensors.index.json"


def without_a_shard(base: Path, *, needed: bool, keep_file: bool = True) -> str:
    """The index names nothing of the second shard any more; where that is not `needed`, the first holds its tensors."""
    index = json.loads((base / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    first, second = shards[:2]
    if not needed:
        moved = models.read_tensors(base, first) | models.read_tensors(base, second)
        models.write_tensors(base, moved, first)
    index["weight_map"] = {
        name: first if shard == second else shard
        for name, shard in index["weight_map"].items()
        if shard != second or not needed
    }
    (base / INDEX).write_text(json.dumps(index))
    if not keep_file:
        (base / second).unlink()
    return second


@pytest.mark.parametrize("keep_file", [True, False], ids=["the file is there", "the file is gone as well"])
def test_a_base_whose_index_leaves_a_shard_out_is_refused(keep_file: bool, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base("llama-sharded", base)
    models.save_adapter(base, out, config())
    lost = without_a_shard(base, needed=True, keep_file=keep_file)
    account = accounting.account_for(str(base), LLAMA, "base", stored_tensors(base))
    judgement = Gate().judge(out, base)
    assert (judgement.verdict, judgement.cause) == (Verdict.ERROR, "base-incomplete")
    assert account.map is not None
    facts = accounting.not_stored("base", account.incomplete, account.map, str(base)).fields
    assert (lost in facts["elsewhere"]) is keep_file
    assert facts["names"] == account.incomplete


def test_a_shard_that_nothing_needs_may_be_left_out(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base("llama-sharded", base)
    models.save_adapter(base, out, config())
    without_a_shard(base, needed=False)
    assert warned_of(out, base) == []
