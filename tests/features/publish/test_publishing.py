"""Whole runs that publish, with a played worker: what is in the directory, and when there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from merge_gate._internal.errors import NotPublishedError, SourceError
from merge_gate.cli.dispatch import main
from merge_gate.features.publish import feature, one_publication, publish_directory, weight_files
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.feature import Publications
from merge_gate.features.publish.one_publication import Publication, publishing
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.weight_files import base_layout
from merge_gate.files.identity import identity_of
from merge_gate.records.config import PublishSpec
from merge_gate.records.files import MANIFEST_NAME, StoredTensor
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.run.flow import Run
from tests.support.judged_entry import entry, judged_report
from tests.support.judging.cases import broken, evidence
from tests.support.judging.cases import merged as merged_tensor
from tests.support.played_merges import LAYERS, MERGED, lay, lay_adapter, merged, play, played, stored, write, write_all

PRESERVED = PublishSpec(directory="", label="")
NAMES = [MERGED.format(layer) for layer in range(LAYERS)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a base and one adapter."""
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, names=["one"])
    return tmp_path


def state(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapters_of(place: Path) -> list[dict[str, Any]]:
    adapters: list[dict[str, Any]] = json.loads((place / "merge-gate-report" / "report.json").read_text())["adapters"]
    return adapters


def expected(base: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: merged(content) if name in NAMES else content for name, content in base.items()}


# --- what is published -----------------------------------------------------------------------------------------------


@pytest.mark.attempt("P00", "plain publication (control)", "published, and the base unchanged")
def test_a_published_model_is_the_base_with_the_merged_tensors(place: Path) -> None:
    before = state(place / "base")
    assert play(place, "--publish", "merged") == 0
    assert state(place / "base") == before
    model = place / "merged" / "one"
    assert stored(model) == expected(stored(place / "base"))
    assert (model / "model.safetensors.index.json").read_bytes() == (
        place / "base" / "model.safetensors.index.json"
    ).read_bytes()
    assert [path.name for path in (place / "merged").iterdir()] == ["one"]
    (adapter,) = adapters_of(place)
    assert (adapter["published"]["directory"], adapter["published"]["dtype"]) == ("merged/one", "preserve")
    assert {file["path"]: file["sha256"] for file in adapter["published"]["files"]} == state(model)


def test_a_published_model_lists_every_input_and_every_setting(place: Path) -> None:
    (place / "one" / "tokenizer.json").write_text("{}")
    (place / "base" / "quantize_config.json").write_text("{}")
    checks = {"headroom": {"severity": "error", "limit": 0.125}, "keys-unexpected": "off"}
    config = {"version": 1, "base": "./base", "adapters": ["./one"], "checks": checks, "forward": "off"}
    (place / "gate.yml").write_text(json.dumps(config))
    assert play(place, "--publish", "merged", adapters=["gate.yml"]) == 0
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    for folder, files in (("base", document["base"]["files"]), ("one", document["adapters"][0]["files"])):
        assert {file["path"]: file["sha256"] for file in files} == state(place / folder)
    assert set(document["checks"]) == {"headroom=error:0.125", "keys-unexpected=off"}
    assert document["forward"] == "off"
    assert main(["verify", "merged/one"]) == 0
    (entry,) = json.loads((place / "merge-gate-verify" / "report.json").read_text())["adapters"]
    assert "keys-unexpected=off" in entry["findings"][0]["message"]


def test_the_configuration_can_ask_for_it_and_for_smaller_files(place: Path) -> None:
    (place / "gate").mkdir()
    config = {
        "version": 1,
        "base": "../base",
        "adapters": [{"path": "../one", "name": "first"}],
        "publish": {"directory": "merged", "max-shard-size": "1KB"},
    }
    (place / "gate" / "gate.yml").write_text(json.dumps(config))
    assert play(place, adapters=["gate/gate.yml"]) == 0
    model = place / "gate" / "merged" / "first"
    assert stored(model) == expected(stored(place / "base"))
    assert [path.name for path in model.glob("model*")] == ["model.safetensors"]
    with pytest.raises(SystemExit, match="2"):
        play(place, "--publish", "elsewhere", "--max-shard-size", "0.2KB", adapters=["gate/gate.yml"])
    assert play(place, "--publish", "elsewhere", "--max-shard-size", "1KB", adapters=["gate/gate.yml"]) == 0
    assert stored(place / "elsewhere" / "first") == stored(model)


def test_an_entry_to_publish_is_merged_though_it_is_cached(place: Path) -> None:
    for _ in range(2):
        assert play(place, "--cache", "cache") == 0
    assert adapters_of(place)[0]["cached"] is True
    assert play(place, "--cache", "cache", "--publish", "merged") == 0
    assert (place / "merged" / "one").is_dir()
    assert adapters_of(place)[0]["cached"] is False


@pytest.mark.parametrize(("quantization", "is_cached"), [("none", True), ("bnb-8bit", False)])
def test_the_verdict_on_a_dequantized_base_is_not_reused(quantization: str, is_cached: bool, place: Path) -> None:
    base = {"model": "./base", "dtype": "bfloat16", "quantization": quantization}
    config = {"version": 1, "base": base, "adapters": ["./one"]}
    (place / "plain.yml").write_text(json.dumps(config))
    (place / "gate.yml").write_text(json.dumps(config | {"publish": {"directory": "merged", "dtype": "bfloat16"}}))
    assert play(place, "--cache", "cache", adapters=["gate.yml"]) == 0
    assert (place / "merged" / "one-bfloat16").is_dir()
    assert play(place, "--cache", "cache", adapters=["plain.yml"]) == 0
    assert adapters_of(place)[0]["cached"] is is_cached


# --- no directory ----------------------------------------------------------------------------------------------------


def nothing_published(place: Path) -> bool:
    return not (place / "merged").exists()


@pytest.mark.attempt("P18", "two adapters in several dtypes", "one model each")
def test_two_adapters_in_two_dtypes_have_one_model_each(place: Path) -> None:
    lay_adapter(place, "two")
    base = {"model": "base", "dtype": ["float32", "bfloat16", "auto"]}
    config = {"version": 1, "base": base, "adapters": ["one", "two"], "publish": "merged"}
    (place / "gate.yml").write_text(json.dumps(config))
    assert play(place, adapters=["gate.yml"]) == 0
    assert {path.name for path in (place / "merged").iterdir()} == {"one", "two"}
    published = [adapter["base"]["dtype"] for adapter in adapters_of(place) if adapter["published"]]
    assert len(published) == 2


def test_a_run_that_does_not_publish_writes_no_model(place: Path) -> None:
    before = state(place / "base")
    assert play(place, changes={"merges": (merged_tensor(broken()),)}) == 1
    assert state(place / "base") == before
    assert not (place / "merged").exists()


@pytest.mark.slow
def test_a_base_that_is_not_there_costs_the_verdict_and_no_more(place: Path) -> None:
    assert play(place, "--publish", "merged", adapters=["one", "--base", "acme/absent"]) == 3
    assert nothing_published(place)


@pytest.mark.attempt("P18b", "an adapter fails", "nothing is published")
def test_an_adapter_that_fails_is_not_published(place: Path) -> None:
    broken_merge = {"merges": (merged_tensor(broken()),)}
    assert play(place, "--publish", "merged", changes=broken_merge) == 1
    assert nothing_published(place)
    assert adapters_of(place)[0]["published"] is None


@pytest.mark.parametrize(
    ("base", "wanted", "words"),
    [
        pytest.param("float16", "preserve", "base.dtype", marks=pytest.mark.attempt("D5a", "float16", "exit 3")),
        pytest.param(["float16", "float32"], "preserve", "bfloat16", id="neither"),
        pytest.param("bfloat16", "float32", "publish.dtype", id="another than the named one"),
    ],
)
@pytest.mark.attempt("D5", "--publish of a dtype that cannot be published", "exit 3 before the first merge")
def test_a_dtype_that_cannot_be_published_is_refused_at_once(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, base: Any, wanted: str, words: str
) -> None:
    def merges(*_: object, **__: object) -> None:
        pytest.fail("it was merged")

    monkeypatch.setattr("tests.support.played_merges._play_group", merges)
    config = {"version": 1, "base": {"model": "base", "dtype": base}, "adapters": ["one"]}
    publish = {"directory": "merged", "dtype": wanted}
    (place / "gate.yml").write_text(json.dumps(config | {"publish": publish}))
    assert play(place, adapters=["gate.yml"]) == 3
    assert words in capfd.readouterr().err
    assert nothing_published(place)
    assert main(["run", "gate.yml", "--plan"]) == 2
    assert words in capfd.readouterr().err


@pytest.mark.attempt("D5b", "--dtype bfloat16,float16 --publish", "says before the merge which one is published")
def test_the_dtype_that_is_only_checked_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("one", "--base", "base", "--dtype", "float16,bfloat16", "--publish", "merged")
    note = "the merge in bfloat16 is published, and the one in float16 is only checked"
    with played(place / "base"):
        assert main(["run", *words]) == 0
    error = capfd.readouterr().err
    assert note in error
    assert error.index(note) < error.index("base base")
    assert main(["run", *words, "--plan"]) == 0
    assert note in " ".join(capfd.readouterr().out.split())


def plan_of(dtype: str = "BF16") -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(name=name, dtype=dtype, shape=(8, 8)) for name in NAMES)


