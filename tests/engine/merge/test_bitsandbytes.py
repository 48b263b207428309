"""Merges into bitsandbytes bases on the CPU: every tensor of every method, broken.

Truth is plain PEFT's merge, looked at after dequantizing and with the scales: the packed integers themselves are
always finite. No forward pass runs on a 4-bit model before its merge, since some CPUs repack the weight on the first.
`make test` tries the cases of `FAST` with NaN and Inf at every place, `make sweeps` the others with one NaN and one
overflow in each tensor, and `make nightly` all cases at every place.
"""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from merge_gate.records.terms import Quantization, Verdict
from tests.support import faults_methods, methods
from tests.support.engine.quantized_cases import (
    BASE,
    CASES,
    FAST,
    GRID,
    LORA_BIAS,
    ON_LOADING,
    PAIRS,
    QUANTIZATIONS,
    _case,
    quantised,
    stored,
)
from tests.support.faults_methods import EVERY_PLACE, ONE_NAN
from tests.support.gating import Bench, mistake, one_thread, told


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        made = Bench(tmp_path_factory.mktemp("bitsandbytes"))
        yield made
        check_bases(made)


def check_bases(bench: Bench) -> None:
    """No trial wrote to a base: what the gate has loaded still holds what a fresh load holds."""
    for (directory, _, asked, _), base in bench.gate.loaded.items():
        if not directory.startswith(str(bench.root / "bases")):
            continue
        name = None if asked is Quantization.NONE else str(asked)
        fresh = methods.load_base(BASE, type(bench.root)(directory), name)
        assert methods.same(methods.values(fresh), methods.values(base.model))


@pytest.mark.parametrize(("case", "quantization"), GRID, ids=lambda value: getattr(value, "name", value))
def test_every_trial_is_judged_right(case: methods.Case, quantization: str, bench: Bench) -> None:
    check_trials(case, quantization, bench, EVERY_PLACE if (case.name, quantization) in FAST else ONE_NAN)


