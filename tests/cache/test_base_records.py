"""What a run measured of a base is found again for the same bytes, code and dtype, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.cache import base_records
from merge_gate.cache.base_records import KIND, BaseRecords
from merge_gate.cache.seal import Seal
from merge_gate.cache.store import Store
from merge_gate.records.files import BaseContent
from merge_gate.records.measured import BaseRecord, TensorStats
from merge_gate.records.terms import BaseKey

BASE = BaseKey(model="acme/base", revision="c" * 40, dtype="bfloat16", quantization="none")
CONTENT = BaseContent(weights="a" * 64, settings="b" * 64)
WEIGHT = TensorStats(name="q.weight", dtype="bfloat16", shape=(2, 4), numel=8, minimum=-0.1, maximum=1 / 3)
BROKEN = TensorStats(name="norm.weight", dtype="float32", shape=(2,), numel=2, nan=1, neginf=1, first_index=(0,))
EMPTY = TensorStats(name="empty", dtype="float32", shape=(0, 4), numel=0)
RECORD = BaseRecord(model_class="LlamaForCausalLM", figures=(WEIGHT, BROKEN, EMPTY))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), Seal("a secret of some length"), pytest.fail)


@pytest.fixture
def records(store: Store) -> BaseRecords:
    return BaseRecords(store, "acme run 7")


def test_the_figures_of_an_earlier_run_are_found(records: BaseRecords) -> None:
    assert records.lookup(BASE, CONTENT) == ()
    records.store(BASE, CONTENT, RECORD)
    (found,) = records.lookup(BASE, CONTENT)
    assert (found.model_class, found.figures) == (RECORD.model_class, RECORD.figures)
    assert found.run is not None
    assert found.run.place == "acme run 7"
    assert found.run.at.endswith("Z")


def test_a_base_that_moves_is_the_same_base(records: BaseRecords) -> None:
    records.store(BASE, CONTENT, RECORD)
    assert records.lookup(replace(BASE, model="./elsewhere", revision=None), CONTENT)


@pytest.mark.parametrize(
    ("base", "content"),
    [
        (replace(BASE, dtype="float16"), CONTENT),
        (replace(BASE, quantization="bnb-4bit"), CONTENT),
        (BASE, replace(CONTENT, weights="c" * 64)),
        (BASE, replace(CONTENT, settings="c" * 64)),
    ],
)
def test_another_base_is_not(records: BaseRecords, base: BaseKey, content: BaseContent) -> None:
    records.store(BASE, CONTENT, RECORD)
    assert records.lookup(base, content) == ()


@pytest.mark.parametrize("changed", ["own_code", "libraries"])
def test_other_code_measures_again(records: BaseRecords, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records.store(BASE, CONTENT, RECORD)
    monkeypatch.setattr(base_records, changed, lambda: "another")
    assert records.lookup(BASE, CONTENT) == ()


def test_each_class_has_its_own_record(records: BaseRecords) -> None:
    head = replace(RECORD, model_class="LlamaForSequenceClassification/3", figures=(WEIGHT,))
    for one in (RECORD, head, replace(RECORD, figures=(EMPTY,))):
        records.store(BASE, CONTENT, one)
    found = {one.model_class: one.figures for one in records.lookup(BASE, CONTENT)}
    assert found == {RECORD.model_class: (EMPTY,), head.model_class: (WEIGHT,)}


def test_the_number_of_classes_is_bounded(records: BaseRecords) -> None:
    for number in range(base_records.MOST_CLASSES + 3):
        records.store(BASE, CONTENT, replace(RECORD, model_class=f"Class/{number}"))
    found = records.lookup(BASE, CONTENT)
    assert len(found) == base_records.MOST_CLASSES
    assert found[0].model_class == f"Class/{base_records.MOST_CLASSES + 2}"


def test_a_fresh_run_writes_and_does_not_read(store: Store, records: BaseRecords) -> None:
    fresh = BaseRecords(store, "acme run 8", fresh=True)
    fresh.store(BASE, CONTENT, RECORD)
    assert fresh.lookup(BASE, CONTENT) == ()
    assert records.lookup(BASE, CONTENT)


@pytest.mark.attempt("C04", "a forged base record, with a secret", "not used")
def test_a_record_under_another_secret_is_none(tmp_path: Path) -> None:
    BaseRecords(Store(str(tmp_path), Seal("another secret, as long"), pytest.fail), "x").store(BASE, CONTENT, RECORD)
    own = BaseRecords(Store(str(tmp_path), Seal("a secret of some length"), pytest.fail), "x")
    assert own.lookup(BASE, CONTENT) == ()


@pytest.mark.parametrize(
    "figures",
    [
        (WEIGHT, WEIGHT),
        (replace(WEIGHT, numel=9),),
        (replace(WEIGHT, shape=(-2, -4)),),
        (replace(WEIGHT, nan=-1),),
        (replace(WEIGHT, nan=9),),
        (replace(WEIGHT, nan=8),),
        (replace(WEIGHT, minimum=None),),
        (replace(WEIGHT, minimum=None, maximum=None),),
        (replace(WEIGHT, minimum=0.5),),
        (replace(EMPTY, minimum=0.0, maximum=0.0),),
    ],
)
def test_figures_that_contradict_themselves_are_no_record(
    records: BaseRecords, figures: tuple[TensorStats, ...]
) -> None:
    records.store(BASE, CONTENT, replace(RECORD, figures=figures))
    assert records.lookup(BASE, CONTENT) == ()


@pytest.mark.parametrize("records_json", [None, {}, [1], [{"model_class": "x"}], [{"model_class": 1, "figures": []}]])
def test_a_document_of_another_form_is_no_record(store: Store, records: BaseRecords, records_json: object) -> None:
    rests_on = base_records._material(BASE, CONTENT, ())
    store.put(KIND, base_records.key_of(rests_on), {"material": rests_on, "records": records_json})
    assert records.lookup(BASE, CONTENT) == ()


def test_a_run_that_trusts_more_has_records_of_its_own(store: Store, records: BaseRecords) -> None:
    """Code of a base may forge them."""
    BaseRecords(store, "x", trusts=("trust-remote-code",)).store(BASE, CONTENT, RECORD)
    assert records.lookup(BASE, CONTENT) == ()


def test_figures_of_many_dimensions_are_no_record(records: BaseRecords) -> None:
    records.store(BASE, CONTENT, replace(RECORD, figures=(replace(WEIGHT, shape=(1,) * 64 + (2, 4)),)))
    assert records.lookup(BASE, CONTENT) == ()
