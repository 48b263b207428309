"""A GGUF file has the base's architecture, settings, and tensors, or the difference is reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from merge_gate._internal.errors import EngineError
from merge_gate.features.quantized.gguf_release import GgufRelease
from tests.support.quantized.checkpoints import read, requantized
from tests.support.quantized.gguf_files import converted, keys_of, write

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {
    "mixtral": ("llama", MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen2_moe": (
        "qwen2moe",
        Qwen2MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=96, shared_expert_intermediate_size=32),
    ),
    "qwen3_moe": ("qwen3moe", Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=96, head_dim=16)),
}
ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
Tensors = dict[str, tuple[torch.Tensor, Type]]


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def tensors_of(model: Any, architecture: str) -> Tensors:
    """The tensors as llama.cpp's converter stores them: experts apart by their layers, and stacked."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], model.config.num_hidden_layers)
    made: dict[str, torch.Tensor] = {}
    for name, values in model.state_dict().items():
        stem = re.sub(r"\.(weight|bias)$", "", name)
        if "gate_up_proj" in stem:
            block = f"blk.{stem.split('.')[2]}"
            made[f"{block}.ffn_gate_exps.weight"], made[f"{block}.ffn_up_exps.weight"] = values.chunk(2, 1)
        else:
            last = name.removeprefix(stem) or ".weight"
            is_transposed = architecture == "gpt2" and ".h." in name and values.dim() > 1
            used = values[0] if "shared_expert_gate" in name else values.T if is_transposed else values
            made[names.get_name(stem) + last] = converted(name, used, model.config) if architecture == "llama" else used
    return {name: (values.contiguous(), Type.F32) for name, values in made.items()}


