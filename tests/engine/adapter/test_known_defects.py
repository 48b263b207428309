"""What cannot be merged into weights: why, shown with plain PEFT, and that the gate says so.

Each row shows its reason first. A PEFT that mends one makes the row's own assertion fail, so that the rule can go. The
rows' names are those of the table in docs/reference/methods.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from merge_gate.judging.checks.not_mergeable import WITHOUT_WEIGHTS
from merge_gate.records.terms import Quantization, Severity, Verdict
from tests.support import faults_methods, methods
from tests.support.engine.local_bases import edited_base
from tests.support.engine.plain_merge import merge_error
from tests.support.gating import Bench

DOCS = Path(__file__).resolve().parents[3] / "docs" / "reference/methods.md"
CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL = CAUSAL | {"num_virtual_tokens": 2}
Q = {"target_modules": ["q_proj"]}
EIGHT, FOUR = Quantization.BNB_8BIT, Quantization.BNB_4BIT
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Row:
    """An adapter that is whole and finite, and cannot be merged. `shows` proves it of a base and the adapter there."""

    name: str
    case: methods.Case
    shows: Callable[[nn.Module, Path, Row], None]
    quantization: Quantization = Quantization.NONE


def raises(kind: type[Exception], match: str | None = None) -> Callable[[nn.Module, Path, Row], None]:
    """PEFT says so itself, with `safe_merge` and without."""

    def shows(base: nn.Module, adapter: Path, _: Row) -> None:
        for safe in (False, True):
            with pytest.raises(kind, match=match):
                methods.merge(base, adapter, safe=safe)

    return shows


def cannot_load(base: nn.Module, adapter: Path, _: Row) -> None:
    """What a trainer makes cannot be read back."""
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)):
        methods.load_adapter(base, adapter)


def computes_another_thing(base: nn.Module, adapter: Path, row: Row) -> None:
    """PEFT merges without a word, into a model that computes something else than base and adapter do."""
    error = merge_error(methods.load_adapter(base, adapter), methods.make_input(row.case.base))
    assert error > 1e-2, "PEFT merges this rightly now: the rule can go"


def merges_integers(base: nn.Module, adapter: Path, _: Row) -> None:
    """PEFT merges without a word, but takes the packed integers (or another product of the factors) for the weight.

    Held against the same merge into the values that the quantised weight stands for.
    """
    before = methods.values(base)[WEIGHT].float()
    plain = methods.BASES["llama"]()
    with torch.no_grad():
        plain.get_submodule("model.layers.0.self_attn.q_proj").weight.copy_(before)
    delta = methods.merge(plain, adapter)[WEIGHT] - before
    got = methods.merge(base, adapter)[WEIGHT].float() - before
    error = (got - delta).norm() / delta.norm()
    assert not error < 0.9, f"PEFT merges this rightly now ({error:.2f} off): the rule can go"


def merges_by_old_scales(base: nn.Module, adapter: Path, row: Row) -> None:
    """PEFT packs W minus the first factors, and merges with the scales of W if the model has not computed before."""
    inputs = methods.make_input(row.case.base)
    with methods.quiet():
        merged = methods.load_adapter(copy.deepcopy(base), adapter).eval().merge_and_unload().eval()
        model = methods.load_adapter(base, adapter).eval()
        unmerged = methods.compute(model, inputs)
        error = methods.compute(merged, inputs) - unmerged
        again = methods.compute(model.merge_and_unload().eval(), inputs) - unmerged
    assert error.norm() > 4 * again.norm(), "PEFT merges this rightly now: the row can go"


def leaves_no_quantised_weight(base: nn.Module, adapter: Path, _: Row) -> None:
    """PEFT merges without a word and leaves plain numbers where packed ones are expected: nothing can read them."""
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        methods.merge(base, adapter)


def _row(name: str, base: str, shows: Any, kind: str, *targets: str, **settings: Any) -> Row:
    settings |= {"target_modules": [*targets]} if targets else {}
    return Row(name=name, case=methods.make_case(name, base, kind, **settings), shows=shows)


def _quantised(name: str, shows: Any, kind: str, quantization: Quantization, **settings: Any) -> Row:
    row = _row(f"{name}-{quantization}", "llama", shows, kind, **Q, **settings)
    return replace(row, quantization=quantization)


def test_methods_without_weights_are_those_of_peft() -> None:
    """A config is enough to refuse them, so the list must not lag behind PEFT."""
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert {kind.value for kind, tuner in tuners.items() if not hasattr(tuner, "merge_and_unload")} == WITHOUT_WEIGHTS


ADALORA = {"init_r": 2, "target_r": 2, "total_step": 3}
ALORA = Q | {"r": 2, "alora_invocation_tokens": [1, 2]}
TWICE = Q | {"r": 2, "layer_replication": [[0, 1], [0, 1]]}
TOKENS = {"r": 2, "trainable_token_indices": [1, 5]}
NO_MERGE = raises(AttributeError, "merge_and_unload")
IA3_CLOSED = raises(ValueError, "Cannot merge ia3")
ROWS = (
    _row("prompt-tuning", "llama", NO_MERGE, "PromptTuningConfig", **VIRTUAL),
    _row("p-tuning", "llama", NO_MERGE, "PromptEncoderConfig", **VIRTUAL, encoder_hidden_size=8),
    _row("prefix-tuning", "llama", NO_MERGE, "PrefixTuningConfig", **VIRTUAL),
    _row("multitask-prompt-tuning", "llama", NO_MERGE, "MultitaskPromptTuningConfig", **VIRTUAL, num_tasks=2),
    _row("cpt", "llama", NO_MERGE, "CPTConfig", **CAUSAL, cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[1]),
    _row("cartridge", "llama", NO_MERGE, "CartridgeConfig", **VIRTUAL),
    _row("adaption-prompt", "llama", NO_MERGE, "AdaptionPromptConfig", **CAUSAL, adapter_len=2, adapter_layers=1),
    _row("poly", "llama", raises(NotImplementedError), "PolyConfig", **Q, r=2, n_tasks=2, n_skills=2),
    _row("lily", "llama", raises(NotImplementedError, "Lily"), "LilyConfig", **Q, r=2),
    _row("shadow", "llama", raises(NotImplementedError, "ShadowPEFT"), "ShadowConfig", **CAUSAL, r=2),
    _row("alora", "llama", raises(NotImplementedError, "aLoRA"), "LoraConfig", **CAUSAL, **ALORA),
    _row("layer-replication", "llama", computes_another_thing, "LoraConfig", **CAUSAL, **TWICE),
    _row("oft-convolution", "resnet", computes_another_thing, "OFTConfig", "layer.0.convolution", oft_block_size=4),
    _row(
        "oft-convolution-patches", "convnext", computes_another_thing, "OFTConfig", "patch_embeddings", oft_block_size=4
    ),
    _row(
        "tied-lora-twice", "llama-tied", computes_another_thing, "LoraConfig", "embed_tokens", ensure_weight_tying=True
    ),
    _row("tokens-of-a-head-with-a-bias", "xlm-roberta", computes_another_thing, "LoraConfig", "query", **TOKENS),
    _row(
        "lora-grouped-convolution",
        "wav2vec2",
        raises(NotImplementedError, "groups > 1"),
        "LoraConfig",
        "pos_conv_embed.conv",
    ),
    _row(
        "adalora-grouped-convolution", "convnext", raises(RuntimeError, "shape"), "AdaLoraConfig", "dwconv", **ADALORA
    ),
    _row(
        "lora-bias-without-bias", "llama", raises(RuntimeError, "has no bias"), "LoraConfig", "q_proj", lora_bias=True
    ),
    _row("beft-without-bias", "llama", raises(ValueError, "has no bias"), "BeftConfig", "q_proj"),
    _quantised("adalora", raises(NotImplementedError), "AdaLoraConfig", EIGHT, **ADALORA),
    _quantised("adalora", raises(NotImplementedError), "AdaLoraConfig", FOUR, **ADALORA),
    _quantised("ia3", IA3_CLOSED, "IA3Config", EIGHT, feedforward_modules=[]),
    _quantised("ia3", IA3_CLOSED, "IA3Config", FOUR, feedforward_modules=[]),
    _quantised("randlora", merges_integers, "RandLoraConfig", EIGHT, r=4),
    _quantised("randlora", leaves_no_quantised_weight, "RandLoraConfig", FOUR, r=4),
    _quantised("pvera", leaves_no_quantised_weight, "PveraConfig", FOUR, r=4),
    _quantised("hra", merges_integers, "HRAConfig", EIGHT, r=2),
    _quantised("c3a", merges_integers, "C3AConfig", EIGHT, block_size=4),
    _quantised("peanut", merges_integers, "PeanutConfig", EIGHT, r=2),
    _quantised("deft", merges_integers, "DeftConfig", EIGHT, r=2),
    _quantised("supertuning", merges_integers, "SupertuningConfig", EIGHT, sparsity=0.9),
    _quantised("ln-tuning", merges_integers, "LNTuningConfig", EIGHT),
    _quantised("loha", raises(RuntimeError, "can't be cast"), "LoHaConfig", EIGHT, r=2),
    _quantised("fourierft", raises(RuntimeError, "size of tensor"), "FourierFTConfig", FOUR, n_frequency=8),
    _quantised("olora", merges_by_old_scales, "LoraConfig", EIGHT, r=2, init_lora_weights="olora"),
    _quantised("delora", cannot_load, "DeloraConfig", EIGHT, r=2),
    _quantised("osf", cannot_load, "OSFConfig", FOUR, effective_rank=4),
)


MEASURED = {"oft-convolution", "oft-convolution-patches", "tokens-of-a-head-with-a-bias", "olora-bnb-8bit"}
"""Rows without a rule: the gate merges, and what the layer computes then shows it."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_reason_still_holds_and_the_gate_says_so(row: Row, bench: Bench) -> None:
    plain = bench.base_directory(row.case.base, "float32")
    if row.quantization is Quantization.NONE:
        base, directory = bench.base(row.case.base, "float32"), plain
    else:
        directory = bench.base_directory(row.case.base, "float16")
        base = methods.load_base(row.case.base, directory, str(row.quantization))
    adapter = bench.adapter(row.case)
    row.shows(base, adapter, row)
    judgement = bench.gate.judge(adapter, directory, quantization=row.quantization)
    assert judgement.verdict is Verdict.FAILED, judgement
    assert judgement.cause == ("merge-differs" if row.name in MEASURED else "not-mergeable"), judgement
    reason = next(finding for finding in judgement.findings if finding.check == judgement.cause)
    assert reason.severity is Severity.ERROR
    assert reason.message
    assert reason.hint


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_docs_have_the_row(row: Row) -> None:
    assert f"| `{row.name.removesuffix('-bnb-8bit').removesuffix('-bnb-4bit')}" in DOCS.read_text(encoding="utf-8")


