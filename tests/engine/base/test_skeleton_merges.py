"""Adapters on a base that is filled from a feed have the evidence and the bits that they have on a loaded base."""

import functools
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft.tuners.lycoris_utils import LycorisLayer

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.base import loaded_base
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge import adapter_merge
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.threads import AHEAD
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import FileSpan
from merge_gate.worker.merging import passes
from merge_gate.worker.protocol import BaseLoaded, BaseMeasured, DeviceChosen, Event, Merged, MergeStarted
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, EndingFeed
from tests.support.engine.jobs import events_of, group_of
from tests.support.engine.local_bases import base_for, edited_adapter, edited_base, load_base
from tests.support.engine.merges import NOT_RUN, comparable, request_for
from tests.support.faults import configure
from tests.support.merged import kept
from tests.support.models import VARIANTS, Shelf, Tensors, read_tensors, write_tensors
from tests.support.sampled import sampled

VARIANTS_IN_SLICE = (
    "every-projection", "dora-all-linear", "embedding", "modules-to-save", "lora-bias", "pissa", "bias-all",
    "resized-vocabulary", "token-rows", "rslora", "per-expert",
)  # fmt: skip

NORM = "model.norm.weight"

request = functools.partial(request_for, no_forward=NOT_RUN)
"""To merge alone: a run of the models reads the base once more."""


def fed(directory: Path, adapter: Path, feed: LocalFeed | None = None) -> Base:
    with methods.quiet():
        return base_for(directory, adapter, is_mapped=False, feed=feed)


def real(directory: Path, adapter: Path, dtype: str = "auto") -> Base:
    with methods.quiet():
        return base_for(directory, adapter, dtype, load=load_base)