@pytest.mark.nightly
@pytest.mark.parametrize(("case", "quantization"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_every_place_is_judged_right(case: methods.Case, quantization: str, bench: Bench) -> None:
    check_trials(case, quantization, bench, EVERY_PLACE)


def check_trials(case: methods.Case, quantization: str, bench: Bench, places: tuple[tuple[str, str], ...]) -> None:
    bases = {quantization: quantised(bench, quantization)}
    directory, asked = stored(bench, quantization)
    faults = faults_methods.Bench(
        case, bases, bench.adapter(case), bench.root / "trial", home=quantization, small=quantization
    )
    mistakes = []
    for trial in faults.trials(places):
        if trial.value == "index":
            continue
        truth = faults.prepare(trial)
        judgement = bench.gate.judge(faults.directory, directory, quantization=asked)
        if wrong := mistake(truth, judgement):
            mistakes.append(told(trial, truth, wrong, judgement))
    assert not mistakes, f"{len(mistakes)} mistakes; the first:\n" + "\n".join(mistakes[:3])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_loss_of_requantising_is_reported(quantization: str, bench: Bench) -> None:
    """An adapter whose delta is far below the step of the grid: quantising again eats it."""
    case = CASES[0]
    state = faults_methods.load_file(bench.adapter(case) / methods.WEIGHTS)
    small = methods.write_variant(
        bench.adapter(case), bench.root / "small", {name: tensor * 0.07 for name, tensor in state.items()}
    )
    directory, asked = stored(bench, quantization)
    judgement = bench.gate.judge(small, directory, quantization=asked)
    (merge,) = [one for one in judgement.evidence.merges if one.changed]
    assert merge.delta_norm, judgement
    assert merge.lost_norm, judgement
    assert "rounding-loss" in judgement.warned, judgement


@pytest.mark.parametrize("quantization", ON_LOADING)
@pytest.mark.parametrize("name", ["hira", "oft", "boft", "miss", "road", "vera", "shira"])
def test_the_delta_is_that_of_the_unquantised_merge(name: str, quantization: str, bench: Bench) -> None:
    """Whatever a method does to a weight, W + delta is what PEFT packs again: also a rotation, or a product with W."""
    case = next(case for case in CASES if case.name == name)
    directory, asked = stored(bench, quantization)
    plain = methods.load_base(BASE, bench.base_directory(BASE, "float32"))
    weight = plain.get_parameter("model.layers.0.self_attn.q_proj.weight")
    held = methods.values(quantised(bench, quantization))["model.layers.0.self_attn.q_proj.weight"].float()
    weight.data = held.clone()
    exact = methods.merge(plain, bench.adapter(case))["model.layers.0.self_attn.q_proj.weight"]

    judgement = bench.gate.judge(bench.adapter(case), directory, quantization=asked)
    (merge,) = [one for one in judgement.evidence.merges if one.stats.name.endswith("q_proj.weight")]
    assert merge.delta_norm == pytest.approx(float((exact - held).norm()), rel=0.01), judgement
    assert merge.lost_norm is not None


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("quantization", ON_LOADING)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantising_again_is_no_effect(method, quantization, dtype, tmp_path, bench) -> None:
    """Untrained: what changes is the rounding of scales that were dequantised in 16 bits."""
    base = bench.base_directory("llama-tall", dtype)
    model = methods.load_base("llama-tall", base, quantization if method == "dora" else None)
    config = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=method == "dora")
    with methods.quiet():
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    judgement = bench.gate.judge(tmp_path, base, quantization=Quantization(quantization))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


@pytest.mark.parametrize("quantization", ["bnb-8bit", "bnb-4bit"])
def test_lora_bias_is_refused_because_peft_merges_it_wrongly(quantization: str, bench: Bench) -> None:
    adapter = bench.adapter(LORA_BIAS)
    base = quantised(bench, quantization)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        methods.merge(base, adapter, safe=True)  # a good adapter
    model = methods.load_adapter(base, adapter)
    layer = next(module for module in model.modules() if isinstance(module, (Linear8bitLt, Linear4bit)))
    layer.scaling["default"] = 3.0
    before = layer.get_base_layer().bias.data.clone()
    with methods.quiet():
        layer.merge(safe_merge=False)
    added = layer.get_base_layer().bias.data - before
    unscaled = layer.lora_B["default"].bias.data.to(added.dtype)
    assert torch.allclose(added, unscaled, atol=1e-3), "PEFT scales the bias now: the rule can go"

    directory, asked = stored(bench, quantization)
    judgement = bench.gate.judge(adapter, directory, quantization=asked)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
    assert "lora_bias" in judgement.findings[0].message


@pytest.mark.parametrize("quantization", ON_LOADING)
def test_a_method_that_changes_biases_alone_passes(quantization: str, tmp_path: Path) -> None:
    """BEFT has no layer of its own for packed weights, and needs none."""
    gate = Bench(tmp_path)
    case = _case("beft", "BeftConfig")
    base, adapter = quantised(gate, quantization), gate.adapter(case)
    plain = methods.merge(gate.base(BASE, "float16"), adapter)
    name = "model.layers.0.self_attn.q_proj.bias"
    before, after = methods.values(base), methods.merge(base, adapter, safe=True)
    assert torch.equal(after[name], plain[name])
    assert not torch.equal(after[name], before[name])
    assert methods.same(after | {name: before[name]}, before)
    judgement = gate.gate.judge(adapter, gate.base_directory(BASE, "float16"), quantization=Quantization(quantization))
    assert judgement.verdict is Verdict.PASSED, judgement


def test_a_base_with_a_broken_scale_is_the_bases_fault(bench: Bench, tmp_path: Path) -> None:
    """Packed integers are finite whatever happens: only the scales show it."""
    directory, _ = stored(bench, "fp4")
    state = faults_methods.load_file(directory / "model.safetensors")
    name = next(name for name in sorted(state) if name.endswith("q_proj.weight.absmax"))
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = faults_methods.put(state, name, "nan", "first")
    methods.save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    judgement = bench.gate.judge(bench.adapter(CASES[0]), tmp_path)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "base-nonfinite"), judgement
