"""Adapters of small numbers that make a model's activations leave float16, as they do on SmolLM2-135M."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import IA3Config

from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.records.terms import Origin, Severity, Verdict
from tests.support.faults import blow_up
from tests.support.gating import Gate
from tests.support.models import save_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.gating import Judgement
    from tests.support.models import Shelf

DOWN = "model.layers.0.mlp.down_proj"
REACH = 25_000
"""What the output of one module of SmolLM2 reaches. All others are far smaller."""


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def bases(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Bases in float32, by how many times `REACH` the output of `DOWN` is."""
    place, made = tmp_path_factory.mktemp("bases"), {}
    for factor in (1.0, 3.0):
        model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama"))
        mlp = model.get_submodule(DOWN.rpartition(".")[0])
        outputs: list[torch.Tensor] = []
        hook = mlp.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        with torch.no_grad():
            for layer in (mlp.gate_proj, mlp.up_proj):
                layer.weight.mul_(100)
            model(**next(candidates(model))[1])
            mlp.down_proj.weight.mul_(factor * REACH / outputs[0].abs().max())
        hook.remove()
        made[factor] = place / str(factor)
        model.save_pretrained(made[factor])
    return made


def ia3(base: Path, directory: Path, factor: float) -> Path:
    """An adapter whose values are close to 1, and close to the factor at `DOWN`."""
    modules = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=["down_proj"])
    save_adapter(base, directory, config)
    blow_up(DOWN, factor)(directory)
    return directory


def of_activations(judgement: Judgement) -> list[tuple[str, Severity, Origin, str | None]]:
    found = [one for one in judgement.findings if one.check.startswith("activation-")]
    return [(one.check, one.severity, one.origin, one.module) for one in found]


def test_the_scale_of_an_adapter_leaves_only_float16(gate: Gate, bases: dict[float, Path], tmp_path: Path) -> None:
    base = bases[1.0]
    adapters = {factor: ia3(base, tmp_path / str(factor), factor) for factor in (1.0, 2.0, 3.0)}
    judged = {
        (factor, dtype): gate.judge(directory, base, dtype=dtype)
        for factor, directory in adapters.items()
        for dtype in ("float16", "bfloat16")
    }
    runs = [one.evidence.forward for one in judged.values() if one.evidence is not None]
    assert [one.layers_compared for one in runs] == [6] * 6, "also where the merged model was run"
    failed = judged.pop((3.0, "float16"))
    overflows = ("activation-nonfinite", Severity.ERROR, Origin.ADAPTER, DOWN)
    assert (failed.verdict, failed.cause, of_activations(failed)[0]) == (Verdict.FAILED, overflows[0], overflows)
    assert "merged-nonfinite" not in {one.check for one in failed.findings}
    assert {one.verdict for one in judged.values()} == {Verdict.PASSED}
    (close,) = of_activations(judged.pop((2.0, "float16")))
    assert close[:3] == ("activation-headroom", Severity.WARNING, Origin.ADAPTER)
    assert not any(map(of_activations, judged.values()))


def test_a_base_that_overflows_in_float16_is_to_blame_itself(
    gate: Gate, bases: dict[float, Path], tmp_path: Path
) -> None:
    base = bases[3.0]
    adapter = ia3(base, tmp_path / "adapter", 1.0)
    in_float16, in_bfloat16 = (gate.judge(adapter, base, dtype=dtype) for dtype in ("float16", "bfloat16"))
    assert {in_float16.verdict, in_bfloat16.verdict} == {Verdict.PASSED}
    assert of_activations(in_float16) == [("activation-nonfinite", Severity.WARNING, Origin.BASE, DOWN)]
    assert of_activations(in_bfloat16) == []
