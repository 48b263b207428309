"""Layers of a class with a forward of its own: PEFT's merged and unmerged outputs say which merges are right.

Each adapter of `OTHERWISE` computes another thing once PEFT has merged it; each of `ALIKE`, on the same classes of
layers, does not, and must pass.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from merge_gate.records.config import Combine
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.faults import edit
from tests.support.gating import Gate, Judgement
from tests.support.models import _noise

pytestmark = pytest.mark.usefixtures("single_thread")

TOKENS = {"input_ids": torch.arange(3, 11)[None]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
SPEECH = {
    "input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
    "decoder_input_ids": torch.tensor([[9, 4, 7, 2]]),
}
WAVES = {"input_values": torch.linspace(-1, 1, 1600)[None]}
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def _standardised() -> Any:
    config = transformers.BitConfig(embedding_size=32, hidden_sizes=[32, 32], depths=[1, 1], num_groups=4)
    return transformers.BitModel(config)


def _scaled() -> Any:
    config = transformers.Gemma3TextConfig(**TEXT, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma3TextModel(config)


def _shifted() -> Any:
    config = transformers.MvpConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.MvpModel(config)


def _counting() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def _weight_normed() -> Any:
    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return transformers.HubertModel(config)


def _falcon() -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**TEXT))


def lora(*targets: str, **options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=2, target_modules=list(targets), **options)


Row = tuple[Callable[[], Any], dict[str, torch.Tensor], peft.PeftConfig]
EMBED, POSITIONS, CONV = ["embed_tokens"], ["embed_positions"], "pos_conv_embed.conv"
OTHERWISE: dict[str, Row] = {
    "standardised-lora": (_standardised, PIXELS, lora("conv2")),
    "standardised-dora": (_standardised, PIXELS, lora("conv2", use_dora=True)),
    "standardised-loha": (_standardised, PIXELS, peft.LoHaConfig(r=2, target_modules=["conv2"])),
    "scaled-hira": (_scaled, TOKENS, peft.HiraConfig(r=2, target_modules=EMBED)),
    "scaled-tinylora": (_scaled, TOKENS, peft.TinyLoraConfig(target_modules=EMBED)),
    "shifted-lora": (_shifted, TOKENS, lora("embed_positions")),
    "shifted-tokens": (_shifted, TOKENS, peft.TrainableTokensConfig(target_modules=POSITIONS, token_indices=[1, 2, 3])),
    "counting-lora": (_counting, SPEECH, lora("decoder.embed_positions")),
    "counting-tokens": (_counting, SPEECH, lora("q_proj", trainable_token_indices={"decoder.embed_positions": [1, 2]})),
    "weight-normed-loha": (_weight_normed, WAVES, peft.LoHaConfig(r=2, target_modules=[CONV, "q_proj"])),
}
ALIKE: dict[str, Row] = {
    "scaled-lora": (_scaled, TOKENS, lora(*EMBED)),
    "scaled-dora": (_scaled, TOKENS, lora(*EMBED, use_dora=True)),
    "scaled-oft": (_scaled, TOKENS, peft.OFTConfig(r=0, oft_block_size=4, target_modules=EMBED)),
    "scaled-tokens": (_scaled, TOKENS, lora("q_proj", trainable_token_indices=[3, 40])),
    "falcon-oft": (_falcon, TOKENS, peft.OFTConfig(oft_block_size=4, target_modules=["dense"], module_dropout=0.5)),
    "falcon-lora": (_falcon, TOKENS, lora("query_key_value", "dense")),
}


def trained(row: Row, root: Path) -> float:
    """Save base and adapter; how far PEFT's merged outputs are from its unmerged ones, as a share of its part."""
    build, inputs, config = row
    torch.manual_seed(0)
    with methods.quiet():
        base = build()
        for parameter in base.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
        base.save_pretrained(root / "base")
        model: Any = peft.get_peft_model(base, config)
        _noise(model, seed=1)
        model.save_pretrained(root / "adapter")
        plain = type(base).from_pretrained(root / "base").eval()
        before = methods.compute(plain, inputs)
        loaded: Any = peft.PeftModel.from_pretrained(plain, root / "adapter").eval()
        unmerged = methods.compute(loaded, inputs)
        merged = methods.compute(loaded.merge_and_unload(safe_merge=True).eval(), inputs)
    return float((merged - unmerged).norm() / (unmerged - before).norm())


def judged(root: Path, dtype: str = "auto") -> Judgement:
    return Gate().judge(root / "adapter", root / "base", dtype=dtype)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_merged_into_another_layer_fails(name: str, tmp_path: Path) -> None:
    assert trained(OTHERWISE[name], tmp_path) > 0.05, "PEFT merges this rightly now"
    for dtype in ("auto", "float16"):
        judgement = judged(tmp_path, dtype)
        assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), judgement
        assert judgement.findings[0].module


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_merged_into_the_same_layer_passes(name: str, tmp_path: Path) -> None:
    assert trained(ALIKE[name], tmp_path) < 1e-4
    judgement = judged(tmp_path)
    assert judgement.verdict is Verdict.PASSED, judgement


def test_another_padding_is_a_matter_of_the_border_and_passes(tmp_path: Path) -> None:
    def reflecting() -> Any:
        config = transformers.UnivNetConfig(
            model_in_channels=8, model_hidden_channels=8, num_mel_bins=8, resblock_kernel_sizes=[3],
            resblock_stride_sizes=[8], resblock_dilation_sizes=[[1, 3]], kernel_predictor_num_blocks=1,
            kernel_predictor_hidden_channels=8, kernel_predictor_conv_size=3,
        )  # fmt: skip
        return transformers.UnivNetModel(config)

    def off(frames: int) -> float:
        wave = torch.linspace(-8, 8, frames * 8).sin().reshape(1, frames, 8)
        return trained((reflecting, {"input_features": wave, "noise_sequence": wave}, lora("conv_pre")), tmp_path)

    short, long = off(16), off(256)
    assert 1e-3 < long < short / 2
    judgement = judged(tmp_path)
    assert judgement.verdict is Verdict.PASSED, judgement


def test_a_layer_that_draws_at_each_call_is_not_compared(tmp_path: Path) -> None:
    drawn = peft.PveraConfig(r=4, target_modules=["dense"], sample_at_inference=True)
    assert trained((_falcon, TOKENS, drawn), tmp_path) > 0.01, "it draws nothing"
    judgement = judged(tmp_path)
    assert judgement.verdict is Verdict.PASSED, judgement


def test_the_dropout_of_a_combination_draws_nothing(tmp_path: Path) -> None:
    trained((_falcon, TOKENS, lora("query_key_value", "dense", lora_dropout=0.5)), tmp_path)
    members = (tmp_path / "adapter",) * 2
    combine = Combine(adapters=("a", "b"), weights=(0.5, 0.5), method="linear")
    judgement = Gate().combine(members, tmp_path / "base", combine)
    assert judgement.verdict is Verdict.PASSED, judgement


@pytest.mark.parametrize(
    ("row", "part", "factor", "cause"),
    [
        (OTHERWISE["standardised-lora"], "lora_B", 0.0, "no-effect"),
        (ALIKE["scaled-lora"], "", torch.nan, "adapter-nonfinite"),
    ],
    ids=["untrained", "NaN in the file"],
)
def test_the_cause_on_such_a_layer_is_that_of_any(row, part, factor, cause, tmp_path) -> None:
    trained(row, tmp_path)
    edit(lambda tensors: {k: v * factor if part in k else v for k, v in tensors.items()})(tmp_path / "adapter")
    judgement = judged(tmp_path)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, cause), judgement
