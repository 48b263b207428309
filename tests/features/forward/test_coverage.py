"""What a run covers of an adapter: pictures for a model that sees, experts without tokens, and what `required` asks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.features.forward.run import MOST_NAMED
from merge_gate.files.preflight import preflight
from merge_gate.judging.adapter_report import merged_report
from merge_gate.records.config import ForwardMode
from merge_gate.records.files import Entry
from merge_gate.records.measured import Evidence
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter
from tests.support.gating import SPEC
from tests.support.judging.cases import files

LLAVA, SWITCH = "LlavaForConditionalGeneration", "SwitchTransformersForConditionalGeneration"
VISION = r".*vision_tower.*(v_proj|out_proj|fc2)"


def _llava() -> Any:
    """A model whose values grow in the vision tower."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=256, **size)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **size)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5)
    )
    for name, one in model.named_parameters():
        if "vision_tower" in name and any(part in name for part in ("v_proj.weight", "out_proj.weight", "fc1.weight")):
            one.mul_(60)
    return model


def _switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=16,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


@torch.no_grad()
def measured(root: Path, model_class: str, targets: str, scale: float, **settings: Any) -> Evidence:
    """An adapter of random factors, merged in float16. `settings` are changes of the base's config.json."""
    torch.manual_seed(0)
    model = {LLAVA: _llava, SWITCH: _switch}[model_class]()
    model.half().save_pretrained(root / "base")
    with methods.quiet():
        adapted: Any = get_peft_model(model.float(), LoraConfig(r=8, target_modules=targets))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            one.normal_(0, scale)
    adapted.save_pretrained(root / "adapter")
    path = root / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    base = load_local(str(root / "base"), label="base", model_class=ModelClass(class_name=model_class))
    return merge_adapter(base, preflight(str(root / "adapter"), allow_pickle=False))


def judged(evidence: Evidence, forward: ForwardMode = ForwardMode.AUTO) -> AdapterReport:
    return merged_report(Entry(spec=replace(SPEC, forward=forward), dtype="float16", members=(files(),)), evidence)


def test_a_vision_adapter_that_overflows_fails(tmp_path: Path) -> None:
    """No weight is above 150."""
    evidence = measured(tmp_path, LLAVA, VISION, 140.0)
    assert max(one.stats.max_abs for one in evidence.merges) < 150
    forward, report = evidence.forward, judged(evidence)
    assert (forward.inputs, forward.modules, forward.modules_run) == ("all inputs", 6, 6)
    assert (forward.not_run, forward.why_not) == ((), None)
    assert (report.verdict, report.cause) == (Verdict.FAILED, "activation-nonfinite")


def test_a_model_without_a_picture_is_an_error_only_if_required(tmp_path: Path) -> None:
    """The token of a picture is none of the model's."""
    evidence = measured(tmp_path, LLAVA, VISION, 140.0, image_token_id=300, image_token_index=300)
    forward = evidence.forward
    assert (forward.inputs, forward.modules, forward.modules_run) == ("text", 6, 0)
    assert len(forward.not_run) == 6
    assert "pixel_values" in (forward.why_not or "")
    assert judged(evidence).verdict is Verdict.PASSED
    report = judged(evidence, ForwardMode.REQUIRED)
    assert (report.verdict, report.cause) == (Verdict.ERROR, "not-judged")
    assert all(name in report.findings[0].message for name in forward.not_run)


def test_experts_without_a_token_are_named_and_do_not_count(tmp_path: Path) -> None:
    evidence = measured(tmp_path, SWITCH, r".*experts.*(wi|wo)", 0.01)
    forward = evidence.forward
    assert forward.modules == forward.modules_run
    assert 0 < (forward.modules or 0) < 64
    assert len(forward.not_counted) == MOST_NAMED
    assert all("expert_" in name for name in forward.not_counted)
    assert (forward.not_run, forward.why_not) == ((), None)
    assert judged(evidence, ForwardMode.REQUIRED).verdict is Verdict.PASSED
