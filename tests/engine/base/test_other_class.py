"""A base in another class is what a load from its files gives, over the storage of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import LoraConfig

from merge_gate.engine.base import loaded_base as bases
from merge_gate.engine.base.loaded_base import Base, ModelClass, load_base, named_tensors
from merge_gate.engine.base.other_class import in_another_class
from merge_gate.files.preflight import preflight
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker.child import _judge_groups
from merge_gate.worker.group_bases import MappedBases
from merge_gate.worker.protocol import BaseLoaded, BaseLoading, Group, Job, Merged, Task
from tests.support.engine.base_headers import base_files
from tests.support.engine.merges import merge_adapter
from tests.support.merged import kept
from tests.support.models import among_transformers, save_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.models import Shelf

CLASSIFIER = "ForSequenceClassification"
PAIRS = {
    "another head": ("gpt2", "GPT2LMHeadModel", f"GPT2{CLASSIFIER}", 3),
    "another number of labels": ("gpt2", f"GPT2{CLASSIFIER}", f"GPT2{CLASSIFIER}", 5),
    "the head of the files": ("bert-classifier", "BertModel", f"Bert{CLASSIFIER}", None),
    "a head that gives way": ("bert-classifier", f"Bert{CLASSIFIER}", f"Bert{CLASSIFIER}", 7),
    "a pooler that the first lacks": ("bert", "BertForTokenClassification", f"Bert{CLASSIFIER}", 3),
    "shards": ("llama-sharded", "LlamaModel", "LlamaForCausalLM", None),
    "a tied head": ("llama-tied", "LlamaModel", "LlamaForCausalLM", None),
    "fused experts": ("mixtral", "MixtralForCausalLM", "MixtralModel", None),
    "a broken body": ("llama-nan-in-target", "LlamaForCausalLM", f"Llama{CLASSIFIER}", 3),
}


def load(shelf: Shelf, key: str, class_name: str, dtype: str, labels: int | None = None, **options: Any) -> Base:
    model_class = ModelClass(class_name=class_name, num_labels=labels)
    return load_base(str(shelf.base(key)), model_class=model_class, label=key, dtype=dtype, **options)


def places(base: Base) -> set[int]:
    return {tensor.data_ptr() for _, _, tensor in named_tensors(base.model)}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_what_the_files_give(pair: str, dtype: str, shelf: Shelf) -> None:
    key, first, second, labels = PAIRS[pair]
    known = load(shelf, key, first, dtype)
    before = {name: tensor.clone() for name, tensor in known.tensors.items()}
    fresh = load(shelf, key, second, dtype, labels)
    shared = in_another_class(known, ModelClass(class_name=second, num_labels=labels))
    assert shared is not None
    assert all(torch.equal(known.tensors[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    assert shared.facts.loaded_as == second
    assert shared.newly_initialized == fresh.newly_initialized
    assert shared.tensors.keys() == fresh.tensors.keys()
    from_files = fresh.tensors.keys() - fresh.newly_initialized
    for name in from_files:
        assert torch.equal(shared.tensors[name].nan_to_num(), fresh.tensors[name].nan_to_num()), name
        assert shared.tensors[name].dtype == fresh.tensors[name].dtype, name
        assert shared.stats[name] == fresh.stats[name]
    assert (shared.facts.parameters, shared.facts.nonfinite) == (fresh.facts.parameters, fresh.facts.nonfinite)
    assert shared.facts.replaced == fresh.facts.replaced
    assert len(places(shared) & places(known)) >= 0.7 * len(from_files)


def test_a_quantised_base_is_loaded_from_its_files(shelf: Shelf) -> None:
    known = load(shelf, "llama", "LlamaForCausalLM", "auto", quantization=Quantization.BNB_8BIT)
    assert in_another_class(known, ModelClass(class_name="LlamaModel")) is None


class Body(transformers.GPT2Model):  # type: ignore[misc]
    """GPT-2 under another name."""


class RoundedLess(Body):
    """A class may keep in float32 what the one before it has in float16."""

    _keep_in_fp32_modules = ("c_fc",)
    _keep_in_fp32_modules_strict = ("c_fc",)


@pytest.mark.parametrize("model_class", [Body, RoundedLess])
def test_what_would_be_rounded_twice_is_loaded_from_its_files(model_class: type[Body], shelf: Shelf) -> None:
    known = load(shelf, "gpt2", "GPT2LMHeadModel", "float16")
    with among_transformers(model_class) as name:
        shared = in_another_class(known, ModelClass(class_name=name))
    assert (shared is None) == (model_class is RoundedLess)


def test_the_first_may_be_let_go_of(shelf: Shelf) -> None:
    known: Base | None = load(shelf, "gpt2", "GPT2LMHeadModel", "bfloat16")
    assert known is not None
    shared = in_another_class(known, ModelClass(class_name="GPT2Model"))
    total = sum(float(tensor.abs().sum()) for name, tensor in known.tensors.items() if name != "lm_head.weight")
    known = None
    assert shared is not None
    assert sum(float(tensor.abs().sum()) for tensor in shared.tensors.values()) == pytest.approx(total)


# --- a fleet -------------------------------------------------------------------------------------------------------

TASKS = (("CAUSAL_LM", None), ("SEQ_CLS", 3), ("SEQ_CLS", 5), ("TOKEN_CLS", 4))


def fleet(shelf: Shelf, directory: Path) -> Group:
    """Eight adapters of one base with four heads: two of each."""
    for number in range(8):
        task_type, labels = TASKS[number % 4]
        config = LoraConfig(task_type=task_type, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        settings = {} if labels is None else {"num_labels": labels}
        save_adapter(shelf.base("gpt2"), directory / str(number), config, seed=number, **settings)
    tasks = tuple(
        Task(index=number, files=(preflight(str(directory / str(number)), allow_pickle=False),)) for number in range(8)
    )
    return Group(
        base=BaseKey(model="gpt2", revision=None, dtype="bfloat16", quantization="none"),
        directory=str(shelf.base("gpt2")),
        files=base_files(shelf.base("gpt2")),
        tasks=tasks,
    )


def test_eight_adapters_with_four_heads_read_the_body_once(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, loads, events = [0], [], []
    measure, load = bases.measure, bases.load_base

    def measured(tensor: torch.Tensor, name: str) -> Any:
        read[-1] += tensor.numel()
        return measure(tensor, name)

    def from_files(*directory: str, **settings: Any) -> Base:
        loads.append(settings["model_class"].class_name)
        return load(*directory, **settings)

    monkeypatch.setattr(bases, "measure", measured)
    monkeypatch.setattr(bases, "load_base", from_files)
    group = fleet(shelf, tmp_path)
    job, mapped = Job(groups=(group,), device="cpu"), MappedBases(group)
    for event in _judge_groups([0], job, lambda _: None, mapped, feed=None, connection=None):
        events.append(event)
        if isinstance(event, (BaseLoading, BaseLoaded)):
            read.append(0)
    loaded = [event.facts for event in events if isinstance(event, BaseLoaded)]
    assert [facts.loaded_as for facts in loaded] == [
        "GPT2LMHeadModel", f"GPT2{CLASSIFIER}", f"GPT2{CLASSIFIER}", "GPT2ForTokenClassification"
    ]  # fmt: skip
    assert loads == ["GPT2LMHeadModel"]
    body = loaded[0].parameters
    first, *others = read[1::2]
    assert (
        body <= first < 1.05 * body
    )  # what is too small to be cast when it is read is measured after its cast as well
    assert others == [facts.parameters - body for facts in loaded[1:]]
    merged = [event for event in events if isinstance(event, Merged)]
    assert len(merged) == 8
    assert all(event.evidence.refusal is None for event in merged)
    assert all(event.evidence.parameters_checked == event.evidence.parameters_total for event in merged)


@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "peft"])
def test_an_adapter_merges_into_the_same_bits(in_blocks: bool, shelf: Shelf, tmp_path: Path) -> None:
    targets = ["query", "value"] if in_blocks else ["query", "embeddings.word_embeddings"]
    base = shelf.base("bert-classifier")
    save_adapter(base, tmp_path / "a", LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets))
    files = preflight(str(tmp_path / "a"), allow_pickle=False)
    shared = in_another_class(
        load(shelf, "bert-classifier", "BertModel", "bfloat16"), ModelClass(class_name=f"Bert{CLASSIFIER}")
    )
    assert shared is not None
    seen = []
    for one in (shared, load(shelf, "bert-classifier", f"Bert{CLASSIFIER}", "bfloat16")):
        with kept() as tensors:
            evidence = merge_adapter(one, files)
        assert evidence.refusal is None
        assert evidence.parameters_checked == evidence.parameters_total
        seen.append(tensors)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
