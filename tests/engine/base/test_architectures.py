"""A slice of the sweep over every architecture (benchmarks/architectures.py): one type of each way to be unusual."""

import math
from pathlib import Path

import pytest

from benchmarks.architectures import trial, with_nan
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.gating import Gate
from tests.support.sampled import sampled

pytestmark = pytest.mark.usefixtures("single_thread")

SLICE = {
    "blip": "its head is tied to an embedding, and all-linear reaches it",
    "clip": "a parameter without dimensions",
    "deepseek_v3": "low-rank attention, dense and sparse layers, shared experts",
    "gemma3": "a vision tower, a language model, keys of an older layout",
    "gpt2": "Conv1D",
    "jev": "a `from_pretrained` of its own, which returns the model and nothing else",
    "mixtral": "fused experts, beside which the linear layers are merged",
    "qwen3_next": "two kinds of attention",
    "resnet": "nothing but convolutions",
    "t5": "encoder and decoder, a part in float32",
    "wav2vec2": "parametrised weights, whose names transformers changes on load",
}


@pytest.mark.parametrize("model_type", sampled(SLICE, ("gpt2", "t5")))
def test_verdict_and_bits_are_those_of_a_user_of_peft(model_type: str, tmp_path: Path) -> None:
    outcome = trial(model_type, tmp_path)
    assert outcome.built, outcome.reason
    assert not outcome.wrong


DROPPED = {
    "inkling2_text": "`(convolution|sconv)\\.weight_proj` finds what it has made: `.weight_proj.weight`",
    "laguna": "`mlp.shared_expert.`, where a dot is any character, finds `mlp.shared_experts`",
    "mistral_large4_text": "`\\.shared_experts\\.` becomes `.mlp.shared_experts.` a second time",
    "pi0": "`state_proj` becomes `embed_action_time.state_proj` a second time",
    "unlimited_ocr": "`layers.` becomes `language_model.layers.` a second time",
}
"""Types whose adapters PEFT does not load whole, though it saved them, and the renaming that loses the tensors."""


@pytest.mark.parametrize("model_type", sampled(DROPPED, ("laguna",)))
def test_tensors_that_peft_saves_and_does_not_load_fail(model_type: str, tmp_path: Path) -> None:
    outcome = trial(model_type, tmp_path)
    assert outcome.dropped, "PEFT loads this type by now: take one that it does not"
    assert outcome.healthy == "failed (keys-missing)"
    assert not outcome.wrong


def test_nan_in_a_tensor_that_peft_does_not_load_is_no_accident(tmp_path: Path) -> None:
    base, adapter = built("laguna", tmp_path)
    name = next(name for name in methods.load_file(adapter / methods.WEIGHTS) if ".shared_experts." in name)
    judgement = Gate().judge(with_nan(adapter, tmp_path / "nan", name), base)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "keys-missing")


@pytest.mark.parametrize(("suffix", "value"), [(None, 0.0), (".input_max", math.nan), (".weight", math.inf)])
def test_infinite_buffers_mean_no_limit_and_other_values_fail(suffix: str | None, value: float, tmp_path: Path) -> None:
    """NaN in a buffer, and Inf in a parameter."""
    base, adapter = built("gemma4_audio", tmp_path)
    if suffix is not None:
        state = methods.load_file(base / "model.safetensors")
        state[next(name for name in state if name.endswith(suffix))].view(-1)[0] = value
        methods.save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    judgement = Gate().judge(adapter, base)
    expected = (Verdict.PASSED, None) if suffix is None else (Verdict.FAILED, "base-nonfinite")
    assert (judgement.verdict, judgement.cause) == expected
    assert "base-nonfinite" in {one.check for one in judgement.findings}


def built(model_type: str, root: Path) -> tuple[Path, Path]:
    architecture = architectures.build(model_type, root / "base")
    architectures.save_lora(architecture, root / "base", root / "adapter")
    return root / "base", root / "adapter"
