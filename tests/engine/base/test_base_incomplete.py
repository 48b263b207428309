"""Tensors that the base's files lack: the adapter brings them whole, or every load makes them up anew."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from peft import LNTuningConfig, LoraConfig

from merge_gate.engine.base import accounting
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Severity, Verdict
from tests.support import models
from tests.support.engine.base_headers import stored_tensors
from tests.support.gating import Gate, one_thread

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
Config = LoraConfig | LNTuningConfig


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)


def on(name: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=[name, "q_proj"], task_type="CAUSAL_LM")


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
def test_a_parameter_that_no_file_has_makes_the_base_incomplete(
    lacking: str, adapter: Config, brought: bool, tmp_path: Path
) -> None:
    base, out = lacking_one(lacking, adapter, tmp_path)
    with one_thread():
        judgement = Gate().judge(out, base)
    expected = (Verdict.PASSED, None) if brought else (Verdict.ERROR, "base-incomplete")
    assert (judgement.verdict, judgement.cause) == expected, str(judgement)
    found = [(one.severity, one.tensor) for one in judgement.findings if one.check == "base-incomplete"]
    assert found == [(Severity.NOTE if brought else Severity.ERROR, lacking)]
    assert not any(one.check == "untrained-tensors" for one in judgement.findings)


def lacking_one(lacking: str, adapter: Config, root: Path) -> tuple[Path, Path]:
    whole, base, out = root / "whole", root / "base", root / "adapter"
    models.make_base("llama", whole)
    models.save_adapter(whole, out, adapter)
    shutil.copytree(whole, base)
    tensors = models.read_tensors(whole, "model.safetensors")
    models.write_tensors(base, {name: one for name, one in tensors.items() if name != lacking}, "model.safetensors")
    return base, out


@pytest.mark.parametrize(
    ("adapter", "made_up"),
    [
        pytest.param(config(), [], id="both are saved"),
        pytest.param(config(trainable_token_indices=[3, 69]), [], id="tokens"),
        pytest.param(config(modules_to_save=["embed_tokens", "lm_head"]), [], id="both are trained"),
        pytest.param(on("embed_tokens"), ["lm_head.weight"], id="a LoRA on the embedding, which is saved alone"),
        pytest.param(on("lm_head"), ["model.embed_tokens.weight"], id="a LoRA on the head, which is saved alone"),
    ],
)
def test_rows_of_a_vocabulary_that_no_file_has_are_warned_of(
    adapter: Config, made_up: list[str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base("llama", base)
    models.save_adapter(base, out, adapter, rows=70)
    assert warned_of(out, base) == made_up


def warned_of(adapter: Path, base: Path) -> list[str | None]:
    with one_thread():
        judgement = Gate().judge(adapter, base)
    assert judgement.verdict is Verdict.PASSED, str(judgement)
    return [one.tensor for one in judgement.findings if one.check == "untrained-tensors"]


# --- an index that leaves a shard out ------------------------------------------------------------------------------

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
    with one_thread():
        model_class = model_class_for(str(base), preflight(str(out), allow_pickle=False), stored_tensors(base))
        account = accounting.account_for(str(base), model_class, "base", stored_tensors(base))
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