def of_layers(tensors: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: tensors[name] for name in NAMES}


def refuses(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write_all(publisher, task, tensors)
    refusal = NotJudged(message="no way back", hint="none")
    write(publisher, task, plan_of(), of_layers(tensors), refusal=refusal)


def writes_another_tensor_than_it_reports(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, plan_of(), of_layers(tensors), checksums=((NAMES[0], 1),))


def writes_over_its_neighbor(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, plan_of(), dict(reversed(of_layers(tensors).items())) | {NAMES[0]: bytes(130)})


def writes_after_the_end_of_a_file(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, plan_of(), {"mtp.weight": bytes(130)})


def overwrites_a_header(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    with opened(publisher.planned(task, plan_of())) as descriptors:
        os.pwrite(descriptors[0], b"x", 9)
    publisher.written(PublicationWritten(task=task))


def cuts_a_file(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    with opened(publisher.planned(task, plan_of())) as descriptors:
        os.ftruncate(descriptors[1], 20)
    publisher.written(PublicationWritten(task=task))


@contextmanager
def opened(descriptors: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def plans_another_dtype(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, plan_of("F32"), {})


def plans_far_too_much(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, (StoredTensor(name="new", dtype="F32", shape=(1 << 40,)),), {})


def plans_a_shape_and_writes_nothing(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, (StoredTensor(name="embed.weight", dtype="BF16", shape=(9, 8)),), {})


def sends_no_end(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    with opened(publisher.planned(task, plan_of())):
        pass


def sends_nothing(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    pass


def sends_an_end_without_a_plan(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    publisher.written(PublicationWritten(task=task))


def plans_a_name_that_is_no_text(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, (StoredTensor(name="\ud800", dtype="F32", shape=(1,)),), {})


def sends_settings_that_are_no_object(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    write(publisher, task, plan_of(), of_layers(tensors), settings="[NaN]")


SENDERS = [
    sends_settings_that_are_no_object,
    sends_an_end_without_a_plan,
    plans_a_name_that_is_no_text,
    refuses,
    writes_another_tensor_than_it_reports,
    writes_over_its_neighbor,
    writes_after_the_end_of_a_file,
    overwrites_a_header,
    cuts_a_file,
    plans_another_dtype,
    plans_far_too_much,
    plans_a_shape_and_writes_nothing,
    sends_no_end,
    sends_nothing,
]


@pytest.mark.parametrize("send", SENDERS)
def test_what_the_worker_sends_must_fit_the_base(send: Any, place: Path) -> None:
    assert play(place, "--publish", "merged", send=send) == 3
    assert nothing_published(place)
    (adapter,) = adapters_of(place)
    assert (adapter["verdict"], adapter["cause"], adapter["published"]) == ("error", "not-published", None)
    assert adapter["findings"][0]["origin"] == "runtime"


def test_what_the_worker_sends_after_its_verdict_is_ignored(place: Path) -> None:
    later: list[Any] = []

    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        later.append(publisher)

    assert play(place, "--publish", "merged", send=send) == 0
    before = state(place / "merged")
    with pytest.raises(NotPublishedError):
        later[0].planned(0, plan_of())
    later[0].written(PublicationWritten(task=0))
    assert state(place / "merged") == before


def test_a_second_attempt_replaces_the_first(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write(publisher, task, plan_of(), dict.fromkeys(NAMES, bytes(128)))
        write_all(publisher, task, tensors)

    assert play(place, "--publish", "merged", send=send) == 0
    assert stored(place / "merged" / "one") == expected(stored(place / "base"))


def test_a_planned_tensor_without_a_checksum_costs_the_model(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write(publisher, task, plan_of(), {NAMES[0]: bytes(128)}, checksums=())

    assert play(place, "--publish", "merged", send=send) == 3
    assert adapters_of(place)[0]["cause"] == "not-published"
    assert nothing_published(place)


def test_a_cast_has_the_planned_dtype_and_a_directory_of_its_own(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        planned = tuple(StoredTensor(name=name, dtype="F32", shape=(8, 8)) for name in tensors)
        write(publisher, task, planned, {name: tensors[name] * 2 for name in tensors})

    config = {"version": 1, "base": {"model": "base", "dtype": "float32"}, "adapters": ["one"]}
    (place / "gate.yml").write_text(json.dumps(config | {"publish": {"directory": "merged", "dtype": "float32"}}))
    assert play(place, adapters=["gate.yml"], send=send) == 0
    published = stored(place / "merged" / "one-float32")
    assert published == {name: content * 2 for name, content in stored(place / "base").items()}


@pytest.mark.parametrize("error", [SourceError("the base is gone"), ZeroDivisionError("a bug")])
@pytest.mark.attempt("F13", "the base cannot be read again for the copy", "not published")
def test_a_base_that_cannot_be_read_again_is_not_published(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(weight_files.LocalFeed, "read", fail)
    assert play(place, "--publish", "merged") == 3
    assert nothing_published(place)
    assert adapters_of(place)[0]["cause"] == "not-published"


@pytest.mark.parametrize("why", ["pickles", "shards"])
def test_a_base_whose_files_cannot_be_published(place: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotPublishedError("no such files")

    monkeypatch.setattr(feature, "base_layout" if why == "pickles" else "Publication", refuse)
    lay_adapter(place, "two")
    assert play(place, "--publish", "merged", send=lambda *_: pytest.fail("it is not sent")) == 3
    assert nothing_published(place)
    assert {adapter["cause"] for adapter in adapters_of(place)} == {"not-published"}


@pytest.mark.attempt("F11b", "an empty directory takes DIR/NAME during the run", "not published, and it stays")
def test_a_name_that_is_taken_during_the_run_stays_as_it_is(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        (place / "merged" / "one").mkdir()

    assert play(place, "--publish", "merged", send=send) == 3
    assert state(place / "merged") == {}
    assert [path.name for path in (place / "merged").iterdir()] == ["one"]


def model_of(place: Path, name: str = "one", *, is_streamed: bool = False) -> Publication:
    base = place / "base"
    return Publication(place / name, PRESERVED, base_layout(str(base)), str(base), is_streamed=is_streamed)


def test_a_model_that_was_not_completed_has_no_name(place: Path) -> None:
    with pytest.raises(AssertionError):
        model_of(place).publish(None, {}, replaces=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("more_bytes", "is_in"), [(-200, True), (0, False)])
def test_a_file_of_a_plan_may_be_twice_as_large_as_the_largest(
    place: Path, monkeypatch: pytest.MonkeyPatch, more_bytes: int, is_in: bool
) -> None:
    """The worker cannot let a file grow beyond that."""
    monkeypatch.setattr(one_publication, "_MORE_BYTES", 0)
    model = model_of(place)
    largest = model.expected.largest_bytes
    assert model.publishing == publishing("preserve", files=2, most_bytes=2 * largest)
    spare = 2 * largest - model.expected.files[-1].size_bytes
    new = (StoredTensor(name="new", dtype="U8", shape=(spare + more_bytes,)),)
    with nullcontext() if is_in else pytest.raises(NotPublishedError), opened(model.plan(new)):
        assert model.tensors
    model.discard()


def test_a_model_is_not_completed_after_the_run_was_ended(place: Path) -> None:
    model = model_of(place)
    with opened(model.plan(())):
        model.written(PublicationWritten(task=0))
    model.stop()
    with pytest.raises(NotPublishedError):
        model.complete()
    model.discard()
    model.stop()


def test_a_model_that_is_incomplete_at_a_death_is_removed(place: Path) -> None:
    run = SimpleNamespace(specs=(), inputs=(), options=RunOptions())
    models = Publications(cast("Run", run), PublishSpec(directory="merged", label="merged"))
    models._models = {0: model_of(place, "passed"), 1: model_of(place, "written")}
    for model in models._models.values():
        with opened(model.plan(())):
            model.written(PublicationWritten(task=0))
    models.judged(0, judged_report(entry(place / "passed")), evidence())
    models.ended()
    assert (place / ".passed.partial").exists()
    assert not (place / ".written.partial").exists()
    models.close()


@pytest.mark.parametrize("lost", [None, "embed.weight", NAMES[1]])
def test_a_tensor_of_a_streamed_base_needs_a_checksum(place: Path, lost: str | None) -> None:
    model, tensors = model_of(place, is_streamed=True), stored(place / "base")
    with opened(model.plan(plan_of())) as descriptors:
        files = PlannedFiles(descriptors)
        for name, content in tensors.items():
            if name != lost:
                files.write(name, 0, memoryview(content))
        message = PublicationWritten(task=0, checksums=tuple(files.checksums.items()))
    if lost is None:
        model.written(message)
        model.complete()
        assert stored(place / ".one.partial" / "model") == tensors
    else:
        with pytest.raises(NotPublishedError, match=lost):
            model.written(message)
        with pytest.raises(NotPublishedError):
            model.complete()
    model.discard()


@pytest.mark.attempt("F01", "ENOSPC while the model is written", "not published, and no leftover")
def test_a_disk_that_fills_during_the_copy_prevents_publishing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weight_files.write_all

    def fail(descriptor: int, start: int, content: memoryview) -> None:
        if start:  # not a header
            raise OSError(28, "No space left on device")
        own(descriptor, start, content)

    monkeypatch.setattr(weight_files, "write_all", fail)
    assert play(place, "--publish", "merged") == 3
    assert nothing_published(place)
    assert "No space left on device" in adapters_of(place)[0]["findings"][0]["message"]


def test_a_directory_that_is_not_writable_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_directory.os, "access", lambda *_: False)
    assert play(place, "--publish", "merged") == 2


@pytest.mark.attempt("F09", "weights of the base are replaced while it is merged", "withdrawn")
def test_a_base_that_changes_during_the_run_is_not_published(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        path = place / "base" / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    assert play(place, "--publish", "merged", send=send) == 3
    assert nothing_published(place)
    assert adapters_of(place)[0]["published"] is None


@pytest.mark.parametrize("why", ["fails", "is not sent", "has no files"])
def test_a_model_of_an_earlier_run_is_named_without_a_new_one(
    place: Path, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lay_adapter(place, "two")
    assert play(place, "--publish", "merged", adapters=["one", "two"]) == 0
    before = state(place / "merged")
    assert "earlier run" not in capfd.readouterr().err
    if why == "has no files":
        (place / "one" / "adapter_model.safetensors").write_bytes(b"x")
    how: dict[str, Any] = {
        "fails": {"changes": {"merges": (merged_tensor(broken()),)}},
        "is not sent": {"send": refuses},
        "has no files": {},
    }
    assert play(place, "--publish", "merged", adapters=["one"], **how[why]) == (3 if why == "is not sent" else 1)
    assert state(place / "merged") == before, "nothing of the user's is removed"
    (adapter,) = adapters_of(place)
    assert (adapter["findings"][-1]["check"], adapter["findings"][-1]["severity"]) == ("earlier-model", "warning")
    assert adapter["verdict"] != "passed"
    for text in (capfd.readouterr().err, (place / "merge-gate-report" / "summary.md").read_text()):
        assert "merged/one" in text
        assert "earlier run" in text
        assert "merged/two" not in text, "it is not in this run"


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.attempt("P03", "DIR/NAME is a link, a dangling link, a file, or a pipe", "exit 2, and it stays")
@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe", "empty"])
def test_what_is_no_publication_is_refused_and_stays(place: Path, kind: str) -> None:
    (place / "merged").mkdir()
    (place / "mine").mkdir()
    makes: dict[str, Callable[[Path], object]] = {
        "link": lambda one: one.symlink_to("../mine"),
        "dangling link": lambda one: one.symlink_to("../absent"),
        "file": lambda one: one.write_text("mine"),
        "pipe": os.mkfifo,
        "empty": lambda one: one.mkdir(),
    }
    makes[kind](place / "merged" / "one")
    before = identity_of("one", (place / "merged" / "one").lstat())
    assert play(place, "--publish", "merged") == 2
    assert identity_of("one", (place / "merged" / "one").lstat()) == before


@pytest.mark.attempt("P03b", "DIR/NAME is a user's directory", "exit 2, and it stays")
def test_a_foreign_directory_is_refused_and_stays(place: Path) -> None:
    (place / "merged" / "one").mkdir(parents=True)
    (place / "merged" / "one" / "mine").write_text("mine")
    assert play(place, "--publish", "merged") == 2
    assert state(place / "merged") == {"one/mine": hashlib.sha256(b"mine").hexdigest()}


def test_a_foreign_partial_directory_is_refused_and_stays(place: Path) -> None:
    (place / "merged" / ".one.partial").mkdir(parents=True)
    (place / "merged" / ".one.partial" / "mine").touch()
    assert play(place, "--publish", "merged") == 2
    assert list(state(place / "merged")) == [".one.partial/mine"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "another file": lambda model: (model / "mine").touch(),
    "a hidden file": lambda model: (model / ".mine").touch(),
    "an empty folder": lambda model: (model / "mine").mkdir(),
    "a pipe": lambda model: os.mkfifo(model / "mine"),
    "a file less": lambda model: (model / "README.md").unlink(),
    "a longer file": lambda model: (model / "README.md").write_text("longer" * 1000),
    "an edit of equal size": lambda model: edited(model / "config.json", b"llama", b"gemma"),
    "an edit of the card": lambda model: edited(model / "README.md", b"checked", b"unknown"),
    "an edited manifest": lambda model: edited(model / "merge-gate.json", b'"config"', b'"Config"'),
    "another spelling of the manifest": lambda model: edited(model / "merge-gate.json", b"\n", b" "),
    "a link": lambda model: (model.rename(model.parents[1] / "elsewhere"), model.symlink_to("../elsewhere")),
}


def edited(file: Path, old: bytes, new: bytes) -> None:
    """The file with the same size."""
    content = file.read_bytes()
    assert old in content
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))


@pytest.mark.attempt("P04", "own publication edited, at equal size too: files, card, manifest", "exit 2, and it stays")
@pytest.mark.attempt("P05", "files, pipe, hidden file, empty folder, or link added to it", "exit 2, and it stays")
@pytest.mark.parametrize("change", ["none", *CHANGES])
def test_only_an_unchanged_earlier_publication_is_replaced(place: Path, change: str) -> None:
    assert play(place, "--publish", "merged") == 0
    model = place / "merged" / "one"
    CHANGES.get(change, lambda _: None)(model)
    before = state(place)
    assert play(place, "--publish", "merged", "-o", "second") == (0 if change == "none" else 2)
    shutil.rmtree(place / "second", ignore_errors=True)
    if change == "none":
        assert stored(model) == expected(stored(place / "base"))
        assert [path.name for path in (place / "merged").iterdir()] == ["one"]
    else:
        assert state(place) == before


@pytest.mark.attempt("P04c", "weights of an earlier publication edited at equal size", "not published, and they stay")
def test_edited_weights_are_noticed_before_they_are_replaced(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert play(place, "--publish", "merged") == 0
    assert "is compared with" not in capfd.readouterr().err, "there was no earlier model"
    weights = place / "merged" / "one" / "model-00001-of-00002.safetensors"
    edited(weights, weights.read_bytes()[-4:], b"mine")
    before = state(place / "merged")
    assert play(place, "--publish", "merged", "-o", "second") == 3
    assert state(place / "merged") == before
    assert "is compared with" in capfd.readouterr().err
    (adapter,) = json.loads((place / "second" / "report.json").read_text())["adapters"]
    assert (adapter["verdict"], adapter["cause"]) == ("error", "not-published")


@pytest.mark.attempt("F08", "config.json of the base is replaced after the verdict", "not published")
@pytest.mark.parametrize("name", ["base/config.json", "base/tokenizer.json", "one/tokenizer.json"])
@pytest.mark.parametrize("when", ["while it is merged", "before it is copied"])
def test_a_file_that_is_swapped_during_the_run_is_not_published(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    for file in ("base/tokenizer.json", "one/tokenizer.json"):
        (place / file).write_text("{}")

    def swap() -> None:
        (place / "new").write_bytes((place / name).read_bytes())
        (place / "new").rename(place / name)

    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        if when == "while it is merged":
            swap()

    checked = feature.replaceable

    def swapped(*words: Any) -> Any:
        if when == "before it is copied":
            swap()
        return checked(*words)

    monkeypatch.setattr(feature, "replaceable", swapped)
    assert play(place, "--publish", "merged", send=send) == 3
    assert nothing_published(place)
    assert adapters_of(place)[0]["verdict"] == "error"


@pytest.mark.attempt(
    "X05b", "publishing one model raises what nothing expects", "that adapter's error, and not the run's end"
)
@pytest.mark.parametrize("error", [RecursionError(), ZeroDivisionError("a bug"), UnicodeError("text")])
def test_an_error_of_one_model_costs_that_model(place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lay_adapter(place, "two")
    read = one_publication.read_inputs

    def fail(base: str, adapters: list[str], *more: Any) -> Any:
        if adapters == [str(place / "one")]:
            raise error
        return read(base, adapters, *more)

    monkeypatch.setattr(one_publication, "read_inputs", fail)
    assert play(place, "--publish", "merged") == 3
    assert [path.name for path in (place / "merged").iterdir()] == ["two"]
    assert [adapter["cause"] for adapter in adapters_of(place)] == ["not-published", None]


@pytest.mark.attempt("A04", "publish leads through a link of the checkout", "exit 2, and nothing outside")
@pytest.mark.parametrize("target", ["link", "link/below", "inner/link", "inner/../link/below", "dangling", "./link/"])
@pytest.mark.parametrize("by", ["option", "absolute option", "configuration"])
def test_a_link_below_the_current_directory_is_refused(place: Path, target: str, by: str) -> None:
    outside = place.with_name(f"{place.name}-outside")
    (outside / "below").mkdir(parents=True)
    (place / "inner").mkdir()
    for name, to in (("link", outside), ("inner/link", outside), ("dangling", outside / "absent")):
        (place / name).symlink_to(to)
    config = {"version": 1, "base": "base", "adapters": ["one"], "publish": target}
    (place / "gate.yml").write_text(json.dumps(config))
    if by == "configuration":
        assert play(place, adapters=["gate.yml"]) == 2
    else:
        assert play(place, "--publish", target if by == "option" else f"{place}/{target}") == 2
    assert state(outside) == {}
    assert not (outside / "absent").exists()


def test_a_link_above_the_current_directory_is_followed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many homes and disks are behind links."""
    home = place.with_name(f"{place.name}-home")
    home.symlink_to(place)
    (place / "work").mkdir()
    assert play(place, "--publish", f"{home}/merged") == 0
    assert (place / "merged" / "one").is_dir()


@pytest.mark.attempt("P12", "YAML publishes to an absolute place, ../.. and ~, with the action's limit", "exit 2")
@pytest.mark.parametrize("target", ["../outside", "../../outside", "/tmp/merge-gate-outside", "checkout/../.."])
@pytest.mark.parametrize("by", ["option", "configuration"])
def test_a_limit_keeps_models_inside(place: Path, monkeypatch: pytest.MonkeyPatch, target: str, by: str) -> None:
    monkeypatch.setenv("MERGE_GATE_PUBLISH_WITHIN", str(place))
    config = {"version": 1, "base": "base", "adapters": ["one"], "publish": target}
    (place / "gate.yml").write_text(json.dumps(config))
    words = {"adapters": ["gate.yml"]} if by == "configuration" else {}
    assert play(place, *(["--publish", target] if by == "option" else []), **words) == 2  # type: ignore[arg-type]
    assert not (place.parent / "outside").exists()
    assert not Path("/tmp/merge-gate-outside").exists()
    assert play(place, "--publish", "~/merged") == 0
    assert (place / "~" / "merged" / "one").is_dir()


@pytest.mark.parametrize("target", ["base", "base/merged", ".", "one/merged"])
@pytest.mark.attempt("P01", "publish into the base, below it, or over it", "exit 2, and nothing changes")
@pytest.mark.attempt("P02", "publish into the adapter", "exit 2, and nothing changes")
def test_no_input_is_written_to_or_replaced(place: Path, target: str) -> None:
    before = state(place)
    assert play(place, "--publish", target, "-o", "report") == 2
    shutil.rmtree(place / "report", ignore_errors=True)
    assert state(place) == before


def test_a_published_base_is_not_replaced_by_its_own_merge(place: Path) -> None:
    assert play(place, "--publish", "merged") == 0
    before = state(place / "merged")
    assert play(place, "--publish", "merged", "-o", "second", base="merged/one") == 3
    assert state(place / "merged") == before


@pytest.mark.parametrize("target", ["/proc/merged", "base/config.json", "base/config.json/merged"])
@pytest.mark.attempt("P14", "DIR is a file, below a file, or in /proc", "exit 2")
def test_a_target_that_cannot_be_written_is_refused(place: Path, target: str) -> None:
    assert play(place, "--publish", target) == 2


@pytest.mark.parametrize("name", [".one", "a/b", "x" * 250])
@pytest.mark.attempt("P11", "adapters named .one, a/b, or with 200 characters", "used as a name, or exit 2")
def test_a_name_that_is_no_directory_is_refused(place: Path, name: str) -> None:
    config = {"version": 1, "base": "base", "adapters": [{"path": "one", "name": name[:200]}], "publish": "merged"}
    (place / "gate.yml").write_text(json.dumps(config))
    assert play(place, adapters=["gate.yml"]) == (0 if name.startswith("x") else 2)


@pytest.mark.attempt("F12", "a disk that is too small", "exit 3 before the first merge")
def test_a_disk_that_is_too_small_is_refused_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = os.statvfs(place)
    full = os.statvfs_result((*real[:4], 0, *real[5:]))
    monkeypatch.setattr(publish_directory.os, "statvfs", lambda _: full)
    assert play(place, "--publish", "outer/merged", send=lambda *_: pytest.fail("nothing is merged")) == 3
    assert not (place / "outer").exists()
    assert "and 0.0 MiB are free" in capfd.readouterr().err


def test_a_model_is_not_published_of_a_base_that_is_read_in_part(place: Path) -> None:
    assert play(place, "--publish", "merged", "--read", "touched", "--cache", "cache") == 2
    assert not (place / "merged").exists()


def test_a_limit_on_the_files_needs_a_directory(place: Path) -> None:
    assert play(place, "--max-shard-size", "5GB") == 2
