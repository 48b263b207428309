"""With the figures of an earlier run, a pass reads only what adapters touch, and comes to the same evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from merge_gate.engine.adapter_evidence import MergeRequest, merge_together
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import BaseFigures, EarlierRun, Evidence, TensorStats
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker import sandbox
from merge_gate.worker.child import judge_job
from merge_gate.worker.protocol import BaseMeasured, Group, Job, Merged, Task, Unjudged
from tests.support import methods
from tests.support.engine.base_headers import base_files, stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.local_bases import load_base
from tests.support.engine.merges import RUNS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.models import Shelf

RUN = EarlierRun(at="2026-11-27T12:00:00Z", place="acme run 7")
LLAMA = ModelClass(class_name="LlamaForCausalLM")
TOUCHED = "model.layers.0.self_attn.q_proj.weight"
UNTOUCHED = "model.norm.weight"


def skeleton(directory: Path) -> tuple[Base, CountingFeed]:
    feed = CountingFeed(str(directory))
    with methods.quiet():
        return skeleton_of(source(directory, "auto"), LLAMA, stored_tensors(directory), feed), feed


def merged(base: Base, adapter: Path) -> Evidence:
    members = (preflight(str(adapter), allow_pickle=False),)
    (evidence,) = merge_together([MergeRequest(base=base, members=members, no_forward="not of interest")])
    assert evidence is not None
    return evidence


def recorded(directory: Path, adapter: Path) -> tuple[BaseFigures, Evidence]:
    base, _ = skeleton(directory)
    assert base.new_figures(LLAMA) is None, "it is not measured yet"
    evidence = merged(base, adapter)
    record = base.new_figures(LLAMA)
    assert record is not None
    return replace(record, run=RUN), evidence


def changed(record: BaseFigures, name: str, **figures: Any) -> BaseFigures:
    assert name in {one.name for one in record.figures}
    return replace(
        record, figures=tuple(replace(one, **figures) if one.name == name else one for one in record.figures)
    )


def test_only_touched_tensors_are_read_for_the_same_evidence(shelf: Shelf) -> None:
    directory, adapter = shelf.base("llama"), shelf.adapter("plain")
    record, whole = recorded(directory, adapter)
    base, feed = skeleton(directory)
    base.use_earlier_figures(record)
    assert base.unmeasured() == []
    touched = merged(base, adapter)
    spans = {one.name: one.span for one in stored_bytes(str(directory), {
        one.name: one for one in stored_tensors(directory)
    }).values()}  # fmt: skip
    changes = {merge.stats.name for merge in touched.merges}
    read = {name for name, span in spans.items() if span in feed.reads}
    assert changes <= read
    assert spans.keys() - read, "what no adapter touches is not read"
    assert base.unchecked == base.tensors.keys() - changes
    assert touched.parameters_from_record == sum(base.stats[name].numel for name in base.unchecked) > 0
    assert touched.parameters_checked == touched.parameters_total
    assert touched.base == replace(whole.base, record=RUN)
    comparable = replace(touched, base=whole.base, parameters_from_record=0, seconds=0.0, cross_checked=())
    assert comparable == replace(whole, seconds=0.0, cross_checked=())
    assert base.new_figures(LLAMA) is None, "a record is never made of another one"


def test_a_loaded_base_gives_the_same_record(shelf: Shelf) -> None:
    record, _ = recorded(shelf.base("llama"), shelf.adapter("plain"))
    loaded = load_base(str(shelf.base("llama")), model_class=LLAMA, label="base").new_figures(LLAMA)
    assert loaded is not None
    assert set(loaded.figures) == set(record.figures)


def test_figures_of_another_shape_dtype_or_name_are_not_taken(shelf: Shelf) -> None:
    record, _ = recorded(shelf.base("llama"), shelf.adapter("plain"))
    first, second, *_ = record.figures
    other = TensorStats(name="model.gone.weight", dtype=first.dtype, shape=(1,), numel=1, minimum=0.0, maximum=0.0)
    record = replace(record, figures=(replace(first, shape=(1, *first.shape)), replace(second, dtype="float64"), other))
    base, _ = skeleton(shelf.base("llama"))
    base.use_earlier_figures(record)
    assert not base.unchecked
    assert len(base.unmeasured()) == len(base.tensors)


def test_a_tensor_that_was_not_finite_is_read_again(shelf: Shelf, tmp_path: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama"), dtype="auto")
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(tmp_path)
    record, whole = recorded(tmp_path, shelf.adapter("plain"))
    base, _ = skeleton(tmp_path)
    base.use_earlier_figures(record)
    assert base.unmeasured() == [UNTOUCHED], "it is read again: no adapter fails by a record"
    assert merged(base, shelf.adapter("plain")).base.nonfinite == whole.base.nonfinite


# --- a run ---------------------------------------------------------------------------------------------------------


def events_of(directory: Path, adapter: Path, **settings: Any) -> list[Any]:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization="none")
    tasks = (Task(index=0, files=(preflight(str(adapter), allow_pickle=False),), consumers=RUNS),)
    group = Group(
        base=key, directory=str(directory), files=base_files(directory), tasks=tasks, one_pass=True, **settings
    )
    return list(judge_job(Job(groups=(group,), device="cpu"), lambda _: None, Sandbox()))


@pytest.mark.parametrize("keeps_figures", [True, False])
def test_the_worker_sends_a_record_if_it_is_kept(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, *, keeps_figures: bool
) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "off")
    events = events_of(shelf.base("llama"), shelf.adapter("plain"), keeps_figures=keeps_figures)
    (measured,) = [event for event in events if isinstance(event, BaseMeasured)]
    assert (measured.figures is not None) == keeps_figures


def test_the_worker_reads_less_with_a_record_of_the_class(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "off")
    record, _ = recorded(shelf.base("llama"), shelf.adapter("plain"))
    model_class = model_class_for(
        str(shelf.base("llama")),
        preflight(str(shelf.adapter("plain")), allow_pickle=False),
        stored_tensors(shelf.base("llama")),
    )
    assert model_class.label == record.model_class
    for records, is_used in (((record,), True), ((replace(record, model_class="LlamaModel"),), False)):
        *_, end = events_of(shelf.base("llama"), shelf.adapter("plain"), earlier_figures=records)
        assert isinstance(end, Merged)
        assert (end.evidence.parameters_from_record > 0) == is_used


@pytest.mark.parametrize("figures", [{"maximum": 9.0}, {"minimum": -9.0}])
def test_a_record_of_other_values_is_no_verdict(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, figures: dict[str, float]
) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "off")
    record, _ = recorded(shelf.base("llama"), shelf.adapter("every-projection"))
    forged = changed(record, TOUCHED, **figures)
    *_, end = events_of(shelf.base("llama"), shelf.adapter("every-projection"), earlier_figures=(forged,))
    assert isinstance(end, Unjudged)
    assert TOUCHED in end.refusal.message