def outcome(base: Base, adapter: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The evidence, and the merged tensors."""
    with kept() as tensors:
        evidence = merge(request_for(base, adapter))
    names = [merge.stats.name for merge in evidence.merges]  # an attempt that did not count has others
    return comparable(evidence), {name: tensors[name] for name in names if name in tensors}


def assert_same(directory: Path, adapter: Path, *, is_mapped: bool = False) -> None:
    """In bfloat16; test_methods.py compares the bits of all methods with PEFT's, also in float32 and from a feed."""
    with methods.quiet():
        ours, theirs = (
            base_for(directory, adapter, "bfloat16", is_mapped=is_mapped),
            real(directory, adapter, "bfloat16"),
        )
    (text, merged), (expected_text, expected) = outcome(ours, adapter), outcome(theirs, adapter)
    assert text == expected_text
    assert merged.keys() == expected.keys()
    assert [name for name, tensor in merged.items() if not same_bits(tensor, expected[name])] == []
    assert not ours.was_misread()
    assert ours.stats == theirs.stats


@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
@pytest.mark.parametrize("name", sampled(VARIANTS_IN_SLICE, VARIANTS_IN_SLICE[::3]))
def test_a_variant_of_lora_comes_to_the_same(name: str, is_mapped: bool, shelf: Shelf) -> None:
    assert_same(shelf.base(VARIANTS[name].base), shelf.adapter(name), is_mapped=is_mapped)


# --- one pass ------------------------------------------------------------------------------------------------------


class Passing(Consumer):
    """Keeps what passes by, as lists of rows."""

    takes_tensors = True

    def __init__(self, *, needs_whole: bool) -> None:
        self.needs_whole = needs_whole
        self.rows = dict[str, list[torch.Tensor]]()

    def pass_by(self, name: str, rows: torch.Tensor, *, start: int) -> None:
        assert start == sum(map(len, self.rows.setdefault(name, [])))
        self.rows[name].append(rows.clone())


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_large_tensor_passes_by_in_rows(dtype: str, shelf: Shelf, tmp_path: Path, monkeypatch) -> None:
    """With the figures that it has as a whole, also where it is not finite."""

    def spoil(tensors: Tensors) -> None:
        for row, value in ((9, torch.inf), (5, torch.nan), (30, -torch.inf)):
            tensors["lm_head.weight"][row, 3] = value

    adapter, directory = shelf.adapter("every-projection"), edited_base(shelf.base("llama"), tmp_path / "base", spoil)
    expected = real(directory, adapter, dtype)
    merge_together([request(expected, adapter)])
    monkeypatch.setattr(loaded_base, "ROWS_ELEMENTS", 300)
    by_rows, whole = Passing(needs_whole=False), Passing(needs_whole=True)
    for consumers in ((by_rows,), (by_rows, whole)):
        by_rows.rows.clear()
        with methods.quiet():
            base = base_for(directory, adapter, dtype, is_mapped=False)
        merge_together([request(base, adapter, consumers=consumers)])
        assert base.stats == expected.stats
        for passing in consumers:
            assert passing.rows.keys() == base.tensors.keys()
            joined = {name: torch.cat(rows) for name, rows in passing.rows.items()}
            assert [name for name, tensor in joined.items() if not same_bits(tensor, expected.tensors[name])] == []
        parts = {name: len(rows) for name, rows in by_rows.rows.items() if len(rows) > 1}
        assert parts.keys() == ({"lm_head.weight", "model.embed_tokens.weight"} if whole not in consumers else set())


@pytest.mark.parametrize("threads", ["1", "4"])
def test_every_byte_is_read_once_for_all_adapters(shelf: Shelf, variables, threads: str) -> None:
    variables["OMP_NUM_THREADS"] = threads
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
def test_layers_that_peft_merges_are_read_once_too(threads, variables, tmp_path) -> None:
    variables["OMP_NUM_THREADS"] = threads
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
    loaded = real(directory, adapters[0])
    assert [comparable(one) for one in together] == [comparable(merge(request(loaded, one))) for one in adapters]


def test_a_merge_that_draws_numbers_runs_in_order_of_its_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the projections in another order than the model."""
    adapter, directory = tmp_path / "adapter", tmp_path / "base"
    methods.save_base("llama", directory)
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    case = methods.make_case("loha", "llama", "LoHaConfig", r=2, target_modules=projections)
    methods.save_adapter(case, methods.load_base("llama", directory), adapter, base_directory=directory)
    bases = fed(directory, adapter), real(directory, adapter)
    numbers: dict[float, float] = {}
    own = LycorisLayer.merge

    def merge_with_number(layer: Any, *given: Any, **named: Any) -> None:
        numbers[float(layer.get_base_layer().weight.double().sum())] = float(torch.rand(()))
        own(layer, *given, **named)

    monkeypatch.setattr(LycorisLayer, "merge", merge_with_number)
    drawn = []
    for one in bases:
        torch.manual_seed(0)
        numbers.clear()
        drawn.append((comparable(merge(request(one, adapter))), dict(numbers)))
    assert len(numbers) > 1
    assert drawn[0] == drawn[1]


def test_adapters_that_wait_have_the_memory_of_their_files(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    own = adapter_evidence.map_factors

    def map_factors(model: Any, *others: Any) -> frozenset[int]:
        loads.append((model, own(model, *others)))
        return cast("frozenset[int]", loads[-1][1])

    monkeypatch.setattr(adapter_evidence, "map_factors", map_factors)
    names = ("every-projection", "dora-all-linear", "embedding", "token-rows")
    adapters, directory = [shelf.adapter(name) for name in names], shelf.base("llama")
    base = fed(directory, adapters[0])
    together = [one for one in merge_together([request(base, adapter) for adapter in adapters]) if one is not None]
    for model, mapped in loads:
        factors = [one for name, one in model.named_parameters() if "lora_" in name]
        files = mapped_files()
        inside = [any(start <= one.data_ptr() < end for start, end in files) for one in factors if id(one) in mapped]
        assert len(inside) >= len(factors)
        assert all(inside)
    loaded = real(directory, adapters[0])
    assert [comparable(one) for one in together] == [comparable(merge(request(loaded, one))) for one in adapters]
    assert len(loads) == len(adapters)


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
    def breaks(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = math.nan
        tensors["lm_head.weight"][0, 0] = math.inf

    directory = edited_base(shelf.base("llama"), tmp_path / "base", breaks)
    adapter = shelf.adapter("every-projection")
    base, loaded = fed(directory, adapter), real(directory, adapter)
    assert (base.facts.nonfinite, len(loaded.facts.nonfinite)) == ((), 2)
    assert comparable(merge(request(base, adapter))) == comparable(merge(request(loaded, adapter)))
    assert base.facts == loaded.facts


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan),
        lambda tensors: [tensor.fill_(1e25) for tensor in tensors.values()],
        lambda tensors: [tensor.zero_() for tensor in tensors.values()],
        lambda tensors: tensors.pop(next(iter(tensors))),
        lambda _: {"odd": torch.ones(2)},
    ],
    ids=["nan", "large", "zero", "lacking", "unexpected"],
)
@pytest.mark.parametrize("name", ["every-projection", "dora-all-linear", "modules-to-save"])
def test_a_broken_adapter_comes_to_the_same(name, change, shelf, tmp_path) -> None:
    assert_same(shelf.base("llama"), edited_adapter(shelf.adapter(name), tmp_path / "broken", change))


def test_a_refused_adapter_has_a_base_that_was_measured(shelf: Shelf, tmp_path: Path) -> None:
    adapter = shutil.copytree(shelf.adapter("plain"), tmp_path / "elsewhere")
    configure(target_modules=["absent"])(adapter)
    directory = shelf.base("llama")
    base = fed(directory, adapter)
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
    base = fed(directory, adapters[0])
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


def test_a_worker_reports_the_facts_once_they_are_known(shelf: Shelf, tmp_path: Path) -> None:
    base = edited_base(
        shelf.base("llama"), tmp_path / "base", lambda one: one["model.norm.weight"][3:4].fill_(math.nan)
    )
    group = group_of(base, shelf.adapter("every-projection"), shelf.adapter("plain"), no_forward=None)
    in_pass, whole = (
        [
            event
            for event in events_of(replace(group, one_pass=is_in_pass))
            if not isinstance(event, DeviceChosen | MergeStarted)
        ]
        for is_in_pass in (True, False)
    )
    names = [type(event).__name__ for event in in_pass]
    assert names == ["BaseLoading", "BaseLoaded", "BaseMeasured", "Merged", "Merged"]
    loaded, measured, *merged = in_pass[1:]
    _, loaded_whole, *merged_whole = whole
    assert (loaded.measured, loaded_whole.measured) == (False, True)
    assert measured.facts == loaded_whole.facts != loaded.facts
    assert [comparable(one.evidence) for one in merged] == [comparable(one.evidence) for one in merged_whole]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_dtypes_and_classes_of_a_base_are_read_in_one_pass(threads, shelf, variables, monkeypatch, tmp_path) -> None:
    """Two adapters in two dtypes, and a head of another class in one: each stored tensor is read once for all five."""
    variables["OMP_NUM_THREADS"] = threads
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
    options: dict[str, Any] = {"no_forward": None, "one_pass": True}
    groups = (
        group_of(directory, *adapters, classifier, dtype="bfloat16", **options),
        group_of(directory, *adapters, dtype="float32", first=3, **options),
    )
    events = events_of(*groups)
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
    expected = events_of(*(replace(group, one_pass=False) for group in groups))
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
    monkeypatch.setattr(passes, "fit", lambda *_: False)
    base, adapter = shelf.base("llama"), shelf.adapter("every-projection")
    groups = [
        group_of(base, adapter, dtype=dtype, first=index, no_forward=None, one_pass=True)
        for index, dtype in enumerate(("bfloat16", "float16"))
    ]
    events = events_of(*groups)
    assert [(event.task, event.others) for event in events if isinstance(event, MergeStarted)] == [(0, ()), (1, ())]
    assert merged_of(events) == merged_of(events_of(*(replace(group, one_pass=False) for group in groups)))


def test_a_base_without_a_skeleton_is_loaded_from_the_files(shelf: Shelf, tmp_path: Path) -> None:
    base = edited_base(shelf.base("llama"), tmp_path / "base", lambda one: {NORM: one[NORM].half()})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({name: config[name] for name in config.keys() - {"dtype"}}))
    events = events_of(group_of(base, shelf.adapter("plain"), one_pass=True))
    (loaded,) = (event for event in events if isinstance(event, BaseLoaded))
    assert (loaded.measured, loaded.facts.no_skeleton.partition("have ")[2]) == (True, "F16, F32")
    assert isinstance(events[-1], Merged)
