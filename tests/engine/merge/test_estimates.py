"""Where a sample of the rows is mistaken, an error is not: PEFT's merge and torch compute the true loss."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge, measure_options
from merge_gate.judging.verdict import decide_files
from merge_gate.records.config import AdapterSpec, CheckSetting
from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.engine.local_bases import edited_base
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.gating import SPEC, Gate

WIDTH = 1024
ROWS = 1024
"""Of which a sample takes every seventh."""

TARGET = "model.layers.0.mlp.gate_proj"
LIMIT = 0.5


@dataclass(frozen=True)
class Trial:
    """A base of one large layer, and a LoRA on it."""

    base: Path
    adapter: Path
    gate: Gate

    def true_loss(self) -> float:
        """‖merged - (W + ΔW)‖ / ‖ΔW‖, merged by PEFT, the rest in float64."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base)
        weight = model.get_submodule(TARGET).weight.detach().clone()
        with methods.quiet():
            merged = peft.PeftModel.from_pretrained(model, self.adapter).merge_and_unload(safe_merge=True)
        factors, config = load_file(self.adapter / methods.WEIGHTS), peft.LoraConfig.from_pretrained(self.adapter)
        a, b = (factors[f"base_model.model.{TARGET}.lora_{one}.weight"].double() for one in "AB")
        delta = (config.lora_alpha / config.r) * (b @ a)
        lost = merged.get_submodule(TARGET).weight.detach().double() - weight.double() - delta
        return float(lost.norm() / delta.norm())

    def judged(self, severity: Severity) -> tuple[Verdict, bool, float | None]:
        """The verdict by the norm alone, whether the figures are a sample's, and the loss as the gate has it."""
        files = preflight(str(self.adapter), allow_pickle=False)
        evidence = merge_adapter(
            self.gate.base(self.base, files, dtype="auto"),
            files,
            measure_options=measure_options(with_rounding_loss(severity)),
            no_forward=NOT_RUN,
        )
        verdict, _ = decide_files(judge_merge(with_rounding_loss(severity), files, evidence))
        return verdict, any(merge.estimated for merge in evidence.merges), evidence.lost_share


def with_rounding_loss(severity: Severity) -> AdapterSpec:
    setting = CheckSetting(check="rounding-loss", severity=severity, limit=LIMIT)
    others = tuple(one for one in SPEC.checks if one.check != setting.check)
    return dataclasses.replace(SPEC, checks=(*others, setting))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Weights of one size, a delta of about the size that bfloat16 loses half of."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("estimates")
    size = {"hidden_size": WIDTH, "intermediate_size": ROWS}
    config = transformers.LlamaConfig(**methods.DECODER | size, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.get_submodule(TARGET).weight.data.normal_()
    model.save_pretrained(root / "base")
    with methods.quiet():
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["gate_proj"]))
        layer = adapted.get_submodule(f"base_model.model.{TARGET}")
        layer.lora_A["default"].weight.data.normal_()
        layer.lora_B["default"].weight.data.normal_(std=6e-4)
        adapted.save_pretrained(root / "adapter")
    return Trial(root / "base", root / "adapter", Gate())


@pytest.mark.parametrize("few_are_lost", [True, False])
def test_rows_of_two_kinds_end_on_the_side_of_their_true_loss(few_are_lost: bool, plain: Trial, tmp_path: Path) -> None:
    """The delta has one size in all rows; it is lost where the weights are large. A sample meets one kind only."""
    rows = torch.arange(ROWS)
    lost = rows % 28 == 0 if few_are_lost else (rows % 7 != 0) & (rows % 16 != 1)
    weight = torch.where(lost[:, None], 64.0, 2.0**-12).expand(ROWS, WIDTH).bfloat16().contiguous()
    base = edited_base(plain.base, tmp_path / "base", lambda _: {f"{TARGET}.weight": weight})
    trial = Trial(base, plain.adapter, Gate())
    truth = trial.true_loss()
    assert truth == pytest.approx(0.19 if few_are_lost else 0.90, abs=0.03)
    verdict, estimated, loss = trial.judged(Severity.ERROR)
    assert not estimated
    assert loss == pytest.approx(truth, rel=1e-3)
    assert verdict is (Verdict.PASSED if few_are_lost else Verdict.FAILED)
    _, estimated, loss = trial.judged(Severity.WARNING)
    assert estimated
    assert loss is not None
    assert (loss > LIMIT) is few_are_lost, "the sample is right: take other rows"


def test_a_ratio_near_its_error_limit_is_measured(plain: Trial, tmp_path: Path) -> None:
    """A sample of tiny weights would fail an adapter whose other rows are large."""
    is_sampled = torch.arange(ROWS) % 7 == 0
    weight = torch.where(is_sampled[:, None], 2.0**-20, 1.0).expand(ROWS, WIDTH).bfloat16().contiguous()
    base = edited_base(plain.base, tmp_path / "base", lambda _: {f"{TARGET}.weight": weight})
    verdict, estimated, _ = Trial(base, plain.adapter, Gate()).judged(Severity.WARNING)
    assert not estimated
    assert verdict is Verdict.PASSED
