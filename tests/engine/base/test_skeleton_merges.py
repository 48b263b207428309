"""Adapters on a base that is filled from a feed have the evidence and the bits that they have on a loaded base."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import transformers
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter import load_adapter as load_adapter_module
from merge_gate.engine.adapter.inject import parameters_of
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.adapter_evidence import MergeRequest, merge, merge_together
from merge_gate.engine.base import skeleton
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.merge import adapter_merge, one_pass
from merge_gate.engine.merge.private_copies import factors_in_memory, map_factors
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.threads import AHEAD
from merge_gate.features.stream import passes
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from merge_gate.records.files import FileSpan
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker import sandbox
from merge_gate.worker.child import judge_job
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseMeasured,
    DeviceChosen,
    Event,
    Group,
    Job,
    Merged,
    MergeStarted,
    Task,
)
from tests.support import methods
from tests.support.engine.base_headers import base_files, stored_tensors
from tests.support.engine.fed_bases import CountingFeed, EndingFeed, source
from tests.support.engine.local_bases import load_base
from tests.support.engine.merges import RUNS, runs
from tests.support.faults import configure
from tests.support.files.pickles import read_pickle
from tests.support.merged import kept
from tests.support.models import VARIANTS, read_tensors, write_tensors
from tests.support.sampled import sampled

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.measured import Evidence
    from tests.support.models import Shelf

VARIANTS_IN_SLICE = (
    "every-projection", "dora-all-linear", "embedding", "modules-to-save", "lora-bias", "pissa", "bias-all",
    "resized-vocabulary", "token-rows", "rslora", "per-expert",
)  # fmt: skip

METHODS_IN_SLICE = (
    "lora-dora", "lora-olora", "lora-kasa", "lora-tokens", "lora-lm-head-saved", "lora-conv1d-gpt2", "lora-experts",
    "lora-experts-qwen", "lora-tied-tokens", "lora-mha", "osf-linear", "psoft-linear", "ln-norm",
)  # fmt: skip


def bases(directory: Path, model_class: ModelClass, dtype: str, *, is_mapped: bool = False) -> tuple[Base, Base]:
    """The skeleton, and the loaded base."""
    feed, stored = LocalFeed(str(directory)), stored_tensors(directory)
    with methods.quiet():
        ours = skeleton_of(source(directory, dtype), model_class, stored, feed, is_mapped=is_mapped)
        return ours, load_base(str(directory), model_class=model_class, label="base", dtype=dtype)


def outcome(base: Base, adapter: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The evidence as text, because NaN is not NaN, and the merged tensors."""
    with kept() as tensors:
        evidence = merge(
            MergeRequest(
                base=base,
                members=(preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle),),
                consumers=runs(),
            )
        )
    names = [merge.stats.name for merge in evidence.merges]  # an attempt that did not count has others
    return comparable(evidence), {name: tensors[name] for name in names if name in tensors}


def comparable(evidence: Evidence) -> str:
    """Which layers are cross-checked may differ, not how many."""
    forward = replace(evidence.forward, largest_difference=None)
    return repr(replace(evidence, seconds=0.0, forward=forward, cross_checked=(str(len(evidence.cross_checked)),)))


def assert_same(ours: Base, theirs: Base, adapter: Path) -> None:
    (text, merged), (expected_text, expected) = outcome(ours, adapter), outcome(theirs, adapter)
    assert text == expected_text
    assert merged.keys() == expected.keys()
    assert [name for name, tensor in merged.items() if not same_bits(tensor, expected[name])] == []
    assert not ours.was_misread()
    assert ours.stats == theirs.stats


@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
@pytest.mark.parametrize("name", sampled(VARIANTS_IN_SLICE, VARIANTS_IN_SLICE[::3]))
def test_a_variant_of_lora_comes_to_the_same(name: str, is_mapped: bool, shelf: Shelf) -> None:
    directory, adapter = shelf.base(VARIANTS[name].base), shelf.adapter(name)
    model_class = model_class_for(
        str(directory), preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle), stored_tensors(directory)
    )
    assert_same(*bases(directory, model_class, "bfloat16", is_mapped=is_mapped), adapter)


