"""Which class a base is loaded with, and with how many labels: as the adapter's user would load it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.gating import Gate
from tests.support.models import (
    VARIANTS,
    Shelf,
    _noise,
    read_config,
    read_tensors,
    save_adapter,
    write_config,
    write_tensors,
)

QV = {"r": 4, "target_modules": ["query", "value"]}


def class_of(adapter: Path, base: Path) -> ModelClass:
    return model_class_for(str(base), preflight(str(adapter), allow_pickle=False), stored_tensors(base))


def set_task(adapter: Path, task_type: str | None) -> None:
    write_config(adapter, read_config(adapter) | {"task_type": task_type})


def test_a_head_of_another_size_gives_way_to_the_adapters(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("bert-classifier")
    save_adapter(shelf.base("bert"), tmp_path / "five", LoraConfig(task_type="SEQ_CLS", **QV), num_labels=5)
    judgement = Gate().judge(tmp_path / "five", base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert judgement.evidence.base.replaced == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize(("rows", "num_labels"), [(5, 5), (3, None), (1 << 20, 1 << 20), (1 << 40, None)])
def test_a_head_has_no_more_labels_than_a_config_can_name(rows, num_labels, shelf, tmp_path) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="SEQ_CLS", **QV), num_labels=5)
    files = preflight(str(tmp_path / "a"), allow_pickle=False)
    bias = replace(next(one for one in files.tensors if one.name.endswith("classifier.bias")), shape=(rows,))
    base = shelf.base("bert-classifier")
    model_class = model_class_for(str(base), replace(files, tensors=(bias,)), stored_tensors(base))
    assert model_class.num_labels == num_labels


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip
WITH_LABELS = {
    "segmentation": (
        transformers.SegformerForImageClassification,
        transformers.SegformerConfig(**SEGFORMER, num_labels=10),
        transformers.SegformerForSemanticSegmentation,
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["decode_head"]},
    ),
    "detection": (
        transformers.YolosForObjectDetection,
        transformers.YolosConfig(**VISION, image_size=[32, 32], patch_size=8, num_labels=7),
        transformers.YolosForObjectDetection,
        {"target_modules": ["query", "value"], "modules_to_save": ["class_labels_classifier"]},
    ),
    "questions": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**VISION, vocab_size=64, num_labels=3),
        transformers.BertForQuestionAnswering,
        {"target_modules": ["query", "value"], "task_type": "QUESTION_ANS"},
    ),
}
"""By task: a base and its config with its own labels, the class that it is trained as, and settings of a LoRA."""


@pytest.mark.parametrize("task", WITH_LABELS)
def test_a_head_of_any_task_has_its_own_labels(tmp_path: Path, task: str) -> None:
    base_class, config, model_class, settings = WITH_LABELS[task]
    base_class(config).save_pretrained(tmp_path / "base")

    def user() -> Any:
        return model_class.from_pretrained(tmp_path / "base", num_labels=2, ignore_mismatched_sizes=True)

    with methods.quiet():
        model = get_peft_model(user(), LoraConfig(r=4, **settings))
        _noise(model, seed=1)
        model.save_pretrained(tmp_path / "a")
        PeftModel.from_pretrained(user(), tmp_path / "a").merge_and_unload(safe_merge=True)
    judgement = Gate().judge(tmp_path / "a", tmp_path / "base")
    assert judgement.verdict is Verdict.PASSED, judgement


@pytest.mark.parametrize("base", ["bert", "bert-classifier"])
def test_names_of_the_bare_model_outweigh_the_task_type(shelf: Shelf, tmp_path: Path, base: str) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    set_task(tmp_path / "a", "SEQ_CLS")
    judgement = Gate().judge(tmp_path / "a", shelf.base(base))
    assert judgement.verdict is Verdict.PASSED, judgement
    (finding,) = (f for f in judgement.findings if "BertForSequenceClassification" in f.message)
    assert (finding.check, finding.severity) == ("base-mismatch", Severity.WARNING)
    assert "BertModel" in finding.message


def test_names_of_a_model_with_a_head_outweigh_the_task_type(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("bert-classifier")
    save_adapter(base, tmp_path / "a", LoraConfig(task_type="SEQ_CLS", **QV))
    write_tensors(tmp_path / "a", {k: v for k, v in read_tensors(tmp_path / "a").items() if "classifier" not in k})
    write_config(tmp_path / "a", read_config(tmp_path / "a") | {"modules_to_save": None})
    set_task(tmp_path / "a", "FEATURE_EXTRACTION")
    judgement = Gate().judge(tmp_path / "a", base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert any("BertForSequenceClassification" in finding.message for finding in judgement.findings)


def test_an_untrained_adapter_of_the_bare_model_has_no_effect(shelf: Shelf, tmp_path: Path) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    set_task(tmp_path / "a", "SEQ_CLS")
    zeroed = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in read_tensors(tmp_path / "a").items()}
    write_tensors(tmp_path / "a", zeroed)
    judgement = Gate().judge(tmp_path / "a", shelf.base("bert"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


def test_names_that_fit_no_class_leave_the_task_types(shelf: Shelf, tmp_path: Path) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    renamed = {k.replace("encoder", "transformer"): v for k, v in read_tensors(tmp_path / "a").items()}
    write_tensors(tmp_path / "a", renamed)
    model_class = class_of(tmp_path / "a", shelf.base("bert"))
    assert (model_class.class_name, model_class.instead_of) == ("BertModel", None)


@pytest.mark.parametrize("variant", ["plain", "conv1d", "opt", "fused-experts", "classifier", "feature-extraction"])
def test_two_names_of_one_class_share_a_load(shelf: Shelf, tmp_path: Path, variant: str) -> None:
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    shapes = set()
    for task_type in (read_config(adapter)["task_type"], None):
        directory = shutil.copytree(adapter, tmp_path / str(task_type))
        set_task(directory, task_type)
        shapes.add(class_of(directory, base))
    assert len(shapes) == 1


TEXT = VISION | {
    "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PICTURES = VISION | {"image_size": 8, "patch_size": 4}


def save_llava(directory: Path) -> Path:
    torch.manual_seed(0)
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**PICTURES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=62)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)
    return directory


def save_on(model: transformers.PreTrainedModel, directory: Path, **settings: Any) -> None:
    peft_model = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)))
    _noise(peft_model, 1)
    peft_model.save_pretrained(directory)


def changed_by_peft(model: transformers.PreTrainedModel, adapter: Path) -> set[str]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with methods.quiet():
        after = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


OLD_NAMES = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
"""Of a Llava in transformers 4.52 and before; PEFT loads a LoRA with them."""


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("loses", ["nothing", "the vision tower"])
def test_old_names_are_those_of_the_class_that_peft_loads(loses: str, task_type: str | None, tmp_path: Path) -> None:
    """Names that only look like those of the bare model: the user's class has a head, and PEFT may lose a part."""
    base = save_llava(tmp_path / "base")
    with methods.quiet():
        load = transformers.LlavaForConditionalGeneration.from_pretrained
        save_on(load(base), tmp_path / "a", task_type=task_type)
        tensors = read_tensors(tmp_path / "a")
        for new, old in OLD_NAMES.items():
            old = old.replace("vision_model.", "") if loses == "the vision tower" else old  # noqa: PLW2901
            tensors = {
                key.replace(f"base_model.model.{new}", f"base_model.model.{old}"): tensors[key] for key in tensors
            }
        write_tensors(tmp_path / "a", tensors)
        changed = changed_by_peft(load(base), tmp_path / "a")
    assert len(changed) == (8 if loses == "nothing" else 4)
    judgement = Gate().judge(tmp_path / "a", base)
    assert judgement.evidence.base.loaded_as == "LlavaForConditionalGeneration"
    expected = (Verdict.PASSED, None) if loses == "nothing" else (Verdict.FAILED, "keys-missing")
    assert (judgement.verdict, judgement.cause) == expected, judgement


def test_a_base_without_one_tensor_of_the_class_is_not_made_up(tmp_path: Path) -> None:
    """An adapter of a text model names its class (auto_mapping); the base's files have the names of another one."""
    vision = PICTURES | {"vision_use_head": False}
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4)
    text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    with methods.quiet():
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        save_on(text, tmp_path / "a")
        user, said = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {name for name, _ in user.named_parameters()} <= set(said["missing_keys"])
    with pytest.raises(CannotJudge, match=r"base_of_another_class.*Gemma3ForCausalLM"):
        Gate().judge(tmp_path / "a", tmp_path / "base")
