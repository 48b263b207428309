"""Tensors of the base that ride in an adapter's file: those that the config names, and those that nobody asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine.merges import NOT_RUN
from tests.support.gating import Bench, Gate, one_thread
from tests.support.sampled import sampled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREFIX = "base_model.model."
NORM = "model.norm.weight"
MEAN = "encoder.stages.0.layers.0.layer.0.normalization.running_mean"
BIAS = "encoder.layer.0.attention.output.dense.bias"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("unnamed"), Gate(no_forward=NOT_RUN))


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
    assert judgement.evidence is not None
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
def test_embeddings_may_ride_along(
    base: str, settings: dict[str, Any], rows: int, tmp_path: Path, bench: Bench
) -> None:
    model = methods.load_base(base, bench.base_directory(base, "float32"))
    assert isinstance(model, transformers.PreTrainedModel)
    torch.manual_seed(0)
    with methods.quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "embed_tokens" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    judgement = bench.gate.judge(tmp_path, bench.base_directory(base, "float32"))
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "keys-unexpected" not in judgement.warned, judgement