@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
@pytest.mark.parametrize("name", sampled(METHODS_IN_SLICE, METHODS_IN_SLICE[::4]))
def test_a_method_comes_to_the_same(name: str, is_mapped: bool, tmp_path: Path) -> None:
    """In bfloat16; test_methods.py compares the bits of all methods with PEFT's, also in float32 and from a feed."""
    case, base, adapter = methods.find(name), tmp_path / "base", tmp_path / "a"
    methods.save_base(case.base, base)
    methods.save_adapter(case, methods.load_base(case.base, base), adapter, base_directory=base)
    model_class = model_class_for(
        str(base), preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle), stored_tensors(base)
    )
    assert_same(*bases(base, model_class, "bfloat16", is_mapped=is_mapped), adapter)


# --- one pass ------------------------------------------------------------------------------------------------------


def fed(directory: Path, adapter: Path, feed: LocalFeed) -> Base:
    model_class = model_class_for(
        str(directory), preflight(str(adapter), allow_pickle=False), stored_tensors(directory)
    )
    with methods.quiet():
        return skeleton_of(source(directory, "auto"), model_class, stored_tensors(directory), feed)


def request(base: Base, adapter: Path) -> MergeRequest:
    """To merge alone: a run of the models reads the base once more."""
    members = (preflight(str(adapter), allow_pickle=False),)
    return MergeRequest(base=base, members=members, no_forward="not of interest")


