"""A slice of benchmarks/peft_configurations.py: tables laid out as PEFT's tests are, with rows of our own."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from benchmarks.peft_configurations import Configuration, Outcome, hold, one_nan, read
from tests.support import methods
from tests.support.gating import Gate, Judgement, one_thread

TABLES = {
    "test_custom_models": """
import a_package_that_only_their_tests_need
import torch
from torch import nn
from peft import GloraConfig, LilyConfig, LoraConfig, OFTConfig, PsoftConfig
from .testing_common import PeftCommonTester

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.lin = nn.Embedding(7, 6), nn.Conv2d(2, 4, 3), nn.Linear(6, 10)

class MockTransformerWrapper:
    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        return Toy()

class TestCustom(PeftCommonTester):
    pass

TEST_CASES = [
    ("embedding", "Toy", LoraConfig, {"target_modules": ["emb"], "modules_to_save": ["lin"]}),
    ("convolution", "Toy", LoraConfig, {"target_modules": ["conv"], "use_dora": True}),
    ("rank", "Toy", GloraConfig, {"target_modules": ["lin"], "r": 2}),
    ("random", "Toy", PsoftConfig, {"target_modules": ["lin"], "r": 2, "psoft_svd": "lowrank"}),
    ("routed", "Toy", LilyConfig, {"target_modules": ["lin"], "r": 2, "stride_A": 1, "num_B": 2}),
    ("kernel", "Toy", OFTConfig, {"target_modules": ["conv"], "r": 0, "oft_block_size": 2}),
]
""",
    "test_decoder_models": """
from peft import LoraConfig, PromptTuningConfig, VBLoRAConfig
PEFT_DECODER_MODELS_TO_TEST = ["hub/tiny-random-GPT2LMHeadModel", "hub/tiny-random-Gemma3ForCausalLM"]
ALL_CONFIGS = [
    (LoraConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "r": 3}),
    (VBLoRAConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "num_vectors": 8, "vector_length": 4}),
    (PromptTuningConfig, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
]
""",
    "test_encoder_decoder_models": """
from peft import IA3Config
PEFT_ENCODER_DECODER_MODELS_TO_TEST = ["hub/tiny-random-BartForConditionalGeneration"]
ALL_CONFIGS = [(IA3Config, {"task_type": "SEQ_2_SEQ_LM", "target_modules": None, "feedforward_modules": None})]
""",
    "test_feature_extraction_models": """
from peft import LoHaConfig
PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST = ["hub/tiny-random-DebertaV2Model"]
ALL_CONFIGS = [(LoHaConfig, {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query_proj"], "r": 2})]
""",
    "test_seq_classifier": """
from peft import LoraConfig
PEFT_SEQ_CLS_MODELS_TO_TEST = ["hub/tiny-LlamaForSequenceClassification-3.2"]
ALL_CONFIGS = [(LoraConfig, {"task_type": "SEQ_CLS", "target_modules": None, "bias": "all"})]
""",
    "test_target_parameters": """
from peft import LoraConfig
ALL_CONFIGS = [
    ("hub/tiny-GptOssForCausalLM", LoraConfig,
     {"task_type": "CAUSAL_LM", "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
]
""",
    "test_token_classification_qa": """
from peft import LoraConfig
PEFT_TOKEN_CLS_MODELS_TO_TEST = ["hub/tiny-random-BertForSequenceClassification"]
def _all_configs(task_type):
    return [(LoraConfig, {"task_type": task_type, "target_modules": None})]
TOKEN_CLS_CONFIGS = _all_configs("TOKEN_CLS")
QA_CONFIGS = _all_configs("QUESTION_ANS")
""",
    "test_vision_models": """
from peft import LoKrConfig
CONFIGS = {"lokr": LoKrConfig(target_modules=["convolution"], modules_to_save=["normalization"])}
""",
}
REFUSED = {"routed": "NotImplementedError", "PromptTuningConfig": "AttributeError"}
"""Part of the name, and what PEFT raises."""
WRONG_MERGE = "kernel"
"""PEFT merges it, and the merged model does not compute what the unmerged one does (docs/reference/methods.md)."""


def laid_out(place: Path) -> list[Configuration]:
    for module, text in TABLES.items():
        (place / f"{module}.py").write_text(text, encoding="utf-8")
    return read(place)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    held = {}
    with one_thread():
        for number, one in enumerate(laid_out(tmp_path_factory.mktemp("tests"))):
            work = tmp_path_factory.mktemp(f"work{number}")
            held[one.name] = hold(one, "bfloat16" if number % 3 else "float32", Gate(), work)
    return held


@pytest.mark.slow
def test_every_row_on_every_model_is_tried(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == 6 + 3 * 2 + 1 + 1 + 1 + 1 + 2 + 1
    assert not [one for one in outcomes.values() if one.reason]


@pytest.mark.slow
def test_the_gate_merges_and_refuses_as_peft_does(outcomes: dict[str, Outcome]) -> None:
    for name, one in outcomes.items():
        raised = next((words for part, words in REFUSED.items() if part in name), None)
        if WRONG_MERGE in name:
            assert len(one.wrong) == 1
            assert one.gate == "failed (merge-differs)"
            continue
        assert not one.wrong, one
        assert one.gate == ("failed (not-mergeable)" if raised else "passed"), one
        assert one.peft.startswith(raised or "merges"), one
        assert one.one_nan.startswith("failed"), one


class GateOfAnother(Gate):
    """Gates another adapter than the one that PEFT merges: one value of it differs."""

    def judge(self, adapter: Path, base: Path, **settings: Any) -> Judgement:
        tensors = methods.load_file(adapter / methods.WEIGHTS)
        name = next(name for name in tensors if "h.1.attn.c_attn.lora_B" in name)
        tensors[name].view(-1)[3] += 1e-3
        return super().judge(methods.write_variant(adapter, adapter / "another", tensors), base, **settings)


def test_a_merge_to_other_bits_is_seen(tmp_path: Path) -> None:
    one = next(one for one in laid_out(tmp_path) if one.kind is LoraConfig and "decoder_models: 0" in one.name)
    with one_thread():
        outcome = hold(one, "float32", GateOfAnother(), tmp_path / "work")
    assert outcome.wrong == ("bits of 1 tensors: transformer.h.1.attn.c_attn.weight",)


def test_a_file_without_floats_is_left_as_it_is() -> None:
    assert one_nan({}) == {}
