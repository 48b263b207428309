"""Which files the numbers of an index imply, and which of them it does not name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import peft
import pytest
import transformers

from merge_gate.engine.shards import refuse_lost_shards, refuse_strangers, shards_left_out
from merge_gate.errors import EngineError
from tests.support import methods

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"


def shard(number: int, of: int = 3) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


@pytest.mark.parametrize(
    ("named", "left_out"),
    [
        ([shard(1), shard(2), shard(3)], []),
        ([shard(1), shard(3)], [shard(2)]),
        ([shard(1)], [shard(2), shard(3)]),
        (["part-a.safetensors", "part-b.safetensors"], []),
        ([shard(1, 1), "extra.safetensors"], []),
        ([f"shards/{shard(1)}", f"shards/{shard(3)}"], [f"shards/{shard(2)}"]),
        ([shard(0), shard(1), shard(2)], []),
        ([shard(0), shard(2)], [shard(1)]),
        (["model-1-of-2.bin"], ["model-2-of-2.bin"]),
        (["model-1-of-999999999999.bin"], []),
    ],
)
def test_what_the_numbers_imply_is_named_or_left_out(named: list[str], left_out: list[str], tmp_path: Path) -> None:
    weight_map = {f"layers.{number}.weight": name for number, name in enumerate(named)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert shards_left_out(tmp_path) == left_out


def tiny() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))


def test_a_model_of_which_the_files_hold_nothing_is_refused() -> None:
    model = tiny()
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(EngineError, match="holds none of the tensors of LlamaForCausalLM"):
        refuse_strangers(model, names, "b")
    refuse_strangers(model, names - {"lm_head.weight"}, "b")


def test_a_model_that_brought_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with methods.quiet():
        peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(EngineError, match="beside its weights"):
        refuse_strangers(model, set(), "b")


def test_a_body_that_the_index_lacks_is_refused_and_a_head_is_not(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard(1)}}))
    refuse_lost_shards(tiny(), str(tmp_path), {"lm_head.weight"}, "b")
    with pytest.raises(EngineError, match=r"up 1 tensor: model\.norm\.weight"):
        refuse_lost_shards(tiny(), str(tmp_path), {"lm_head.weight", "model.norm.weight"}, "b")


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    assert shards_left_out(tmp_path) == []
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard(1)}}))
    (tmp_path / "model.safetensors").touch()
    assert shards_left_out(tmp_path) == []