@pytest.mark.parametrize("threads", ["1", "4"])
def test_every_byte_is_read_once_for_all_adapters(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    adapters = [shelf.adapter(name) for name in ("every-projection", "dora-all-linear", "plain")]
    directory = shelf.base("llama")
    feed = CountingFeed(str(directory))
    base = fed(directory, adapters[0], feed)
    merged = merge_together([request(base, adapter) for adapter in adapters])
    stored = {one.name: one for one in stored_tensors(directory)}
    spans = sorted((one.span for one in stored_bytes(str(directory), stored).values()), key=lambda one: one.start)
    assert feed.expected == feed.prefetched == [spans]
    assert set(feed.reads) == set(spans)
    twice = [span for span, count in Counter(feed.reads).items() if count > 1]
    assert max(span.end - span.start for span in twice) <= 128  # biases next to a cross-checked weight
    assert [one is not None and one.layers_in_blocks > 0 and one.refusal is None for one in merged] == [True] * 3
    assert not base.unmeasured()
    feed.reads.clear()
    assert merge(request(base, adapters[0])).layers_in_blocks  # a second batch reads what it merges
    assert 0 < len(feed.reads) < len(spans)
    assert feed.expected[1] == [span for span in spans if span in feed.reads and span not in twice]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_layers_that_peft_merges_are_read_once_too(
    threads: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    directory = tmp_path / "base"
    methods.save_base("llama", directory)
    adapters = [tmp_path / name for name in ("loha-linear", "ia3-linear", "oft-linear", "lora-linear")]
    for adapter in adapters:
        model = methods.load_base("llama", directory)
        methods.save_adapter(methods.find(adapter.name), model, adapter, base_directory=directory)
    feed = CountingFeed(str(directory))
    base = fed(directory, adapters[0], feed)
    worked: list[str] = []
    requests = [replace(request(base, one), on_work=functools.partial(worked.append, one.name)) for one in adapters]
    together = [one for one in merge_together(requests) if one is not None]
    assert worked.count("loha-linear") == 2 + together[0].layers_by_peft
    assert len(feed.reads) == len(set(feed.reads)) == len(base.tensors)
    assert [one.layers_by_peft > 0 for one in together] == [True, True, True, False]
    _, real = bases(directory, ModelClass(class_name=type(base.model).__name__), "auto")
    assert [comparable(one) for one in together] == [comparable(merge(request(real, one))) for one in adapters]


def test_a_merge_that_draws_numbers_runs_in_order_of_its_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the projections in another order than the model."""
    adapter, directory = tmp_path / "adapter", tmp_path / "base"
    methods.save_base("llama", directory)
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    case = methods.make_case("loha", "llama", "LoHaConfig", r=2, target_modules=projections)
    methods.save_adapter(case, methods.load_base("llama", directory), adapter, base_directory=directory)
    base = fed(directory, adapter, LocalFeed(str(directory)))
    _, real = bases(directory, ModelClass(class_name=type(base.model).__name__), "auto")
    numbers: dict[float, float] = {}
    own = LycorisLayer.merge

    def merge_with_number(layer: Any, *given: Any, **named: Any) -> None:
        numbers[float(layer.get_base_layer().weight.double().sum())] = float(torch.rand(()))
        own(layer, *given, **named)

    monkeypatch.setattr(LycorisLayer, "merge", merge_with_number)
    drawn = []
    for one in (base, real):
        torch.manual_seed(0)
        numbers.clear()
        drawn.append((comparable(merge(request(one, adapter))), dict(numbers)))
    assert len(numbers) > 1
    assert drawn[0] == drawn[1]


def test_adapters_of_one_pass_have_the_evidence_of_a_loaded_base(shelf: Shelf) -> None:
    adapters = [shelf.adapter(name) for name in ("every-projection", "pissa", "modules-to-save", "resized-vocabulary")]
    directory = shelf.base("llama")
    base = fed(directory, adapters[0], LocalFeed(str(directory)))
    _, real = bases(directory, ModelClass(class_name=type(base.model).__name__), "auto")
    together = [one for one in merge_together([request(base, adapter) for adapter in adapters]) if one is not None]
    assert [comparable(one) for one in together] == [comparable(merge(request(real, one))) for one in adapters]


def test_no_merge_changes_a_tensor_of_other_adapters(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [shelf.adapter(name) for name in ("every-projection", "dora-all-linear", "lora-bias", "modules-to-save")]
    directory = shelf.base("llama")
    base = fed(directory, adapters[0], LocalFeed(str(directory)))
    own, same = one_pass._Pass._visit_tensor, dict[str, bool]()

    def visit(self: Any, of: Base, name: str) -> None:
        before = of.tensors[name].clone()
        own(self, of, name)
        same[name] = same_bits(of.tensors[name], before)

    monkeypatch.setattr(one_pass._Pass, "_visit_tensor", visit)
    assert None not in merge_together([request(base, adapter) for adapter in adapters])
    assert same.keys() == base.tensors.keys()
    assert all(same.values())


def test_adapters_that_wait_have_the_memory_of_their_files(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    own = adapter_evidence.map_factors

    def map_factors(model: Any, *others: Any) -> frozenset[int]:
        loads.append((model, own(model, *others)))
        return cast("frozenset[int]", loads[-1][1])

    monkeypatch.setattr(adapter_evidence, "map_factors", map_factors)
    names = ("every-projection", "dora-all-linear", "embedding", "token-rows")
    adapters, directory = [shelf.adapter(name) for name in names], shelf.base("llama")
    base = fed(directory, adapters[0], LocalFeed(str(directory)))
    together = [one for one in merge_together([request(base, adapter) for adapter in adapters]) if one is not None]
    for model, mapped in loads:
        factors = [one for name, one in model.named_parameters() if "lora_" in name]
        files = mapped_files()
        inside = [any(start <= one.data_ptr() < end for start, end in files) for one in factors if id(one) in mapped]
        assert len(inside) >= len(factors)
        assert all(inside)
    _, real = bases(directory, ModelClass(class_name=type(base.model).__name__), "auto")
    assert [comparable(one) for one in together] == [comparable(merge(request(real, one))) for one in adapters]
    assert len(loads) == len(adapters)


def test_factors_of_a_file_are_copied_for_a_merge(shelf: Shelf) -> None:
    """A tensor in a file has another alignment than torch's, and PEFT's bits may depend on that."""
    directory, adapter = shelf.base("llama"), shelf.adapter("every-projection")
    base = fed(directory, adapter, LocalFeed(str(directory)))
    files = preflight(str(adapter), allow_pickle=False)
    with methods.quiet():
        loaded = load_adapter_module.load_adapter(base, files, weights := read_weights(files))
    mapped = map_factors(loaded.model, loaded.arrivals[0], weights)
    layer = next(module for module in loaded.model.modules() if isinstance(module, BaseTunerLayer))
    factors = [factor for _, _, factor in parameters_of(layer)]
    before = [(factor.data_ptr(), factor.data.clone()) for factor in factors]
    with factors_in_memory(layer, mapped):
        for factor, (place, values) in zip(factors, before, strict=True):
            assert factor.data_ptr() % 64 == 0
            assert factor.data_ptr() != place
            assert same_bits(factor.data, values)
    assert [factor.data_ptr() for factor in factors] == [place for place, _ in before]


def test_a_merge_without_memory_is_refused_before_it_reads(shelf: Shelf) -> None:
    directory, adapters = shelf.base("llama"), [shelf.adapter("every-projection"), shelf.adapter("plain")]
    feed = CountingFeed(str(directory))
    base = fed(directory, adapters[0], feed)
    requests = [replace(request(base, adapter), free_bytes=1 << 10) for adapter in adapters]
    with pytest.raises(EngineError, match="takes at least"):
        merge(requests[0])
    assert merge_together(requests) == (None, None)
    assert feed.reads == feed.prefetched == []
    together = merge_together([replace(requests[0], free_bytes=1 << 20), requests[1]])
    assert [one is not None for one in together] == [True, False]


def mapped_files() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    places = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(start, 16), int(end, 16)) for start, end in places]


def test_a_base_that_is_not_finite_is_measured_in_the_pass(shelf: Shelf, tmp_path: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama"), dtype="auto")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = math.nan
        model.lm_head.weight[0, 0] = math.inf
    model.save_pretrained(tmp_path)
    adapter = shelf.adapter("every-projection")
    base = fed(tmp_path, adapter, LocalFeed(str(tmp_path)))
    assert base.facts.nonfinite == ()
    _, real = bases(tmp_path, ModelClass(class_name="LlamaForCausalLM"), "auto")
    assert len(real.facts.nonfinite) == 2
    assert comparable(merge(request(base, adapter))) == comparable(merge(request(real, adapter)))
    assert base.facts == real.facts


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan),
        lambda tensors: [tensor.fill_(1e25) for tensor in tensors.values()],
        lambda tensors: [tensor.zero_() for tensor in tensors.values()],
        lambda tensors: tensors.pop(next(iter(tensors))),
        lambda tensors: tensors.update(odd=torch.ones(2)),
    ],
    ids=["nan", "large", "zero", "lacking", "unexpected"],
)
@pytest.mark.parametrize("name", ["every-projection", "dora-all-linear", "modules-to-save"])
def test_a_broken_adapter_comes_to_the_same(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], shelf: Shelf, tmp_path: Path
) -> None:
    adapter = shutil.copytree(shelf.adapter(name), tmp_path / "broken")
    tensors = read_tensors(adapter)
    change(tensors)
    write_tensors(adapter, tensors)
    assert_same(*bases(shelf.base("llama"), ModelClass(class_name="LlamaForCausalLM"), "bfloat16"), adapter)


def test_a_module_is_copied_under_meta_in_another_dtype(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of a trained module are made while PEFT's factors are made on the meta device."""
    adapter, directory = shelf.adapter("modules-to-save"), shelf.base("llama")
    ours, _ = bases(directory, ModelClass(class_name="LlamaForCausalLM"), "float16")
    templates: list[bool] = []
    own = load_adapter_module._make_template

    def make(base: Base, files: Any, *, blank: bool = False, filled: bool = False) -> Any:
        templates.append(blank)
        return own(base, files, blank=blank, filled=filled)

    monkeypatch.setattr(load_adapter_module, "_make_template", make)
    assert merge(request(ours, adapter)).refusal is None
    assert templates == [True]


def test_a_refused_adapter_has_a_base_that_was_measured(shelf: Shelf, tmp_path: Path) -> None:
    adapter = shutil.copytree(shelf.adapter("plain"), tmp_path / "elsewhere")
    configure(target_modules=["absent"])(adapter)
    directory = shelf.base("llama")
    base = fed(directory, adapter, LocalFeed(str(directory)))
    assert merge(request(base, adapter)).refusal is not None
    assert base.unmeasured() == []


def test_bytes_that_cannot_be_had_are_an_error_for_all_adapters(shelf: Shelf) -> None:
    adapters, directory = [shelf.adapter(name) for name in ("every-projection", "plain")], shelf.base("llama")
    feed = EndingFeed(str(directory))
    base = fed(directory, adapters[0], feed)
    with pytest.raises(SourceError, match="gone"):
        merge_together([request(base, adapter) for adapter in adapters])
    with pytest.raises(SourceError, match="gone"):
        merge(request(base, adapters[0]))
    assert feed.reads <= 6 + 2 * AHEAD


def test_a_pass_that_reads_a_tensor_without_values_is_repeated(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, directory = [shelf.adapter(name) for name in ("every-projection", "plain")], shelf.base("llama")
    base = fed(directory, adapters[0], LocalFeed(str(directory)))
    sums: list[float] = []
    own = adapter_merge.AdapterMerge.finish

    def finish(self: adapter_merge.AdapterMerge) -> None:
        sums.append(float(base.tensors["model.norm.weight"].float().abs().sum()))
        own(self)

    monkeypatch.setattr(adapter_merge.AdapterMerge, "finish", finish)
    assert None not in merge_together([request(base, adapter) for adapter in adapters])
    assert sums[:2] == [0.0, 0.0]
    assert len(sums) == 4
    assert min(sums[2:]) > 0


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_worker_reports_the_facts_once_they_are_known(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "off")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama"), dtype="auto")
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(tmp_path)
    files = [preflight(str(shelf.adapter(name)), allow_pickle=False) for name in ("every-projection", "plain")]
    tasks = tuple(Task(index=index, files=(one,)) for index, one in enumerate(files))
    key = BaseKey(model="base", revision=None, dtype="auto", quantization="none")
    of_pass: dict[bool, list[Any]] = {}
    for is_in_pass in (True, False):
        group = Group(base=key, directory=str(tmp_path), files=base_files(tmp_path), tasks=tasks, one_pass=is_in_pass)
        events = judge_job(Job(groups=(group,), device="cpu"), lambda _: None, Sandbox())
        of_pass[is_in_pass] = [event for event in events if not isinstance(event, DeviceChosen | MergeStarted)]
    names = [type(event).__name__ for event in of_pass[True]]
    assert names == ["BaseLoading", "BaseLoaded", "BaseMeasured", "Merged", "Merged"]
    loaded, measured, *merged = of_pass[True][1:]
    _, loaded_whole, *merged_whole = of_pass[False]
    assert (loaded.measured, loaded_whole.measured) == (False, True)
    assert measured.facts == loaded_whole.facts != loaded.facts
    assert [comparable(one.evidence) for one in merged] == [comparable(one.evidence) for one in merged_whole]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_dtypes_and_classes_of_a_base_are_read_in_one_pass(
    threads: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two adapters in two dtypes, and a head of another class in one: each stored tensor is read once for all five."""
    monkeypatch.setenv(sandbox.SWITCH, "off")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    directory = shelf.base("llama")
    classifier = shutil.copytree(shelf.adapter("plain"), tmp_path / "classifier")
    configure(task_type="SEQ_CLS")(classifier)
    head = {"base_model.model.score.weight": torch.ones(3, 32)}
    write_tensors(classifier, read_tensors(classifier) | head)
    reads: list[FileSpan] = []
    own = LocalFeed.read

    def read(self: LocalFeed, file: str, start: int, into: memoryview) -> None:
        reads.append(FileSpan(file=file, start=start, end=start + into.nbytes))
        own(self, file, start, into)

    monkeypatch.setattr(LocalFeed, "read", read)
    adapters = (shelf.adapter("every-projection"), shelf.adapter("dora-all-linear"))
    files = [preflight(str(adapter), allow_pickle=False) for adapter in (*adapters, classifier)]
    key = BaseKey(model="base", revision=None, dtype="bfloat16", quantization="none")
    first = tuple(Task(index=index, files=(one,)) for index, one in enumerate(files))
    second = tuple(Task(index=3 + index, files=(one,)) for index, one in enumerate(files[:2]))
    groups = (
        Group(base=key, directory=str(directory), files=base_files(directory), tasks=first, one_pass=True),
        Group(
            base=replace(key, dtype="float32"),
            directory=str(directory),
            files=base_files(directory),
            tasks=second,
            one_pass=True,
        ),
    )
    events = list(judge_job(Job(groups=groups, device="cpu"), lambda _: None, Sandbox()))
    stored = {one.name: one for one in stored_tensors(directory)}
    spans = {one.span for one in stored_bytes(str(directory), stored).values()}
    assert set(reads) == spans
    twice = [span for span, count in Counter(reads).items() if count > 1]
    assert max((span.end - span.start for span in twice), default=0) <= 128  # biases next to a cross-checked weight
    loaded = [event for event in events if isinstance(event, BaseLoaded)]
    assert [(event.group, event.facts.loaded_as, event.measured) for event in loaded] == [
        (0, "LlamaForCausalLM", False), (0, "LlamaForSequenceClassification", False), (1, "LlamaForCausalLM", False)
    ]  # fmt: skip
    assert [(event.task, event.others) for event in events if isinstance(event, MergeStarted)] == [(0, (1, 2, 3, 4))]
    measured = [event for event in events if isinstance(event, BaseMeasured)]
    assert [(event.group, event.task) for event in measured] == [(0, 0), (0, 2), (1, 3)]
    whole = Job(groups=tuple(replace(group, one_pass=False) for group in groups), device="cpu")
    expected = list(judge_job(whole, lambda _: None, Sandbox()))
    assert merged_of(events) == merged_of(expected)
    facts = {(one.group, one.facts.loaded_as): one.facts for one in expected if isinstance(one, BaseLoaded)}
    assert [event.facts for event in measured] == [facts[one.group, one.facts.loaded_as] for one in measured]


RANDOM_HEAD = re.compile(r"(module='score', .*?)base_norm=[^,]*, delta_norm=[^,]*")
"""A head that is not in the base's files has random values, so the norms of what the adapter changes are random."""


def merged_of(events: list[Event]) -> dict[int, str]:
    merged = {one.task: comparable(one.evidence) for one in events if isinstance(one, Merged)}
    return {task: RANDOM_HEAD.sub(r"\1", text) for task, text in merged.items()}


def test_bases_that_hold_much_for_good_have_passes_of_their_own(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of its own reads again what is merged, and the figures of the rest are those of the first pass."""
    monkeypatch.setenv(sandbox.SWITCH, "off")
    monkeypatch.setattr(passes, "fit", lambda *_: False)
    adapter = preflight(str(shelf.adapter("every-projection")), allow_pickle=False)
    key = BaseKey(model="base", revision=None, dtype="bfloat16", quantization="none")
    directory = str(shelf.base("llama"))
    groups = tuple(
        Group(
            base=replace(key, dtype=dtype),
            directory=directory,
            files=base_files(directory),
            tasks=(task,),
            one_pass=True,
        )
        for dtype, task in (
            ("bfloat16", Task(index=0, files=(adapter,))),
            ("float16", Task(index=1, files=(adapter,))),
        )
    )
    events = list(judge_job(Job(groups=groups, device="cpu"), lambda _: None, Sandbox()))
    assert [(event.task, event.others) for event in events if isinstance(event, MergeStarted)] == [(0, ()), (1, ())]
    whole = Job(groups=tuple(replace(group, one_pass=False) for group in groups), device="cpu")
    assert merged_of(events) == merged_of(list(judge_job(whole, lambda _: None, Sandbox())))


def test_a_class_that_needs_its_values_is_loaded_from_the_files(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "off")
    monkeypatch.setattr(skeleton, "_groups", lambda *_: (_ for _ in ()).throw(NoSkeletonError("odd")))
    files = preflight(str(shelf.adapter("plain")), allow_pickle=False)
    key = BaseKey(model="base", revision=None, dtype="auto", quantization="none")
    tasks = (Task(index=0, files=(files,), consumers=RUNS),)
    group = Group(
        base=key, directory=str(shelf.base("llama")), files=base_files(shelf.base("llama")), tasks=tasks, one_pass=True
    )
    events = list(judge_job(Job(groups=(group,), device="cpu"), lambda _: None, Sandbox()))
    loaded = [event for event in events if isinstance(event, BaseLoaded)]
    assert [(event.measured, event.facts.no_skeleton) for event in loaded] == [(True, "odd")]
    assert isinstance(events[-1], Merged)
