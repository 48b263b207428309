"""A slice of the sweep over every model type (tests/tools/tensor_maps.py): each kind of conversion, and plain types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from merge_gate.engine.base import accounting, tensor_map
from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.tensor_map import NoMapError
from tests.support.engine import tensor_maps
from tests.support.engine.base_headers import stored_tensors
from tests.support.gating import one_thread
from tests.support.models import Shelf
from tests.support.sampled import sampled

SLICE = (
    "albert", "bamba", "bart", "bert", "blip", "bloom", "clip", "cohere", "deberta-v2", "deepseek_v3", "distilbert",
    "electra", "falcon", "gemma", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "granite", "jamba", "llama", "llava",
    "mamba", "marian", "mistral", "mixtral", "mpt", "olmo", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "resnet", "roberta", "siglip", "t5", "vit", "wav2vec2", "whisper",
    "xlm-roberta",
)  # fmt: skip


@pytest.mark.parametrize("model_type", sampled(SLICE, [*SLICE][::4]))
def test_the_map_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    with one_thread():
        checked = tensor_maps.check(model_type, tmp_path)
    assert not checked.skipped
    assert checked.parameters
    assert checked.wrong == ()


def test_a_release_with_another_loader_gives_no_map(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The load itself then has to account for the base."""
    monkeypatch.delattr(transformers.core_model_loading, "WeightConverter")
    directory = str(shelf.base("llama"))
    with pytest.raises(NoMapError, match="transformers"), tensor_map.traced():
        pass
    llama = ModelClass(class_name="LlamaForCausalLM")
    assert accounting.account_for(directory, llama, "b", stored_tensors(directory)).map is None


def test_the_loader_is_as_it_was_after_a_recording(shelf: Shelf) -> None:
    loader = transformers.core_model_loading
    before = (loader.rename_source_key, loader.WeightTransform.add_tensor, loader.WeightConverter.convert)
    stored = stored_tensors(shelf.base("llama"))
    tensor_map.tensor_map(transformers.LlamaForCausalLM, str(shelf.base("llama")), stored, dtype=torch.float32)
    assert before == (loader.rename_source_key, loader.WeightTransform.add_tensor, loader.WeightConverter.convert)
