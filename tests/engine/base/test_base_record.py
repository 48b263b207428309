"""With the figures of an earlier run, a pass reads only what adapters touch, and comes to the same evidence."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.engine.adapter_evidence import merge_together
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.records.measured import BaseFigures, EarlierRun, Evidence, TensorStats
from merge_gate.worker.protocol import BaseMeasured, Event, Merged, Unjudged
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.jobs import events_of, group_of
from tests.support.engine.local_bases import edited_base, load_base
from tests.support.engine.merges import NOT_RUN, request_for
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
    (evidence,) = merge_together([request_for(base, adapter, no_forward=NOT_RUN)])
    assert evidence is not None
    return evidence


def recorded(directory: Path, adapter: Path) -> tuple[BaseFigures, Evidence]:
    base, _ = skeleton(directory)
    assert base.new_figures(LLAMA) is None, "it is not measured yet"
    evidence = merged(base, adapter)
    record = base.new_figures(LLAMA)
    assert record is not None
    return replace(record, run=RUN), evidence


def test_only_touched_tensors_are_read_for_the_same_evidence(shelf: Shelf) -> None:
    directory, adapter = shelf.base("llama"), shelf.adapter("plain")
    record, whole = recorded(directory, adapter)
    base, feed = skeleton(directory)
    base.use_earlier_figures(record)
    assert base.unmeasured() == []
    touched = merged(base, adapter)
    stored = {one.name: one for one in stored_tensors(directory)}
    spans = {one.name: one.span for one in stored_bytes(str(directory), stored).values()}
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
    directory = edited_base(
        shelf.base("llama"), tmp_path / "base", lambda tensors: tensors[UNTOUCHED][3:4].fill_(math.nan)
    )
    record, whole = recorded(directory, shelf.adapter("plain"))
    base, _ = skeleton(directory)
    base.use_earlier_figures(record)
    assert base.unmeasured() == [UNTOUCHED], "it is read again: no adapter fails by a record"
    assert merged(base, shelf.adapter("plain")).base.nonfinite == whole.base.nonfinite


def in_one_pass(shelf: Shelf, adapter: str, **fields: Any) -> list[Event]:
    return events_of(group_of(shelf.base("llama"), shelf.adapter(adapter), one_pass=True, **fields))


@pytest.mark.parametrize("keeps_figures", [True, False])
def test_the_worker_sends_a_record_if_it_is_kept(shelf: Shelf, *, keeps_figures: bool) -> None:
    events = in_one_pass(shelf, "plain", keeps_figures=keeps_figures)
    (measured,) = [event for event in events if isinstance(event, BaseMeasured)]
    assert (measured.figures is not None) == keeps_figures


def test_the_worker_reads_less_with_a_record_of_the_class(shelf: Shelf) -> None:
    record, _ = recorded(shelf.base("llama"), shelf.adapter("plain"))
    for records, is_used in (((record,), True), ((replace(record, model_class="LlamaModel"),), False)):
        *_, end = in_one_pass(shelf, "plain", earlier_figures=records)
        assert isinstance(end, Merged)
        assert (end.evidence.parameters_from_record > 0) == is_used


@pytest.mark.parametrize("figures", [{"maximum": 9.0}, {"minimum": -9.0}])
def test_a_record_of_other_values_is_no_verdict(figures: dict[str, float], shelf: Shelf) -> None:
    record, _ = recorded(shelf.base("llama"), shelf.adapter("every-projection"))
    assert TOUCHED in {one.name for one in record.figures}
    forged = tuple(replace(one, **figures) if one.name == TOUCHED else one for one in record.figures)
    *_, end = in_one_pass(shelf, "every-projection", earlier_figures=(replace(record, figures=forged),))
    assert isinstance(end, Unjudged)
    assert TOUCHED in end.refusal.message
