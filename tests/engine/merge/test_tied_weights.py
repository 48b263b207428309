"""Weights, biases and tokens that two modules share: an adapter of one side changes it for both, or has its own copy.

The judge is plain PEFT: the forward pass before and after the merge, and after the merged model was saved and loaded.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from merge_gate.records.terms import Verdict
from tests.support import methods, models
from tests.support.engine.plain_merge import merge_error
from tests.support.faults import configure
from tests.support.gating import Bench, Gate
from tests.support.models import _noise, among_transformers

pytestmark = pytest.mark.usefixtures("single_thread")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig(**SIZES)),
    "albert": (transformers.AlbertForMaskedLM, transformers.AlbertConfig(**SIZES, embedding_size=16)),
}
INPUTS = {"input_ids": torch.arange(2, 14).reshape(1, 12)}


class HeadThatReadsIt(BertLMPredictionHead):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


class HeadThatReadsItElsewhere(BertLMPredictionHead):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.finished(self.decoder(self.transform(hidden_states)))

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        def shifted(by: float) -> torch.Tensor:
            return logits + by * self.bias

        return shifted(1.0)


class HeadThatInheritsIt(HeadThatReadsIt):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


class BertThatReadsIt(transformers.BertForMaskedLM):
    head = HeadThatReadsIt

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.cls.predictions = self.head(config)
        self.post_init()


class BertThatReadsItElsewhere(BertThatReadsIt):
    head = HeadThatReadsItElsewhere


class BertThatInheritsIt(BertThatReadsIt):
    head = HeadThatInheritsIt


def make(model_class: Any, config: Any, adapter: Any, directory: Path) -> tuple[Path, Path, float]:
    """A base, an adapter of it, and how far PEFT's merge is off what the adapter computes."""
    torch.manual_seed(0)
    model = model_class(config)
    _noise(model, 2)
    model.save_pretrained(directory / "base")
    load = model_class.from_pretrained
    with methods.quiet():
        wrapped = peft.get_peft_model(load(directory / "base"), adapter)
        _noise(wrapped, 1)
        wrapped.save_pretrained(directory / "adapter")
        judge: Any = peft.PeftModel.from_pretrained(load(directory / "base"), str(directory / "adapter")).eval()
    base = load(directory / "base").eval()
    assert not torch.equal(methods.compute(judge, INPUTS), methods.compute(base, INPUTS))
    return directory / "base", directory / "adapter", merge_error(judge, INPUTS)


@pytest.mark.parametrize("name", MODELS)
def test_a_bias_that_head_and_decoder_share_is_the_decoders(name: str, tmp_path: Path) -> None:
    base, adapter, error = make(*MODELS[name], peft.BeftConfig(target_modules=["decoder"]), tmp_path)
    judgement = Gate().judge(adapter, base)
    assert error < 1e-6
    assert judgement.verdict is Verdict.PASSED, judgement


def test_the_weight_of_such_a_decoder_is_tied_all_the_same(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["decoder"], lora_bias=True)
    base, adapter, error = make(*MODELS["bert"], config, tmp_path)
    judgement = Gate().judge(adapter, base)
    assert error > 1e-2
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "tied-weights"), judgement
    assert [one.tensor for one in judgement.findings] == ["bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("model_class", [BertThatReadsIt, BertThatReadsItElsewhere, BertThatInheritsIt])
def test_a_head_that_reads_the_bias_as_well_is_another_side(model_class: Any, tmp_path: Path) -> None:
    """In its forward, or in a function that this calls."""
    with among_transformers(model_class):
        config = peft.BeftConfig(target_modules=["decoder"])
        base, adapter, error = make(model_class, transformers.BertConfig(**SIZES), config, tmp_path)
        configure(auto_mapping=None)(adapter)  # it names this module
        judgement = Gate().judge(adapter, base)
    assert error > 1e-2
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "tied-weights"), judgement


EMBEDDING, HEAD = "embed_tokens", "lm_head"


