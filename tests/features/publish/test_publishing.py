"""Whole runs that publish, with a played worker: what is in the directory, and when there is none."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from merge_gate._internal.errors import NotPublishedError
from merge_gate.cli.dispatch import main
from merge_gate.features.publish import feature, one_publication
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.feature import Publications
from merge_gate.features.publish.one_publication import Publication
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.weight_files import base_layout
from merge_gate.records.config import PublishSpec
from merge_gate.records.files import MANIFEST_NAME, StoredTensor
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.run.flow import Run
from tests.support.command import entries
from tests.support.judged_entry import entry, judged_report
from tests.support.judging.cases import broken, evidence
from tests.support.judging.cases import merged as merged_tensor
from tests.support.played_merges import (
    NAMES,
    configure,
    expected,
    lay_adapter,
    lay_base,
    play,
    played,
    stored,
    write,
    write_all,
)
from tests.support.publish_kills import digests

PRESERVED = PublishSpec(directory="", label="")
Send = Callable[[Publications, int, Mapping[str, bytes]], object]


def adapters_of(place: Path) -> list[dict[str, Any]]:
    return entries(place / "merge-gate-report")


# --- what is published -----------------------------------------------------------------------------------------------


@pytest.mark.attempt("P00", "plain publication (control)", "published, and the base unchanged")
def test_a_published_model_is_the_base_with_the_merged_tensors(place: Path) -> None:
    before = digests(place / "base")
    assert play(place, "--publish", "merged") == 0
    assert digests(place / "base") == before
    model = place / "merged" / "one"
    assert stored(model) == expected(stored(place / "base"))
    assert (model / "model.safetensors.index.json").read_bytes() == (
        place / "base" / "model.safetensors.index.json"
    ).read_bytes()
    assert [path.name for path in (place / "merged").iterdir()] == ["one"]
    (adapter,) = adapters_of(place)
    assert (adapter["published"]["directory"], adapter["published"]["dtype"]) == ("merged/one", "preserve")
    assert {file["path"]: file["sha256"] for file in adapter["published"]["files"]} == digests(model)


def test_a_published_model_lists_every_input_and_every_setting(place: Path) -> None:
    (place / "one" / "tokenizer.json").write_text("{}")
    (place / "base" / "quantize_config.json").write_text("{}")
    checks = {"headroom": {"severity": "error", "limit": 0.125}, "keys-unexpected": "off"}
    configure(place, checks=checks, forward="off")
    assert play(place, "--publish", "merged", adapters=["gate.yml"]) == 0
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    for folder, files in (("base", document["base"]["files"]), ("one", document["adapters"][0]["files"])):
        assert {file["path"]: file["sha256"] for file in files} == digests(place / folder)
    assert set(document["checks"]) == {"headroom=error:0.125", "keys-unexpected=off"}
    assert document["forward"] == "off"
    assert main(["verify", "merged/one"]) == 0
    (entry,) = entries(place / "merge-gate-verify")
    assert "keys-unexpected=off" in entry["findings"][0]["message"]


def test_the_configuration_can_ask_for_it_and_for_smaller_files(place: Path) -> None:
    (place / "gate").mkdir()
    adapters = [{"path": "../one", "name": "first"}]
    publish = {"directory": "merged", "max-shard-size": "1KB"}
    configure(place / "gate", base="../base", adapters=adapters, publish=publish)
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
    base = {"model": "base", "dtype": "bfloat16", "quantization": quantization}
    configure(place, "plain.yml", base=base)
    configure(place, base=base, publish={"directory": "merged", "dtype": "bfloat16"})
    assert play(place, "--cache", "cache", adapters=["gate.yml"]) == 0
    assert (place / "merged" / "one-bfloat16").is_dir()
    assert play(place, "--cache", "cache", adapters=["plain.yml"]) == 0
    assert adapters_of(place)[0]["cached"] is is_cached


# --- no directory ----------------------------------------------------------------------------------------------------


@pytest.mark.attempt("P18", "two adapters in several dtypes", "one model each")
def test_two_adapters_in_two_dtypes_have_one_model_each(place: Path) -> None:
    lay_adapter(place, "two")
    base = {"model": "base", "dtype": ["float32", "bfloat16", "auto"]}
    configure(place, base=base, adapters=["one", "two"], publish="merged")
    assert play(place, adapters=["gate.yml"]) == 0
    assert {path.name for path in (place / "merged").iterdir()} == {"one", "two"}
    published = [adapter["base"]["dtype"] for adapter in adapters_of(place) if adapter["published"]]
    assert len(published) == 2


@pytest.mark.slow
def test_a_base_that_is_not_there_costs_the_verdict_and_no_more(place: Path) -> None:
    assert play(place, "--publish", "merged", adapters=["one", "--base", "acme/absent"]) == 3
    assert not (place / "merged").exists()


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
    place: Path, capfd: pytest.CaptureFixture[str], base: Any, wanted: str, words: str
) -> None:
    configure(place, base={"model": "base", "dtype": base}, publish={"directory": "merged", "dtype": wanted})
    assert play(place, adapters=["gate.yml"]) == 3
    error = capfd.readouterr().err
    assert words in error
    assert "base base" not in error, "nothing was merged"
    assert not (place / "merged").exists()
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


def edited(change: Callable[[tuple[int, ...]], object]) -> Send:
    """Plan a merge, and change its files."""

    def send(publisher: Publications, task: int, _tensors: Mapping[str, bytes]) -> None:
        with opened(publisher.planned(task, plan_of())) as descriptors:
            change(descriptors)
        publisher.written(PublicationWritten(task=task))

    return send


@contextmanager
def opened(descriptors: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def planned(*tensors: StoredTensor) -> Send:
    """Plan these tensors, and write none."""
    return lambda publisher, task, _: write(publisher, task, tensors, {})


def written(**message: Any) -> Send:
    """Write a merge, and send this in the message."""
    return lambda publisher, task, tensors: write(
        publisher, task, plan_of(), {name: tensors[name] for name in NAMES}, **message
    )


def only(tensors: Mapping[str, bytes], **message: Any) -> Send:
    """Plan a merge, and write these tensors."""
    return lambda publisher, task, _: write(publisher, task, plan_of(), tensors, **message)


REFUSED = written(refusal=NotJudged(message="no way back", hint="none"))
SENDERS: dict[str, Send] = {
    "a refusal": REFUSED,
    "settings that are no object": written(settings="[NaN]"),
    "another tensor than it reports": written(checksums=((NAMES[0], 1),)),
    "no checksum of a planned tensor": only({NAMES[0]: bytes(128)}, checksums=()),
    "into its neighbor": only({name: bytes(130 if name == NAMES[0] else 128) for name in reversed(NAMES)}),
    "after the end of a file": only({"mtp.weight": bytes(130)}),
    "a plan of another dtype": planned(*plan_of("F32")),
    "a plan of far too much": planned(StoredTensor(name="new", dtype="F32", shape=(1 << 40,))),
    "a plan of a shape, and nothing": planned(StoredTensor(name="embed.weight", dtype="BF16", shape=(9, 8))),
    "a plan of a name that is no text": planned(StoredTensor(name="\ud800", dtype="F32", shape=(1,))),
    "a plan without an end": lambda publisher, task, _: [os.close(one) for one in publisher.planned(task, plan_of())],
    "an end without a plan": lambda publisher, task, _: publisher.written(PublicationWritten(task=task)),
    "nothing": lambda *_: None,
    "another header": edited(lambda descriptors: os.pwrite(descriptors[0], b"x", 9)),
    "a shorter file": edited(lambda descriptors: os.ftruncate(descriptors[1], 20)),
}


@pytest.mark.parametrize("what", SENDERS)
def test_what_the_worker_sends_must_fit_the_base(what: str, place: Path) -> None:
    assert play(place, "--publish", "merged", send=SENDERS[what]) == 3
    assert not (place / "merged").exists()
    (adapter,) = adapters_of(place)
    assert (adapter["verdict"], adapter["cause"], adapter["published"]) == ("error", "not-published", None)
    assert adapter["findings"][0]["origin"] == "runtime"


def test_what_the_worker_sends_after_its_verdict_is_ignored(place: Path) -> None:
    later: list[Any] = []

    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        later.append(publisher)

    assert play(place, "--publish", "merged", send=send) == 0
    before = digests(place / "merged")
    with pytest.raises(NotPublishedError):
        later[0].planned(0, plan_of())
    later[0].written(PublicationWritten(task=0))
    assert digests(place / "merged") == before


def test_a_second_attempt_replaces_the_first(place: Path) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write(publisher, task, plan_of(), dict.fromkeys(NAMES, bytes(128)))
        write_all(publisher, task, tensors)

    assert play(place, "--publish", "merged", send=send) == 0
    assert stored(place / "merged" / "one") == expected(stored(place / "base"))


def test_a_base_whose_files_cannot_be_published(place: Path) -> None:
    """It is one file of a name of its own, and cannot be cut."""
    shutil.rmtree(place / "base")
    (place / "base").mkdir()
    lay_base(place / "base", {"own.safetensors": dict.fromkeys(NAMES, ("BF16", (80, 8)))})
    (place / "base" / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    lay_adapter(place, "two")
    words = ("--publish", "merged", "--max-shard-size", "1KB")
    assert play(place, *words, send=lambda *_: pytest.fail("it is not sent")) == 3
    assert not (place / "merged").exists()
    assert {adapter["cause"] for adapter in adapters_of(place)} == {"not-published"}


def model_of(place: Path, name: str = "one", *, is_streamed: bool = False) -> Publication:
    base = place / "base"
    return Publication(place / name, PRESERVED, base_layout(str(base)), str(base), is_streamed=is_streamed)


def test_a_model_that_was_not_completed_has_no_name(place: Path) -> None:
    with pytest.raises(AssertionError):
        model_of(place).publish(None, {}, replaces=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("more_bytes", "is_in"), [(-200, True), (0, False)])
def test_a_file_of_a_plan_may_be_much_larger_than_expected(place: Path, more_bytes: int, is_in: bool) -> None:
    """The worker cannot let a file grow beyond that. The files of a plan are sparse."""
    model = model_of(place)
    most_bytes = model.publishing.most_bytes
    assert most_bytes == 2 * model.expected.largest_bytes + (1 << 30)
    spare = most_bytes - model.expected.files[-1].size_bytes
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


CHANGED_BASES: dict[str, Callable[[Path], object]] = {
    "replaced": lambda weights: weights.write_bytes(weights.read_bytes()[:-1] + b"x"),
    "removed": lambda weights: weights.unlink(),
}


@pytest.mark.attempt("F09", "weights of the base are replaced while it is merged", "withdrawn")
@pytest.mark.attempt("F13", "the base cannot be read again for the copy", "not published")
@pytest.mark.parametrize("change", CHANGED_BASES)
def test_a_base_that_changes_during_the_run_is_not_published(place: Path, change: str) -> None:
    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        CHANGED_BASES[change](place / "base" / "model-00002-of-00002.safetensors")

    assert play(place, "--publish", "merged", send=send) == 3
    assert not (place / "merged").exists()
    (adapter,) = adapters_of(place)
    assert (adapter["verdict"], adapter["published"]) == ("error", None)


@pytest.mark.attempt("P18b", "an adapter fails", "nothing is published")
@pytest.mark.parametrize("why", ["fails", "is not sent", "has no files"])
def test_a_model_of_an_earlier_run_is_named_without_a_new_one(
    place: Path, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lay_adapter(place, "two")
    assert play(place, "--publish", "merged", adapters=["one", "two"]) == 0
    before = digests(place / "merged")
    assert "earlier run" not in capfd.readouterr().err
    if why == "has no files":
        (place / "one" / "adapter_model.safetensors").write_bytes(b"x")
    how: dict[str, Any] = {
        "fails": {"changes": {"merges": (merged_tensor(broken()),)}},
        "is not sent": {"send": REFUSED},
        "has no files": {},
    }
    assert play(place, "--publish", "merged", adapters=["one"], **how[why]) == (3 if why == "is not sent" else 1)
    assert digests(place / "merged") == before, "nothing of the user's is removed"
    (adapter,) = adapters_of(place)
    assert (adapter["findings"][-1]["check"], adapter["findings"][-1]["severity"]) == ("earlier-model", "warning")
    assert adapter["verdict"] != "passed"
    assert adapter["published"] is None
    for text in (capfd.readouterr().err, (place / "merge-gate-report" / "summary.md").read_text()):
        assert "merged/one" in text
        assert "earlier run" in text
        assert "merged/two" not in text, "it is not in this run"


@pytest.mark.attempt("F08", "config.json of the base is replaced after the verdict", "not published")
@pytest.mark.parametrize("name", ["base/config.json", "base/tokenizer.json", "one/tokenizer.json", "too late"])
def test_a_file_that_is_swapped_during_the_run_is_not_published(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for file in ("base/tokenizer.json", "one/tokenizer.json"):
        (place / file).write_text("{}")

    def swap(file: Path) -> None:
        shutil.copy(file, place / "new")
        (place / "new").rename(file)

    def send(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
        write_all(publisher, task, tensors)
        if name != "too late":
            swap(place / name)

    if name == "too late":  # after the verdict, and before the files are copied
        monkeypatch.setattr(feature, "replaceable", lambda *_: swap(place / "base" / "config.json"))
    assert play(place, "--publish", "merged", send=send) == 3
    assert not (place / "merged").exists()
    assert adapters_of(place)[0]["verdict"] == "error"


@pytest.mark.attempt("X05b", "publishing one model raises what nothing expects", "that adapter's error alone")
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


def test_a_limit_on_files_needs_a_directory(place: Path) -> None:
    assert play(place, "--max-shard-size", "5GB") == 2
    assert not (place / "merged").exists()
