"""A quantized directory is read by the names of the base's model: tied tensors, and experts that are fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from merge_gate._internal.errors import EngineError
from merge_gate.engine.base.tensor_map import tensor_map
from merge_gate.features.quantized.checkpoint import open_checkpoint
from merge_gate.features.quantized.consumer import ByModelNames
from tests.support.quantized.checkpoints import WEIGHTS, Tensors, read, saved
from tests.support.quantized.folded import SETTINGS

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def in_8_bits(tensors: Tensors) -> Tensors:
    """Matrices of layers as compressed-tensors stores them, without loss: their values are codes."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "layers" in name:
            made[name], made[f"{name}_scale"] = tensor.to(torch.int8), torch.ones(len(tensor), 1)
        else:
            made[name] = tensor
    return made


def opened(path: Path, config: Any, change: Tensors, aliases: dict[str, str] | None = None) -> tuple[ByModelNames, Any]:
    """A release of a model whose values are codes, with some stored tensors changed; and the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randint(-127, 128, parameter.shape).float()
    model.tie_weights()
    model.save_pretrained(path / "base")
    stored = load_file(path / "base" / WEIGHTS)
    base = saved(path / "base", stored, model.config.to_dict())
    release = saved(path / "release", in_8_bits(stored | change), {**config.to_dict(), "quantization_config": SETTINGS})
    mapping = tensor_map(getattr(transformers, type(model).__name__), str(path / "base"), base.stored)
    return ByModelNames(open_checkpoint(release, base, "release", aliases or {}), mapping, aliases or {}), model


def test_each_name_of_a_tied_tensor_has_its_own_values(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    head = torch.randn(64, 64)
    release, model = opened(tmp_path / "untied", config, {"lm_head.weight": head}, aliases)
    assert release.added == ()
    assert torch.equal(read(release, "lm_head.weight"), head)
    assert torch.equal(read(release, "model.embed_tokens.weight"), model.lm_head.weight)
    assert "lm_head.weight" not in opened(tmp_path / "tied", config, {}, aliases)[0]


def test_fused_experts_have_the_values_of_the_stored_ones(tmp_path: Path) -> None:
    release, model = opened(tmp_path, MixtralConfig(**SIZES, num_local_experts=3), {})
    for name, values in model.state_dict().items():
        assert release.shape(name) == tuple(values.shape)
        assert torch.equal(read(release, name), values), name
    assert release.kind("model.layers.0.mlp.experts.gate_up_proj") == "8 bits"


def test_an_expert_of_another_size_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=3)
    opened(tmp_path, config, {})
    names = load_file(tmp_path / "base" / WEIGHTS)
    name = next(name for name in names if "experts.0" in name)
    release = {**in_8_bits(names), name: torch.zeros(7, 64)}
    release.pop(f"{name}_scale")
    files = saved(tmp_path / "release", release, {"quantization_config": SETTINGS})
    base = saved(tmp_path / "base", names, config.to_dict())
    mapping = tensor_map(transformers.MixtralForCausalLM, str(tmp_path / "base"), base.stored)
    with pytest.raises(EngineError, match=r"in the shape \[7, 64\], expected"):
        ByModelNames(open_checkpoint(files, base, "release"), mapping)
