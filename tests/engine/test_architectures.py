"""A slice of the sweep over every architecture (benchmarks/architectures.py): one type of each way to be unusual."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture_trials import trial
from tests.gating import one_thread

SLICE = {
    "blip": "its head is tied to an embedding, and all-linear reaches it",
    "deepseek_v3": "low-rank attention, dense and sparse layers, shared experts",
    "gemma3": "a vision tower, a language model, keys of an older layout",
    "gpt2": "Conv1D",
    "mixtral": "fused experts, beside which the linear layers are merged",
    "qwen3_next": "two kinds of attention",
    "resnet": "nothing but convolutions",
    "t5": "encoder and decoder, a part in float32",
    "wav2vec2": "parametrised weights, whose names transformers changes on load",
}


@pytest.mark.parametrize("model_type", SLICE)
def test_verdict_and_bits_are_those_of_a_user_of_peft(model_type: str, tmp_path: Path) -> None:
    with one_thread():
        outcome = trial(model_type, tmp_path)
    assert outcome.built, outcome.reason
    assert not outcome.wrong