def test_tokens_of_a_head_whose_bias_is_zero_pass(bench: Bench, tmp_path: Path) -> None:
    """PEFT's forward leaves out a bias of zeros, and nothing is lost."""
    biases: list[Tensor] = []

    def erase(tensors: dict[str, Tensor]) -> None:
        biases.extend(tensor.zero_() for name, tensor in tensors.items() if name.startswith("lm_head.bias"))

    edited_base(bench.base_directory("xlm-roberta", "float32"), tmp_path / "base", erase)
    case = next(row.case for row in ROWS if row.name == "tokens-of-a-head-with-a-bias")
    base, adapter = methods.load_base("xlm-roberta", tmp_path / "base"), bench.adapter(case)
    assert merge_error(methods.load_adapter(base, adapter), methods.make_input("xlm-roberta")) < 1e-6
    assert biases
    judgement = bench.gate.judge(adapter, tmp_path / "base")
    assert judgement.verdict is Verdict.PASSED, judgement


def test_ln_tuning_leaves_a_trained_head_in_its_wrapper(bench: Bench, tmp_path: Path) -> None:
    """What PEFT merges computes the right thing in memory; once it is saved, its head is lost."""
    case = methods.make_case(
        "ln-head", "bert-classifier", "LNTuningConfig", target_modules=["output.LayerNorm"], task_type="SEQ_CLS"
    )
    adapter, inputs = bench.adapter(case), methods.make_input("bert-classifier")
    model: Any = methods.load_adapter(bench.base("bert-classifier", "float32"), adapter).eval()
    unmerged = methods.compute(model, inputs)
    merged = model.merge_and_unload(safe_merge=True).eval()
    torch.testing.assert_close(methods.compute(merged, inputs), unmerged)
    merged.save_pretrained(tmp_path)
    again = methods.compute(methods.load_base("bert-classifier", tmp_path), inputs)
    assert not torch.allclose(again, unmerged, atol=1e-3), "PEFT unwraps it now: this can go"
    judgement = bench.gate.judge(adapter, bench.base_directory("bert-classifier", "float32"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
    assert "classifier.bias, classifier.weight" in judgement.findings[0].message
    assert "modules_to_save" in judgement.findings[0].message


def test_x_lora_loses_its_router(bench: Bench, tmp_path: Path) -> None:
    """PEFT merges one expert at full weight. Its file of tensors is empty, since the experts lie beside it."""
    base = copy.deepcopy(bench.base("llama", "float32"))
    base.config.use_cache = False
    experts = {}
    for name in ("0", "1"):
        case = methods.make_case(f"expert-{name}", "llama", "LoraConfig", **CAUSAL, **Q, r=2)
        experts[name] = str(bench.adapter(case))
    state = faults_methods.load_file(Path(experts["1"]) / methods.WEIGHTS)
    methods.write_tensors(Path(experts["1"]), {key: tensor.flip(0) for key, tensor in state.items()})
    with methods.quiet():
        config = peft.XLoraConfig(**CAUSAL, hidden_size=16, xlora_depth=1, adapters=experts)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "router")
    error = merge_error(methods.load_adapter(base, tmp_path / "router"), methods.make_input("llama"))
    assert error > 1e-2, "PEFT keeps the router now: the rule can go"
    judgement = bench.gate.judge(tmp_path / "router", bench.base_directory("llama", "float32"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement


def test_an_arrow_router_cannot_be_read_back(bench: Bench, tmp_path: Path) -> None:
    case = methods.make_case("arrow", "llama", "LoraConfig", **CAUSAL, **Q, r=2)
    source = bench.adapter(case)
    methods.write_variant(source, tmp_path / "arrow", faults_methods.load_file(source / methods.WEIGHTS))
    config = json.loads((source / "adapter_config.json").read_text())
    config["arrow_config"] = {"top_k": ArrowConfig().top_k}
    (tmp_path / "arrow" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((AttributeError, TypeError, ValueError)):
        methods.load_adapter(bench.base("llama", "float32"), tmp_path / "arrow")
    judgement = bench.gate.judge(tmp_path / "arrow", bench.base_directory("llama", "float32"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement


def test_attention_gets_twice_the_delta_on_its_output(bench: Bench) -> None:
    """Merged and unmerged agree, so it is what was trained; but other programs that merge by the formula do not."""
    case = methods.find("lora-mha")
    base, adapter = bench.base("siglip", "float32"), bench.adapter(case)
    state = faults_methods.load_file(adapter / methods.WEIGHTS)
    end = "head.attention.base_layer.out_proj.lora_A.weight"  # its start is another one by release of transformers
    (prefix,) = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(end)]
    scaling = case.config().lora_alpha / case.config().r
    delta = scaling * state[f"{prefix}.lora_B.weight"] @ state[f"{prefix}.lora_A.weight"]
    name = prefix.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"
    got = methods.merge(base, adapter)[name] - methods.values(base)[name]
    torch.testing.assert_close(got, 2 * delta, rtol=1e-4, atol=1e-5)