def saved(base: str, targets: list[str], whole: list[str], directory: Path, bench: Bench) -> Path:
    model = methods.load_base(base, bench.base_directory(base, "float32"))
    torch.manual_seed(0)
    with methods.quiet():
        config: Any = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=whole)
        wrapped = peft.get_peft_model(model, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("base", "targets", "whole", "sound"),
    [
        ("llama-tied", ["q_proj", HEAD], [EMBEDDING], True),
        ("llama-tied", ["q_proj", EMBEDDING], [HEAD], True),
        ("llama-tied", ["q_proj"], [EMBEDDING, HEAD], True),
        ("llama-tied", ["q_proj", HEAD], ["norm"], False),
        ("t5", ["wo", HEAD], ["shared"], False),  # the embeddings of encoder and decoder share the head's weight still
    ],
)
def test_the_other_side_of_a_trained_copy_is_free(base, targets, whole, sound, tmp_path, bench) -> None:
    adapter = saved(base, targets, whole, tmp_path / "adapter", bench)
    inputs = methods.make_input(base)
    model = methods.load_adapter(bench.base(base, "float32"), adapter).eval()
    unmerged = methods.compute(model, inputs)
    with methods.quiet():
        merged: Any = model.merge_and_unload(safe_merge=True).eval()
        merged.save_pretrained(tmp_path / "merged")
    again = methods.load_base(base, tmp_path / "merged")
    for one in (merged, again):
        error = (methods.compute(one, inputs) - unmerged).norm() / unmerged.norm()
        assert (float(error) < 1e-5) is sound, error

    judgement = bench.gate.judge(adapter, bench.base_directory(base, "float32"))
    verdict = (Verdict.PASSED, None) if sound else (Verdict.FAILED, "tied-weights")
    assert (judgement.verdict, judgement.cause) == verdict, judgement


@pytest.mark.parametrize(("target", "whole"), [(HEAD, EMBEDDING), (EMBEDDING, HEAD)])
def test_both_sides_are_measured(target: str, whole: str, tmp_path: Path, bench: Bench) -> None:
    """float16 does not hold the delta of one side; the trained copy of the other is small."""
    adapter = saved("llama-tied", ["q_proj", target], [whole], tmp_path, bench)
    state = methods.load_file(adapter / methods.WEIGHTS)
    large = {name: tensor * 1e4 for name, tensor in state.items() if target in name and "lora_" in name}
    assert large
    methods.write_tensors(adapter, state | large)
    base = bench.base_directory("llama-tied", "float16")
    assert methods.nonfinite(methods.merge(bench.base("llama-tied", "float16"), adapter))
    judgement = bench.gate.judge(adapter, base)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merged-nonfinite"), judgement
    reason = next(finding for finding in judgement.findings if finding.check == "merged-nonfinite")
    assert reason.module.endswith(target), reason


TOKENS, OTHERS = [3, 7], [4, 9]


def lora(tokens: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=tokens)


@pytest.mark.parametrize(
    ("config", "sound"),
    [
        pytest.param(lora(TOKENS), True, id="PEFT's default"),
        pytest.param(lora({EMBEDDING: TOKENS}), True, id="the embedding's, which PEFT links the head to"),
        pytest.param(lora({EMBEDDING: TOKENS, HEAD: TOKENS}), True, id="the same of both"),
        pytest.param(lora({HEAD: TOKENS}), False, id="the head's alone"),
        pytest.param(lora({EMBEDDING: TOKENS, HEAD: OTHERS}), False, id="others of each"),
        pytest.param(
            peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=[HEAD], task_type="CAUSAL_LM"),
            False,
            id="the head's by the method of its own",
        ),
    ],
)
@pytest.mark.parametrize("base", ["llama-tied", "llama"])
def test_tokens_of_one_side_of_a_tied_weight_fail(base, config, sound, tmp_path) -> None:
    sound = sound or base == "llama"
    directory, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base(base, directory)
    models.save_adapter(directory, out, config)
    with methods.quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), out)
    assert (merge_error(model, {"input_ids": torch.arange(20)[None]}) < 1e-4) is sound
    judgement = Gate().judge(out, directory)
    verdict = (Verdict.PASSED, None) if sound else (Verdict.FAILED, "tied-weights")
    assert (judgement.verdict, judgement.cause) == verdict, judgement
