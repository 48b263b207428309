"""A bias that a head and its decoder hold: an adapter of the decoder changes it for both, and one may not read it.

The judge is plain PEFT: the forward pass before and after the merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.faults import configure
from tests.support.gating import Gate, one_thread
from tests.support.models import _noise, among_transformers

if TYPE_CHECKING:
    from pathlib import Path

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
        unmerged = methods.compute(judge, INPUTS)
        merged = methods.compute(judge.merge_and_unload(safe_merge=True).eval(), INPUTS)
    assert not torch.equal(unmerged, methods.compute(load(directory / "base").eval(), INPUTS))
    return directory / "base", directory / "adapter", float((merged - unmerged).norm() / unmerged.norm())


@pytest.mark.parametrize("name", MODELS)
def test_a_bias_that_head_and_decoder_share_is_the_decoders(name: str, tmp_path: Path) -> None:
    with one_thread():
        base, adapter, error = make(*MODELS[name], peft.BeftConfig(target_modules=["decoder"]), tmp_path)
        judgement = Gate().judge(adapter, base)
    assert error < 1e-6
    assert judgement.verdict is Verdict.PASSED, judgement


def test_the_weight_of_such_a_decoder_is_tied_all_the_same(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["decoder"], lora_bias=True)
    with one_thread():
        base, adapter, error = make(*MODELS["bert"], config, tmp_path)
        judgement = Gate().judge(adapter, base)
    assert error > 1e-2
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "tied-weights"), judgement
    assert [one.tensor for one in judgement.findings] == ["bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("model_class", [BertThatReadsIt, BertThatReadsItElsewhere, BertThatInheritsIt])
def test_a_head_that_reads_the_bias_as_well_is_another_side(model_class: Any, tmp_path: Path) -> None:
    """In its forward, or in a function that this calls."""
    with one_thread(), among_transformers(model_class):
        config = peft.BeftConfig(target_modules=["decoder"])
        base, adapter, error = make(model_class, transformers.BertConfig(**SIZES), config, tmp_path)
        configure(auto_mapping=None)(adapter)  # it names this module
        judgement = Gate().judge(adapter, base)
    assert error > 1e-2
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "tied-weights"), judgement