Open = Callable[..., GgufRelease]


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A file of a model, and its release."""
    with ExitStack() as stack:

        def made(model: Any, architecture: str, tensors: Tensors, keys: Mapping[str, float] | None = None) -> Any:
            path = tmp_path / "model.gguf"
            write(path, architecture, tensors, keys_of(model.config) if keys is None else keys)
            return GgufRelease(stack.enter_context(path.open("rb")), model)

        yield made


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_have_the_values_of_the_model(kind: str, opened: Open) -> None:
    architecture, config = EXPERTS[kind]
    model = model_of(config)
    release = opened(model, architecture, tensors_of(model, architecture))
    assert (release.added, release.settings) == ((), ())
    for name, values in model.state_dict().items():
        assert tuple(release.shape(name)) == tuple(values.shape) or "expert_gate" in name
        assert torch.equal(read(release, name).view(values.shape), values), name


@pytest.mark.parametrize("kind", [*EXPERTS, "gpt2"])
@pytest.mark.parametrize("type_", [Type.Q8_0, Type.Q4_0])
def test_values_are_quantized_again_as_the_release_is(kind: str, type_: Type, opened: Open) -> None:
    architecture, config = EXPERTS.get(kind, ("gpt2", GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4)))
    model = model_of(config)
    tensors = {name: (values, type_) for name, (values, _) in tensors_of(model, architecture).items()}
    release = opened(model, architecture, tensors, {"block_count": config.num_hidden_layers})
    for name, values in model.state_dict().items():
        assert read(release, name).shape == values.shape or "expert_gate" in name
        again = requantized(release, name, values)
        assert again is None if values.dim() < 2 or "expert_gate" in name else torch.equal(again, read(release, name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.pop("blk.0.ffn_up_exps.weight"), "expected two tensors of one shape"),
        (lambda own: own.update({"blk.0.ffn_up_exps.weight": (torch.zeros(3, 32, 64), Type.F32)}), "of one shape"),
        (lambda own: own.update({"blk.1.ffn_up.0.weight": (torch.zeros(96, 64), Type.F32)}), "one expert each"),
        (lambda own: own.update({"blk.0.ffn_down_exps": own["blk.0.ffn_down_exps.weight"]}), "expected one tensor"),
    ],
)
def test_experts_that_cannot_be_joined_are_refused(change: Callable[[Tensors], Any], words: str, opened: Open) -> None:
    model = model_of(EXPERTS["mixtral"][1])
    tensors = tensors_of(model, "llama")
    change(tensors)
    with pytest.raises(EngineError, match=words):
        opened(model, "llama", tensors)


def test_the_text_model_of_a_multimodal_base_is_read(opened: Open) -> None:
    """Its layers for images have the names of layers of a text model."""
    vision = SIZES | {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3}
    vision |= {"hidden_size": 32, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    text = {name.replace("model.language_model.", "model."): values for name, values in model.state_dict().items()
            if "language_model" in name or "lm_head" in name}  # fmt: skip
    alone = model_of(config.text_config)
    alone.load_state_dict(text)
    release = opened(model, "llama", tensors_of(alone, "llama"), keys_of(config.text_config))
    assert (release.added, release.settings) == ((), ())
    for name, values in model.state_dict().items():
        is_text = "language_model" in name or "lm_head" in name
        assert (name in release, release.expects(name)) == (is_text, is_text)
        assert not is_text or torch.equal(read(release, name), values)


def test_a_file_of_another_architecture_is_refused(opened: Open) -> None:
    model = model_of(LlamaConfig(**SIZES))
    with pytest.raises(EngineError, match=r'the architecture "qwen2", expected .* model_type is "llama"'):
        opened(model, "qwen2", tensors_of(model, "llama"))


def test_tensors_that_the_base_does_not_have_are_named(opened: Open) -> None:
    model = model_of(LlamaConfig(**SIZES))
    tensors = tensors_of(model, "llama")
    added = {"blk.0.attn_q.bias": torch.ones(64), "blk.2.attn_norm.weight": torch.ones(64)}
    release = opened(model, "llama", {**tensors, **{name: (values, Type.F32) for name, values in added.items()}})
    assert set(release.added) == set(added)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_count", 3, "2"),
        ("attention.head_count", 8, "4"),
        ("attention.layer_norm_rms_epsilon", 1e-5, "1e-06"),
        ("rope.freq_base", 500_000.0, "10000.0"),
        ("rope.freq_base", float("nan"), "10000.0"),
        ("rope.scaling.factor", 8.0, "1.0"),
        ("rope.scale_linear", 8.0, "1.0"),
    ],
)
def test_keys_that_differ_from_the_config_are_named(key: str, value: float, expected: str, opened: Open) -> None:
    model = model_of(LlamaConfig(**SIZES))
    release = opened(model, "llama", tensors_of(model, "llama"), keys_of(model.config) | {key: value})
    assert [(setting.name, setting.expected) for setting in release.settings] == [(f"llama.{key}", expected)]


def test_a_type_that_nothing_quantizes_has_noise_for_its_bits(opened: Open) -> None:
    model, name = model_of(LlamaConfig(**SIZES | {"hidden_size": 256})), "model.embed_tokens.weight"
    release = opened(model, "llama", tensors_of(model, "llama"))
    (tensor,) = release._tensors[name]
    release._tensors = {name: (tensor._replace(type=Type.IQ3_S.value, size_bytes=tensor.shape[0] * 110),)}
    values = model.get_input_embeddings().weight.detach().float()
    again = requantized(release, name, values)
    assert again is not None
    assert 0.03 < float((again - values).norm() / values.norm()) < 0.3


def test_a_key_that_llama_cpp_takes_as_a_default_is_compared(opened: Open) -> None:
    model = model_of(LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}))
    release = opened(model, "llama", tensors_of(model, "llama"), {"block_count": 2})
    assert {setting.name: setting.actual for setting in release.settings} == {
        "llama.rope.freq_base": "10000.0",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": "1.0",
    }


@pytest.mark.parametrize(
    ("factor", "actual"), [(1.0, None), (2.0, "8 factors up to 16"), (None, "absent")], ids=["right", "wrong", "absent"]
)
def test_factors_of_rotary_embeddings_are_compared(factor: float | None, actual: str | None, opened: Open) -> None:
    """As llama.cpp's converter computes them (LlamaModel.generate_extra_tensors)."""
    model = model_of(LlamaConfig(**SIZES, max_position_embeddings=512, rope_parameters=LLAMA3))
    tensors = tensors_of(model, "llama")
    if factor is not None:
        powers = torch.arange(0, 16, 2) / 16
        lengths = 2 * torch.pi * 500_000.0**powers
        smooth = (64 / lengths - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / 8 + smooth)
        factors = torch.where(lengths < 64 / 4, 1, torch.where(lengths > 64 / 1, 8, middle))
        tensors["rope_freqs.weight"] = factors * factor, Type.F32
    release = opened(model, "llama", tensors)
    assert [setting.actual for setting in release.settings] == ([actual] if actual else [])
    assert release.added == ()


def test_factors_of_unknown_rotary_embeddings_are_not_compared(opened: Open) -> None:
    """llama.cpp's converter adds such a tensor for Gemma 4."""
    model = model_of(LlamaConfig(**SIZES))
    model.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10_000.0}
    tensors = tensors_of(model, "llama") | {"rope_freqs.weight": (torch.full((8,), 1e30), Type.F32)}
    release = opened(model, "llama", tensors)
    assert (release.added, release.settings) == ((), ())
