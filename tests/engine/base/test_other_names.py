"""Names of the text class of a base that is more than a text model, and of the class that config.json names."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.architectures import Architecture
from tests.support.gating import Gate, Judgement
from tests.support.models import Shelf, make_adapter, read_config, read_tensors, write_config, write_tensors
from tests.support.sampled import sampled

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("bases")


def built(bases: Path, model_type: str) -> Path:
    """A tiny base of the type, by its class of images and text."""
    if not (bases / model_type).exists():
        architectures.build(model_type, bases / model_type)
    return bases / model_type


def trained(bases: Path, model_type: str, class_name: str, task_type: str | None, adapter: Path) -> Path:
    """An adapter of this class on the base."""
    model_class: Any = getattr(transformers, class_name)
    architecture = Architecture(model_type=model_type, model_class=model_class, task_type=task_type, parameters=0)
    architectures.save_lora(architecture, built(bases, model_type), adapter)
    return adapter


def served(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors that PEFT applies if the base is loaded by the class that config.json names, by their names."""
    config = transformers.AutoConfig.from_pretrained(base)
    with methods.quiet():
        whole = getattr(transformers, config.architectures[0]).from_pretrained(base, dtype="auto")
        model = PeftModel.from_pretrained(whole, adapter)
    loaded = {name.replace(".default", ""): one.detach() for name, one in model.named_parameters() if "lora_B" in name}
    return {name: one for name, one in loaded.items() if one.any()}


def noted(judgement: Judgement) -> list[Severity]:
    return [finding.severity for finding in judgement.findings if finding.check == "served-names"]


Class = tuple[str, str, str | None]
"""A model type, a class of it, and the adapter's task type."""
OF_THE_TEXT: list[Class] = [
    ("qwen3_5", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("qwen2_5_vl", "Qwen2_5_VLTextModel", None),
    ("qwen3_5", "Qwen3_5ForCausalLM", None),
    ("llama4", "AutoModelForCausalLM", "CAUSAL_LM"),
]


@pytest.mark.parametrize("of", sampled(OF_THE_TEXT, OF_THE_TEXT[:2]))
def test_an_adapter_of_the_text_class_is_noted(of: Class, bases: Path, tmp_path: Path) -> None:
    """PEFT applies none of it to the whole model, and all of it by the names that the gate found."""
    base, adapter = built(bases, of[0]), trained(bases, *of, tmp_path / "a")
    judgement = Gate().judge(adapter, base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert noted(judgement) == [Severity.NOTE]
    assert served(base, adapter) == {}
    assert judgement.evidence is not None and judgement.evidence.served is not None  # noqa: PT018 - narrows
    names = {module: judgement.evidence.served.names[module] for module in judgement.evidence.served.lacking}
    tensors = {
        f"{PREFIX}{names[module]}{name.removeprefix(PREFIX + module)}": tensor
        for name, tensor in read_tensors(adapter).items()
        for module in names
        if name.startswith(f"{PREFIX}{module}.lora_")
    }
    assert len(tensors) == len(read_tensors(adapter)) == 2 * len(judgement.evidence.targeted)
    write_tensors(adapter, tensors)
    assert served(base, adapter).keys() == {name for name in tensors if "lora_B" in name}
    targets = sorted(names.values())  # a suffix could also be that of a module of the vision part
    write_config(adapter, read_config(adapter) | {"task_type": None, "auto_mapping": None, "target_modules": targets})
    renamed = Gate().judge(adapter, base)
    assert (renamed.verdict, noted(renamed)) == (Verdict.PASSED, []), renamed


OF_THE_WHOLE: list[Class] = [
    ("qwen3_5", "Qwen3_5ForConditionalGeneration", "CAUSAL_LM"),
    ("gemma3", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("qwen3_5", "Qwen3_5ForConditionalGeneration", None),
    ("llama4", "Llama4ForConditionalGeneration", "CAUSAL_LM"),
    ("gemma3", "Gemma3ForConditionalGeneration", None),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", None),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", "CAUSAL_LM"),
]


@pytest.mark.parametrize("of", sampled(OF_THE_WHOLE, OF_THE_WHOLE[:2]))
def test_an_adapter_of_the_whole_is_not(of: Class, bases: Path, tmp_path: Path) -> None:
    base, adapter = built(bases, of[0]), trained(bases, *of, tmp_path / "a")
    assert served(base, adapter).keys() == {name for name in read_tensors(adapter) if "lora_B" in name}
    judgement = Gate().judge(adapter, base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert noted(judgement) == []


@pytest.mark.slow
def test_an_adapter_of_a_class_that_does_not_load_fails(bases: Path, tmp_path: Path) -> None:
    """Its merge is not right, so keys-missing says what is wrong."""
    adapter = trained(bases, "gemma3", "Gemma3ForCausalLM", "CAUSAL_LM", tmp_path / "a")
    judgement = Gate().judge(adapter, built(bases, "gemma3"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "keys-missing")
    assert noted(judgement) == []


SAMPLE = ("llava", "bert", "clip", "gpt2", "musicgen", "t5", "wav2vec2")


@pytest.mark.parametrize("model_type", sampled(SAMPLE, SAMPLE[:1]))
def test_an_adapter_of_the_class_in_the_config_is_not(model_type: str, tmp_path: Path) -> None:
    """A sample of the sweep of architectures. They differ in prefixes, layouts, and names that transformers renames."""
    with methods.quiet():
        architecture = architectures.build(model_type, tmp_path / "base")
        architectures.save_lora(architecture, tmp_path / "base", tmp_path / "a")
    assert noted(Gate().judge(tmp_path / "a", tmp_path / "base")) == []


def test_an_adapter_of_the_bare_class_is_not(tmp_path: Path) -> None:
    """Its names lack the prefix that transformers adds to those of a bare model."""
    architecture = architectures.build("bert", tmp_path / "base")
    bare = Architecture(
        model_type="bert", model_class=transformers.BertModel, task_type="FEATURE_EXTRACTION", parameters=0
    )
    architectures.save_lora(bare, tmp_path / "base", tmp_path / "a")
    assert architecture.model_class is not transformers.BertModel
    judgement = Gate().judge(tmp_path / "a", tmp_path / "base")
    assert judgement.verdict is Verdict.PASSED, judgement
    assert noted(judgement) == []


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_base_that_is_no_part_has_no_second_map(task_type: str, shelf: Shelf, tmp_path: Path) -> None:
    """A run of a usual adapter builds no other class."""
    make_adapter(shelf.base("llama"), tmp_path / "a", task_type=task_type)
    gate = Gate()
    judgement = gate.judge(tmp_path / "a", shelf.base("llama"))
    (base,) = gate.loaded.values()
    assert judgement.evidence.served is None
    assert base.named == (type(base.model).__name__, False, base.map)
