"""Tensors of the base that ride in an adapter's file: those that the config names, and those that nobody asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LNTuningConfig, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from merge_gate.records.terms import Verdict
from tests.support import methods, models
from tests.support.engine.merges import NOT_RUN
from tests.support.gating import Bench, Gate
from tests.support.sampled import sampled

PREFIX = "base_model.model."
NORM = "model.norm.weight"
MEAN = "encoder.stages.0.layers.0.layer.0.normalization.running_mean"
BIAS = "encoder.layer.0.attention.output.dense.bias"


@pytest.fixture(scope="module")
def bench(bench: Bench) -> Bench:
    return replace(bench, gate=Gate(no_forward=NOT_RUN))


@pytest.mark.parametrize(
    ("case", "key", "name"),
    [
        ("lora-linear", NORM, NORM),
        ("lora-linear", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("lora-linear", "model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("lora-bert", BIAS, BIAS),
        ("lora-conv2d", MEAN, MEAN),
        ("lora-norm-saved", BIAS, BIAS),
    ],
)
def test_what_no_config_names_earns_a_warning(case: str, key: str, name: str, tmp_path: Path, bench: Bench) -> None:
    """PEFT's own merge has the file's values there, and so has the gate's."""
    one = methods.find(case)
    adapter, base = bench.adapter(one), bench.base(one.base, "float32")
    other = torch.full_like(methods.values(base)[name], 0.5)
    broken = methods.write_variant(
        adapter, tmp_path, methods.load_file(adapter / methods.WEIGHTS) | {PREFIX + key: other}
    )
    assert not torch.equal(methods.merge(base, broken)[name], methods.merge(base, adapter)[name])
    judgement = bench.gate.judge(broken, bench.base_directory(one.base, "float32"))
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "keys-unexpected" in judgement.warned, judgement
    (finding,) = [one for one in judgement.findings if one.check == "keys-unexpected"]
    assert finding.tensor == name


def test_the_bases_own_values_change_nothing(tmp_path: Path, bench: Bench) -> None:
    one = methods.find("lora-linear")
    adapter = bench.adapter(one)
    own = methods.values(bench.base(one.base, "float32"))[NORM].clone()
    same = methods.write_variant(adapter, tmp_path, methods.load_file(adapter / methods.WEIGHTS) | {PREFIX + NORM: own})
    judgement = bench.gate.judge(same, bench.base_directory(one.base, "float32"))
    assert judgement.verdict is Verdict.PASSED, judgement
    assert not judgement.warned, judgement


SAVED = [case for case in methods.CASES if case.state is None]


@pytest.mark.parametrize("case", sampled(SAVED, SAVED[::6]))
def test_what_peft_saves_is_named(case: methods.Case, bench: Bench) -> None:
    judgement = bench.gate.judge(bench.adapter(case), bench.base_directory(case.base, "float32"))
    assert not judgement.evidence.unnamed


@pytest.mark.parametrize("rows", [24, 30])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="whole"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, id="trained"),
        pytest.param({"bias": "all"}, id="with biases"),
        pytest.param({"trainable_token_indices": [1, 5]}, id="tokens"),
    ],
)
@pytest.mark.parametrize("base", ["llama", "llama-tied", "llama-bias"])
def test_embeddings_may_ride_along(base, settings, rows, tmp_path, bench) -> None:
    model = methods.load_base(base, bench.base_directory(base, "float32"))
    assert isinstance(model, transformers.PreTrainedModel)
    torch.manual_seed(0)
    with methods.quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
        config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "embed_tokens" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    judgement = bench.gate.judge(tmp_path, bench.base_directory(base, "float32"))
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "keys-unexpected" not in judgement.warned, judgement


EMBEDDING, HEAD, Q_BIAS = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"
ROW = 5


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))


SAVED = config(modules_to_save=["lm_head"])
EMBEDDED = config(modules_to_save=["embed_tokens"])
TOKENS = config(trainable_token_indices=[3, ROW])
NORMS = LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM")


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("base", "broken", "adapter", "is_repaired"),
    [
        pytest.param("llama", EMBEDDING, TOKENS, True, id="trained tokens"),
        pytest.param("llama", EMBEDDING, config(trainable_token_indices=[3, 4]), False, id="other tokens"),
        pytest.param("llama", HEAD, SAVED, True, id="a trained head"),
        pytest.param("llama", HEAD, EMBEDDED, False, id="a trained embedding next to it"),
        pytest.param("llama", Q_BIAS, config(bias="all"), True, id="a trained bias"),
        pytest.param("llama", Q_BIAS, config(), False, id="a bias next to the weight that is merged"),
        pytest.param("llama", NORM, NORMS, True, id="a trained norm"),
        pytest.param("llama", HEAD, config(target_modules=["lm_head"]), False, id="a delta on the head"),
        pytest.param("llama-tied", EMBEDDING, TOKENS, True, id="trained tokens of a tied embedding"),
        pytest.param("llama-tied", EMBEDDING, EMBEDDED, False, id="a tied embedding, whose head keeps the base's"),
        pytest.param("llama-tied", EMBEDDING, config(modules_to_save=["embed_tokens", "lm_head"]), True, id="both"),
    ],
)
def test_a_broken_tensor_that_the_adapter_replaces_is_a_warning(
    base, broken, adapter, is_repaired, dtype, tmp_path
) -> None:
    directory, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base(base, directory)
    models.save_adapter(directory, out, adapter)
    tensors = models.read_tensors(directory, "model.safetensors")
    tensors[broken][ROW] = torch.nan
    models.write_tensors(directory, tensors, "model.safetensors")
    assert is_finite(out, directory, dtype) is is_repaired
    judgement = Gate().judge(out, directory, dtype=dtype)
    of_base = [(one.severity, one.tensor) for one in judgement.findings if one.check == "base-nonfinite"]
    assert of_base == [("warning" if is_repaired else "error", broken)], judgement
    verdict = (Verdict.PASSED, None) if is_repaired else (Verdict.FAILED, "base-nonfinite")
    assert (judgement.verdict, judgement.cause) == verdict, judgement
    assert "no-effect" not in judgement.warned, judgement


def is_finite(adapter: Path, base: Path, dtype: str) -> bool:
    """Of the model that PEFT merges; without its own check, which looks at some layers only."""
    with methods.quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return all(bool(tensor.isfinite().all()) for tensor in methods.values(merged).values())
