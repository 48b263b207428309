"""Inputs that a configuration alone gives: transformers' own models are the judge."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from merge_gate.engine.base.made_up_inputs import MOST_VALUES, POSITIONS, candidates, missing_inputs
from tests.support.engine import architectures
from tests.support.engine.forward_trials import first_that_runs
from tests.support.methods import TEXT

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **IDS)).eval()


def _clip() -> nn.Module:
    vision = {**TEXT, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT | IDS, vision_config=vision)).eval()


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=24, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, decoder_start_token_id=1, **IDS,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def _qwen_vl() -> nn.Module:
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    }  # fmt: skip
    text = (
        TEXT
        | IDS
        | {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    )
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=20, video_token_id=21, vision_start_token_id=22,
        vision_end_token_id=23,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("model_type", "inputs"),
    [
        ("bert", "all inputs"),
        ("t5", "all inputs"),
        ("clip", "all inputs"),
        ("layoutlm", "all inputs"),
        ("llava", "text"),
        ("wav2vec2", "all inputs"),
        ("speech_to_text", "frames first"),
        ("encodec", "one channel"),
        ("videomae", "video"),
        ("glm4v_vision", "all inputs"),
    ],
)
def test_the_first_inputs_that_a_model_accepts(model_type: str, inputs: str) -> None:
    _, model = next(architectures.models(model_type, torch.float32))
    assert first_that_runs(model.eval())[0] == inputs


def test_a_text_has_places_for_a_picture_of_any_size() -> None:
    model = _qwen_vl()
    ran = set[str]()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
    assert first_that_runs(model)[:2] == ("all inputs", 1)
    assert {"model.visual.blocks.0.attn.proj", "model.language_model.layers.0.mlp"} <= ran


def _llava(size: int = 8) -> nn.Module:
    vision = {**TEXT, "image_size": size, "patch_size": 4}
    text = transformers.LlamaConfig(**TEXT, **IDS)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**vision), image_token_id=23
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def _voxtral() -> nn.Module:
    audio = {
        "model_type": "voxtral_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "num_mel_bins": 8, "max_source_positions": 8,
    }  # fmt: skip
    text = transformers.LlamaConfig(**TEXT, **IDS).to_dict()
    config = transformers.VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=23)
    return transformers.VoxtralForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("build", "places"), [(_llava, 4), (_voxtral, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_text_has_places_for_a_picture_or_a_sound(build: Callable[[], Any], places: int, dtype: torch.dtype) -> None:
    name, number, inputs = first_that_runs(build().to(dtype))
    assert (name, number) == ("all inputs", 1)
    assert (inputs["input_ids"] == 23).sum() == places


def test_a_picture_with_too_many_places_gets_none() -> None:
    """A configuration from outside decides how long the text would be."""
    _, inputs = next(candidates(_llava(4 * 65)))
    assert "pixel_values" in inputs
    assert inputs["input_ids"].shape == (1, POSITIONS)


def test_inputs_that_were_not_made_are_known() -> None:
    model = _clip()
    assert missing_inputs(model, ["input_ids"]) == ["pixel_values"]
    assert missing_inputs(model, ["input_ids", "pixel_values"]) == []
    assert missing_inputs(_qwen_vl(), ["input_ids", "pixel_values"]) == ["pixel_values_videos"]
    assert missing_inputs(nn.ModuleList(), []) == []


def test_ids_are_those_that_an_adapter_trains() -> None:
    _, inputs = next(candidates(_llama(), [7, 9, 23, 24, 10**30, -1]))
    ids = inputs["input_ids"][0].tolist()
    assert (len(ids), ids[0]) == (POSITIONS, 1)
    assert {7, 9, 23} <= set(ids) <= set(range(24)) - {0}
    assert ids == next(candidates(_llama(), [7, 9, 23]))[1]["input_ids"][0].tolist()
    assert len(next(candidates(_llama(), range(24)))[1]["input_ids"][0]) == POSITIONS


def test_inputs_have_the_models_dtype_and_draw_no_numbers() -> None:
    model = _clip().to(torch.bfloat16)
    state = torch.get_rng_state()
    _, inputs = next(candidates(model))
    assert {name: value.dtype for name, value in inputs.items()} == {
        "input_ids": torch.long,
        "pixel_values": torch.bfloat16,
    }
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_have_names_of_their_own() -> None:
    names = [name for name, _ in candidates(_clip())]
    assert names == ["all inputs", "text", "vision", "all inputs, 4 tokens", "text, 4 tokens"]


SIZES = (
    "vocab_size", "hidden_size", "d_model", "image_size", "patch_size", "num_channels", "in_channels", "num_mel_bins",
    "max_source_positions", "spatial_merge_size", "temporal_patch_size", "num_frames", "max_length", "image_token_id",
    "bos_token_id", "decoder_start_token_id",
)  # fmt: skip


HOSTILE: tuple[object, ...] = (
    "many", -1, 0, 10**6, 10**9, 10**30, True, 2.5, float("nan"), [], [3], [10**9, 10**9], ["a", None], {},
    {"height": "x"}, {"height": 10**9, "width": 1}, [[1]], {"a": {"b": 1}},
)  # fmt: skip


@pytest.mark.parametrize("build", [_llama, _clip, _whisper, _qwen_vl], ids=["llama", "clip", "whisper", "qwen2_vl"])
def test_a_hostile_configuration_makes_no_large_input(build: Callable[[], Any]) -> None:
    model = build()
    usual = model.config
    for value in HOSTILE:
        model.config = copy.deepcopy(usual)
        for config in (model.config, *(part for part in vars(model.config).values() if hasattr(part, "model_type"))):
            vars(config).update(dict.fromkeys(SIZES, value))
        for name, inputs in candidates(model):
            tensors = [one for one in inputs.values() if isinstance(one, torch.Tensor)]
            assert all(one.numel() <= MOST_VALUES for one in tensors), (value, name)


def test_one_hostile_setting_leaves_the_other_inputs() -> None:
    model = _clip()
    vars(model.config.vision_config)["image_size"] = 10**9
    assert next(candidates(model))[1].keys() == {"input_ids"}
