"""A base on a local disk is mapped from its files, for each class and dtype, and read no more often than necessary."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from merge_gate.engine.base import loaded_base as bases
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.skeleton import figures_by_span, skeleton_of
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.feed import LocalFeed
from merge_gate.worker.protocol import BaseLoaded, BaseLoading, Event, Group, Merged
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.jobs import events_as_they_come, events_of, group_of
from tests.support.engine.local_bases import edited_base, load_base
from tests.support.models import Shelf, save_adapter

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


def mapped(directory: Path, model_class: ModelClass, known: Base | None = None, feed: LocalFeed | None = None) -> Base:
    return skeleton_of(
        source(directory),
        model_class,
        stored_tensors(directory),
        feed or LocalFeed(str(directory)),
        is_mapped=True,
        known=figures_by_span(known) if known is not None else {},
    )


def test_in_the_stored_dtype_it_is_mapped_and_nothing_is_copied(shelf: Shelf) -> None:
    feed = CountingFeed(str(shelf.base("llama")))
    base = mapped(shelf.base("llama"), ModelClass(class_name="LlamaForCausalLM"), feed=feed)
    assert base.alone.keys() == base.tensors.keys()
    assert (base.lazy, base.feed, base.unmeasured(), feed.reads) == (None, None, [], [])


@pytest.mark.parametrize("pair", PAIRS)
def test_another_class_uses_the_figures_of_the_first(pair: str, shelf: Shelf) -> None:
    key, first, second, labels = PAIRS[pair]
    model_class = ModelClass(class_name=second, num_labels=labels)
    known, fresh = mapped(shelf.base(key), ModelClass(class_name=first)), mapped(shelf.base(key), model_class)
    other = mapped(shelf.base(key), model_class, known)
    real = load_base(str(shelf.base(key)), model_class=model_class, label="base")
    assert other.newly_initialized == real.newly_initialized
    assert other.tensors.keys() == real.tensors.keys()
    for name in real.tensors.keys() - real.newly_initialized:
        with other.filled([name]):
            assert same_bits(other.tensors[name], real.tensors[name]), name
        assert other.figures(name) == fresh.figures(name) == real.stats[name]
    assert other.facts.replaced == real.facts.replaced


TASKS = (("CAUSAL_LM", None), ("SEQ_CLS", 3), ("SEQ_CLS", 5), ("TOKEN_CLS", 4))


def test_eight_adapters_with_four_heads_measure_the_body_once(shelf, tmp_path, monkeypatch) -> None:
    for number in range(8):
        task_type, labels = TASKS[number % 4]
        config = LoraConfig(task_type=task_type, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        settings = {} if labels is None else {"num_labels": labels}
        save_adapter(shelf.base("gpt2"), tmp_path / str(number), config, seed=number, **settings)
    read = [0]
    measure = bases.measure

    def measured(tensor: torch.Tensor, name: str) -> Any:
        read[-1] += tensor.numel()
        return measure(tensor, name)

    def listened(event: Event) -> Event:
        if isinstance(event, (BaseLoading, BaseLoaded)):
            read.append(0)
        return event

    monkeypatch.setattr(bases, "measure", measured)
    group = group_of(shelf.base("gpt2"), *(tmp_path / str(one) for one in range(8)))
    events = [listened(event) for event in events_as_they_come(group)]
    loaded = [event.facts for event in events if isinstance(event, BaseLoaded)]
    assert [facts.loaded_as for facts in loaded] == [
        "GPT2LMHeadModel", f"GPT2{CLASSIFIER}", f"GPT2{CLASSIFIER}", "GPT2ForTokenClassification"
    ]  # fmt: skip
    body = loaded[0].parameters
    first, *others = read[1::2]
    assert (first, others) == (body, [facts.parameters - body for facts in loaded[1:]])
    merged = [event for event in events if isinstance(event, Merged)]
    assert len(merged) == 8
    assert all(event.evidence.refusal is None for event in merged)
    assert all(event.evidence.parameters_checked == event.evidence.parameters_total for event in merged)


def in_dtypes(base: Path, adapter: Path, *dtypes: str) -> tuple[Group, ...]:
    return tuple(group_of(base, adapter, dtype=dtype, first=number) for number, dtype in enumerate(dtypes))


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float16", "float32"), ("float32",), ("auto", "float16"), ("float16", "float64")]
)
def test_a_plain_base_is_never_loaded_into_memory(dtypes: tuple[str, ...], shelf: Shelf) -> None:
    events = events_of(*in_dtypes(shelf.base("llama-bfloat16"), shelf.adapter("bfloat16-base"), *dtypes))
    facts = [event.facts for event in events if isinstance(event, BaseLoaded)]
    assert not any(one.no_skeleton for one in facts)
    assert [one.dtype for one in facts] == [dtype.replace("auto", "bfloat16") for dtype in dtypes]
    merged = [event.evidence for event in events if isinstance(event, Merged)]
    assert [one.base for one in merged] == facts
    assert all(one.refusal is None and one.parameters_checked == one.parameters_total for one in merged)


@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan])
def test_what_the_dtype_cannot_hold_is_counted(value: float, shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("llama-bfloat16")
    directory = edited_base(base, tmp_path / "base", lambda tensors: tensors["lm_head.weight"][3, 5:6].fill_(value))
    events = events_of(group_of(directory, shelf.adapter("bfloat16-base"), dtype="float16"))
    (evidence,) = (event.evidence for event in events if isinstance(event, Merged))
    assert [one.name for one in evidence.base.nonfinite] == ["lm_head.weight"]
    model_class = ModelClass(class_name="LlamaForCausalLM")
    assert (
        evidence.base.nonfinite
        == load_base(str(directory), model_class=model_class, label="base", dtype="float16").facts.nonfinite
    )


def test_files_that_changed_in_between_are_read_again(shelf: Shelf, tmp_path: Path) -> None:
    directory = shutil.copytree(shelf.base("llama-bfloat16"), tmp_path / "base")
    seen = []
    for event in events_as_they_come(*in_dtypes(directory, shelf.adapter("bfloat16-base"), "bfloat16", "float16")):
        if isinstance(event, Merged):
            seen.append(len(event.evidence.base.nonfinite))
            tensors = load_file(directory / "model.safetensors")
            tensors["model.norm.weight"][3] = math.nan
            (directory / "model.safetensors").unlink()  # the mapping of the old one lives on
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert seen == [0, 1]
