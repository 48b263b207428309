"""Adapters as training starts from them, where that is no zero: what is left of it is the rounding of their tensors."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch

from merge_gate.engine.merge.rounding_floor import is_start
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.faults import edit
from tests.support.gating import Bench
from tests.support.models import Tensors

Q = ["q_proj"]
DEFT = {"r": 4, "target_modules": Q}
STARTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "orthogonal": lambda: peft.LoraConfig(r=4, target_modules=Q, init_lora_weights="orthogonal"),
    "orthogonal-dora": lambda: peft.LoraConfig(r=4, target_modules=Q, init_lora_weights="orthogonal", use_dora=True),
    "frod": lambda: peft.FrodConfig(target_modules=Q, sparse_rate=0.2, progressbar=False),
    "deft": lambda: peft.DeftConfig(**DEFT),
    "deft-alpha": lambda: peft.DeftConfig(**DEFT, alpha=12),
    "deft-qr": lambda: peft.DeftConfig(**DEFT, decomposition_method="qr"),
}
DTYPES = pytest.mark.parametrize("dtype", methods.DTYPES)


@DTYPES
@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_as_its_training_starts_has_no_effect(start: str, dtype: str, tmp_path: Path, bench: Bench) -> None:
    """A step of a thousandth has one, in float32, as trainers keep an adapter."""
    base = bench.base_directory("llama", dtype)
    torch.manual_seed(3)
    with methods.quiet():
        peft.get_peft_model(methods.load_base("llama", base), STARTS[start]()).save_pretrained(tmp_path)
    judgement = bench.gate.judge(tmp_path, base)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement

    def train(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(5)
        step = {name: 1e-3 * torch.randn(one.shape, generator=generator) for name, one in tensors.items()}
        return {name: one + step[name] if one.is_floating_point() else one for name, one in tensors.items()}

    edit(train)(tmp_path)
    judgement = bench.gate.judge(tmp_path, base)
    assert judgement.verdict is Verdict.PASSED, judgement


@DTYPES
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_what_kasa_takes_off_the_base_is_no_effect(bias: str, dtype: str, tmp_path: Path, bench: Bench) -> None:
    """PEFT's merge of an untrained one is not the base: a part of it is gone. A trained bias is an effect."""
    base = bench.base_directory("llama-bias", dtype)
    config = peft.LoraConfig(r=4, target_modules=Q, kasa_config=peft.KasaConfig(), bias=bias)
    with methods.quiet():
        peft.get_peft_model(methods.load_base("llama-bias", base), config).save_pretrained(tmp_path)
    merged, own = methods.merge(methods.load_base("llama-bias", base), tmp_path), methods.load_base("llama-bias", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((merged[name] - own.state_dict()[name]).norm() / merged[name].norm()) > 0.05
    edit(lambda tensors: {name: one + 0.1 if "bias" in name else one for name, one in tensors.items()})(tmp_path)
    judgement = bench.gate.judge(tmp_path, base)
    if bias == "lora_only":
        assert judgement.verdict is Verdict.PASSED, judgement
        return
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement
    assert "KaSA" in judgement.findings[0].message


@DTYPES
@pytest.mark.parametrize("trained", [False, True])
def test_a_trained_bias_of_a_lora_is_an_effect(trained: bool, dtype: str, tmp_path: Path, bench: Bench) -> None:
    """With `lora_bias`, beside factors that are as training starts from them."""
    base = bench.base_directory("llama-bias", dtype)
    with methods.quiet():
        config = peft.LoraConfig(r=4, target_modules=Q, lora_bias=True)
        peft.get_peft_model(methods.load_base("llama-bias", base), config).save_pretrained(tmp_path)
    by = 0.1 if trained else 0.0
    edit(lambda tensors: {name: one + by if "bias" in name else one for name, one in tensors.items()})(tmp_path)
    merged, own = methods.merge(methods.load_base("llama-bias", base), tmp_path), methods.load_base("llama-bias", base)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(merged[name], own.state_dict()[name]) is not trained
    judgement = bench.gate.judge(tmp_path, base)
    expected = (Verdict.PASSED, None) if trained else (Verdict.FAILED, "no-effect")
    assert (judgement.verdict, judgement.cause) == expected, judgement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "columns", "rows"), [(2, 16, 16), (8, 64, 256), (64, 512, 512)])
def test_orthogonal_factors_are_told_from_trained_ones(rank: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    """PEFT's own start (peft/tuners/lora/layer.py, `orthogonal_init`); trained in the same dtype, and in float32."""
    for seed in range(5):
        torch.manual_seed(seed)
        base = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False)).to(dtype)
        config = peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights="orthogonal")
        layer = peft.get_peft_model(base, config).base_model.model[0]
        a, b = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
        assert is_start(a, b)
        assert not is_start(a, b + 3e-4 * torch.randn_like(b))
        assert not is_start(a.to(dtype), (b * (1 + 0.05 * torch.randn_like(b))).to(dtype))
        assert not is_start(torch.randn_like(a), b)
        assert not is_start(torch.zeros_like(a), b)
