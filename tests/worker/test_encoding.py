"""Every record arrives as it was sent, in the type of each value."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.features.publish.calls import PublicationPlanned, PublicationWritten
from merge_gate.files.base_files import read_base
from merge_gate.files.preflight import preflight
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import BaseFacts, Evidence
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.run import flow
from merge_gate.run.flow import run_gate
from merge_gate.worker.channel import FROM_WORKER, TO_WORKER
from merge_gate.worker.child import judge_job
from merge_gate.worker.encoding import EncodingError, GarbledError, cases, decoded, encoded
from merge_gate.worker.parent_feed import BytesRequested, SpansExpected
from merge_gate.worker.protocol import Answer, Group, Job, Listener, Merged, Task, Unjudged
from merge_gate.worker.sandbox import SWITCH
from tests.support.faults import configure, poison
from tests.support.models import Shelf

CALLS = SpansExpected | BytesRequested | PublicationPlanned | PublicationWritten
SETS = {"keys", "padding"}


def types_of(value: Any) -> Any:
    """The types of a value and of all that is in it."""
    if is_dataclass(value):
        return type(value), [(field.name, types_of(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, tuple):
        return tuple, [types_of(item) for item in value]
    if isinstance(value, dict):
        return dict, [(key, types_of(item)) for key, item in value.items()]
    return type(value), repr(value) if isinstance(value, float) else value


def assert_travels(message: Any, expected: Any) -> None:
    arrived = decoded(encoded(message), expected)
    assert types_of(arrived) == types_of(message)
    hash(arrived)


@pytest.mark.parametrize("adapter", ["plain", "dora"])
def test_every_event_and_the_job_of_a_run_arrive_as_they_were_sent(adapter, shelf: Shelf, variables) -> None:
    variables[SWITCH] = "off"
    base, files = str(shelf.base("llama")), preflight(str(shelf.adapter(adapter)), allow_pickle=False)
    key = BaseKey(model="base", revision=None, dtype="auto", quantization="none")
    tasks = tuple(Task(index=index, files=(files,)) for index in (0, 1))
    group = Group(base=key, directory=base, files=read_base(base, name="base"), tasks=tasks)
    job = Job(groups=(group, replace(group, one_pass=True, tasks=(replace(tasks[0], index=2),))), device="cpu")
    assert_travels(job, TO_WORKER)
    events: list[Any] = []
    events += judge_job(job, events.append, Sandbox())
    assert sum(isinstance(event, Merged) for event in events) == 3
    for event in events:
        assert_travels(event, FROM_WORKER)


ADAPTERS = {
    "rounded": ("plain", None), "bias": ("bias-all", None), "rows": ("token-rows", None), "pattern": ("regex", None),
    "poisoned": ("plain", poison("lora_B")), "lost": ("plain", configure(target_modules=["nowhere"])),
}  # fmt: skip


def test_every_record_of_whole_runs_arrives_as_it_was_sent(
    shelf: Shelf, tmp_path: Path, monkeypatch, variables
) -> None:
    """The job that the run makes, and what an unconfined worker in this process sends of it: passes and failures."""
    variables[SWITCH] = "off"
    kinds = Counter[str]()

    def supervise(job: Job, listen: Listener, *_: object) -> None:
        assert_travels(job, TO_WORKER)

        def send(event: Any) -> None:
            kinds[type(event).__name__] += 1
            assert_travels(event, FROM_WORKER)
            listen(event)

        for event in judge_job(job, send, Sandbox()):
            send(event)

    monkeypatch.setattr(flow, "supervise", supervise)
    for name, (adapter, change) in ADAPTERS.items():
        shutil.copytree(shelf.adapter(adapter), tmp_path / "adapters" / name)
        if change is not None:
            change(tmp_path / "adapters" / name)
    base = {"model": str(shelf.base("llama")), "dtype": ["auto", "float16"]}
    combination = {
        "name": "both",
        "combine": {"method": "linear", "adapters": ["rounded", "pattern"], "weights": [0.5, 0.5]},
    }
    config = {"version": 1, "base": base, "forward": "required", "adapters": [{"path": "./adapters/*"}, combination]}
    (tmp_path / "gate.yml").write_text(json.dumps(config))
    report = run_gate(load_config(str(tmp_path / "gate.yml")), RunOptions(device="cpu"))
    verdicts = {one.name: one.verdict.value for one in report.adapters if one.base.dtype == "float16"}
    assert verdicts["rounded"] == verdicts["bias"] == "passed"
    assert verdicts["poisoned"] == "failed"
    assert {"DeviceChosen", "BaseLoading", "BaseLoaded", "MergeStarted", "ForwardRunning", "Merged"} <= kinds.keys()


def records_in(kind: Any, seen: set[type]) -> Iterator[type]:
    for part in getattr(kind, "__args__", ()):
        yield from records_in(part, seen)
    if isinstance(kind, type) and is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        yield kind
        for hint in get_type_hints(kind).values():
            yield from records_in(hint, seen)


@pytest.mark.parametrize("messages", [FROM_WORKER, TO_WORKER, CALLS, Answer], ids=["events", "jobs", "calls", "answer"])
def test_every_field_of_every_message_has_a_type_that_is_read(messages: Any) -> None:
    kinds = list(records_in(messages, set()))
    assert kinds
    for kind in kinds:
        for hint in get_type_hints(kind).values():
            assert cases(hint)


NAME = "caf\udce9/\x00"


@pytest.mark.parametrize(
    "value", [NAME, "", 3, 3.0, 2**63, -0.0, 1e300, float("inf"), float("-inf"), float("nan"), True]
)
def test_odd_values_arrive(value: object) -> None:
    facts = BaseFacts(model="b", revision=None, dtype="d", quantization="q", dtypes=((NAME, value),))
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert_travels(Merged(task=0, evidence=Evidence(base=facts)), FROM_WORKER)
    else:
        with pytest.raises(GarbledError):
            decoded(encoded(Merged(task=0, evidence=Evidence(base=facts))), FROM_WORKER)
    if isinstance(value, str):
        assert_travels(Unjudged(task=0, refusal=NotJudged(message=value)), FROM_WORKER)


def test_a_value_that_is_not_plain_cannot_be_sent() -> None:
    for value in (object(), 10**5000, b"bytes"):
        with pytest.raises(EncodingError, match="Answer"):
            encoded(Answer(files=value))


def test_facts_are_those_that_features_declare() -> None:
    facts = BaseFacts(model="b", revision=None, dtype="d", quantization="q")
    tensor = StoredTensor(name="t", dtype="F32", shape=())
    for fact in (tensor, (1, 2), "text"):
        message = Merged(task=0, evidence=Evidence(base=facts, facts=(("verify", fact),)))
        with pytest.raises(GarbledError):
            decoded(encoded(message), FROM_WORKER)


def test_a_directory_whose_name_is_not_utf_8_arrives(shelf: Shelf, tmp_path: Path) -> None:
    place = tmp_path / "caf\udce9"
    shutil.copytree(shelf.adapter("plain"), place)
    assert_travels(Task(index=0, files=(preflight(str(place), allow_pickle=False),)), Task)


def test_long_numbers_in_names_are_no_numbers() -> None:
    message = Unjudged(task=0, refusal=NotJudged(message="9" * 100))
    assert decoded(encoded(message), FROM_WORKER) == message
    with pytest.raises(GarbledError, match="64 bits"):
        decoded(json.dumps({"InProgress": [10**20, None]}).encode(), FROM_WORKER)
