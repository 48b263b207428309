"""`merge-gate rebuild` with a played worker: the same bytes under the model's name, or no directory and the reasons."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate.cli.dispatch import main
from merge_gate.publish.manifest import MANIFEST_NAME, differences, parse_manifest, read_manifest, render
from merge_gate.records.config import Combine
from merge_gate.records.measured import Forward
from merge_gate.records.publication import CARD_NAME
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import ForwardMode
from merge_gate.worker.protocol import PublicationSent, Publisher
from tests.support import published
from tests.support.played_merges import MERGED, lay, play, played, send_all
from tests.support.tried import tried


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a base, an adapter, and its published model in `merged/one`."""
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, names=["one"])
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "quantize_config.json").write_text("{}")
    assert play(tmp_path, "--publish", "merged") == 0
    return tmp_path


def rebuild(place: Path, *words: str, base: str = "base", **how: Any) -> int:
    with played(place / base, **how):
        return main(["rebuild", "merged/one", "--output", "again", *words])


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def nothing_is_left(place: Path) -> bool:
    return not (place / "again").exists()


def merges(*_: object) -> None:
    pytest.fail("it was merged")


def test_the_same_inputs_give_the_same_bytes(place: Path) -> None:
    assert rebuild(place) == 0
    assert files(place / "again" / "one") == files(place / "merged" / "one")
    assert [path.name for path in (place / "again").iterdir()] == ["one"]
    with played(place / "base"):
        assert main(["rebuild", f"merged/one/{MANIFEST_NAME}", "--output", "again"]) == 2, "it is there already"


def test_the_inputs_may_be_elsewhere(place: Path) -> None:
    before = files(place / "merged" / "one")
    for name in ("base", "one"):
        (place / name).rename(place / f"my-{name}")
    assert rebuild(place, base="my-base") == 2, "the names in the file stand for nothing here"
    assert rebuild(place, "--base", "my-base", "--adapter", "my-one", base="my-base") == 0
    assert files(place / "again" / "one") == before


def flips_a_bit(publisher: Publisher, task: int, tensors: Mapping[str, bytes]) -> None:
    name = MERGED.format(0)
    changed = bytes([tensors[name][0] ^ 1, *tensors[name][1:]])
    send_all(publisher, task, {**tensors, name: changed})


def test_one_other_bit_is_named_and_nothing_is_kept(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert rebuild(place, send=flips_a_bit) == 1
    assert "model-00001-of-00002.safetensors: changed" in capfd.readouterr().err
    assert nothing_is_left(place)


INPUTS = {
    "base": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "quantize_config.json",
    ],
    "one": ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
}


def test_every_file_of_base_and_adapter_is_listed(place: Path) -> None:
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    listed = {"base": document["base"]["files"], "one": document["adapters"][0]["files"]}
    for folder, names in INPUTS.items():
        assert [file["path"] for file in listed[folder]] == names
        for file in listed[folder]:
            data = (place / folder / file["path"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("change", ["one byte", "missing"])
@pytest.mark.parametrize("name", [f"{folder}/{name}" for folder, names in INPUTS.items() for name in names])
def test_the_input_that_differs_is_named_before_anything_is_merged(
    place: Path, name: str, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place / name
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif path.suffix == ".json":
        path.write_bytes(data + b"\n")
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert rebuild(place, send=merges) in ({1} if change == "one byte" else {1, 3})
    err = capfd.readouterr().err
    if change == "one byte" and path.suffix == ".json":
        got, expected = hashlib.sha256(data + b"\n").hexdigest(), hashlib.sha256(data).hexdigest()
        assert err.count(" with SHA-256 ") == 2, "one file differs"
        assert err.index(path.name) < err.index(got) < err.index(expected)
    assert path.name in err
    assert nothing_is_left(place)


def test_a_file_more_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "base" / "generation_config.json").write_text("{}")
    (place / "base" / "notes.txt").write_text("is not read")
    (place / "base" / "modeling.py").write_text("is not run")
    assert rebuild(place, send=merges) == 1
    err = capfd.readouterr().err
    assert "generation_config.json" in err
    assert "notes.txt" not in err
    assert "modeling.py" not in err
    (place / "base" / "generation_config.json").unlink()
    assert rebuild(place) == 0


def test_another_base_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "base", place / "other")
    weights = place / "other" / "model-00002-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert rebuild(place, "--base", "other", base="other", send=merges) == 1
    assert "model-00002-of-00002.safetensors of the base" in capfd.readouterr().err
    assert nothing_is_left(place)


def edit(place: Path, name: str, value: object) -> None:
    """Change a fact in merge-gate.json, by its place, and the card with it: nothing else shows the edit."""
    folder = place / "merged" / "one"
    key, _, inner = name.partition(".")
    document = json.loads((folder / MANIFEST_NAME).read_text())
    published.rewrite(folder, **{key: document[key] | {inner: value} if inner else value})
    assert not differences(folder, read_manifest(folder)), "the directory fits its own record"


FACTS: dict[str, object] = {
    "parameters": 999_999_999,
    "warnings": ["headroom"],
    "peft_type": "DORA",
    "tool.version": "99",
    "versions.torch": "99",
    "versions.torch ": None,
    "versions.python": "2.7",
    "base.sha256": "0" * 64,
    "base.dtype": "float32",
    "base.quantization": "fp8",
}


@pytest.mark.parametrize(
    "fact", tried("T13", "merge-gate.json edited, and the card made to fit", "exit 1", {n: n for n in FACTS})
)
def test_a_fact_that_the_run_did_not_reproduce_is_named(
    place: Path, fact: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(place, fact.strip(), FACTS[fact])
    assert rebuild(place) == 1
    assert fact.strip() in capfd.readouterr().err
    assert nothing_is_left(place)


@pytest.mark.attempt("Y66", "allow_pickle true in merge-gate.json, and not needed", "named as not compared")
def test_a_permission_that_the_run_does_not_need_is_no_fact(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(place, "allow_pickle", True)
    assert rebuild(place) == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("Not compared: "))
    assert {"config,", "revisions", "allow_pickle", "trust_remote_code"} <= set(line.split())


@pytest.mark.attempt("T13z", "card and merge-gate.json written again in another spelling", "exit 1")
def test_another_spelling_of_the_file_is_named(place: Path) -> None:
    path = place / "merged" / "one" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert rebuild(place) == 1
    assert nothing_is_left(place)


# --- checks without their defaults -----------------------------------------------------------------------------------

LOST = {"unexpected": ("optimizer.step",)}
"""Evidence of an adapter that fails the gate, unless the check is off."""


@pytest.fixture
def switched_off(place: Path) -> Path:
    """A model whose merge the gate fails by its defaults."""
    config = {"version": 1, "base": "./base", "adapters": ["./one"], "checks": {"keys-unexpected": "off"}}
    (place / "gate.yml").write_text(json.dumps(config))
    assert play(place, "--publish", "off", adapters=["gate.yml"], changes=LOST) == 0
    shutil.rmtree(place / "merged")
    (place / "off").rename(place / "merged")
    return place


@pytest.mark.attempt("T14a", "rebuild a merge that fails the gate, published with the check off", "says so")
def test_checks_that_were_off_are_in_the_file_and_named(switched_off: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(switched_off / "merged" / "one")
    assert manifest.checks == ("keys-unexpected=off",)
    assert "keys-unexpected" in (switched_off / "merged" / "one" / CARD_NAME).read_text()
    capfd.readouterr()
    assert rebuild(switched_off, changes=LOST) == 0
    assert "keys-unexpected=off" in capfd.readouterr().out
    assert main(["verify", "merged/one"]) == 0
    (entry,) = json.loads((switched_off / "merge-gate-verify" / "report.json").read_text())["adapters"]
    assert "keys-unexpected=off" in entry["findings"][0]["message"]


@pytest.mark.attempt("T14b", "the same, after the changed check was removed from merge-gate.json", "exit 3")
def test_a_merge_that_the_gate_fails_is_not_laundered(switched_off: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(switched_off, "checks", [])
    assert rebuild(switched_off, changes=LOST) == 3
    assert "optimizer.step" in capfd.readouterr().err
    assert nothing_is_left(switched_off)


SETTINGS = {
    "merged-nonfinite is off": "merged-nonfinite=off",
    "base-nonfinite warns": "base-nonfinite=warning",
    "a check that is none": "no-such-check=off",
    "a severity that is none": "no-effect=maybe",
    "a limit that is none": "headroom=error:nan",
    "nothing": "",
}


@pytest.mark.parametrize("setting", tried("T14x", "checks in merge-gate.json", "exit 2", SETTINGS))
def test_a_setting_that_no_configuration_can_have_is_refused(place: Path, setting: str) -> None:
    path = place / "merged" / "one" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checks": [setting]}))
    assert rebuild(place) == 2
    assert main(["verify", "merged/one"]) == 2


def test_limits_are_repeated_too(place: Path) -> None:
    checks = {"headroom": {"severity": "error", "limit": 0.123456789}, "delta-norm": {"limit": 7, "error-limit": 9}}
    (place / "gate.yml").write_text(
        json.dumps({"version": 1, "base": "./base", "adapters": ["./one"], "checks": checks})
    )
    shutil.rmtree(place / "merged")
    assert play(place, "--publish", "merged", adapters=["gate.yml"]) == 0
    listed = read_manifest(place / "merged" / "one").checks
    assert set(listed) == {"headroom=error:0.123456789", "delta-norm=warning:7.0:9.0"}
    assert rebuild(place) == 0


def test_whether_the_model_has_to_be_run_is_repeated_too(place: Path) -> None:
    """A warning about activations is a fact of a model, and it depends on that."""
    ran, not_run = {"forward": Forward(ran=True)}, {"forward": Forward(why_not="no memory")}
    assert read_manifest(place / "merged" / "one").forward is ForwardMode.AUTO
    shutil.rmtree(place / "merged")
    assert play(place, "--publish", "merged", "--forward", "required", changes=ran) == 0
    assert rebuild(place, changes=not_run) == 3
    assert nothing_is_left(place)
    assert rebuild(place, changes=ran) == 0


def test_other_names_of_the_base_are_accepted_as_in_the_first_run(place: Path) -> None:
    adapter = place / "one" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": "acme/other"}))
    base = {"model": "./base", "names": ["acme/other"]}
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./one"]}))
    shutil.rmtree(place / "merged")
    assert play(place, "--publish", "merged", adapters=["gate.yml"]) == 0
    assert rebuild(place) == 0


# --- where it goes ---------------------------------------------------------------------------------------------------

PLACES = {
    "the published model": "merged/one",
    "a folder in the published model": "merged/one/sub",
    "the base": "base",
    "a folder in the base": "base/sub",
    "the adapter": "one",
    "a link to a directory": "link",
    "a link to the model": "link-to-model",
    "a file": "file",
    "/proc": "/proc/self",
    "5,000 characters": "x" * 5000,
}


@pytest.mark.parametrize("output", tried("T15", "rebuild --output", "exit 2", PLACES))
def test_a_model_is_not_written_into_other_files(place: Path, output: str) -> None:
    (place / "elsewhere").mkdir()
    (place / "link").symlink_to("elsewhere")
    (place / "link-to-model").symlink_to("merged/one")
    (place / "file").write_text("mine")
    before = files(place)
    with played(place / "base", send=merges):
        try:
            code = main(["rebuild", "merged/one", "--output", output])
        except SystemExit as leaving:
            code = int(str(leaving.code))
    assert code == 2
    assert files(place) == before


def refuses(publisher: Publisher, task: int, _: Mapping[str, bytes]) -> None:
    publisher.sent(PublicationSent(task=task, refusal=NotJudged(message="no way back", hint="none")))


def test_a_model_that_cannot_be_made_is_a_sentence(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert rebuild(place, send=refuses) == 3
    assert "the model could not be made" in capfd.readouterr().err
    assert nothing_is_left(place)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"name": "../one"}, marks=pytest.mark.attempt("T11a", "the name ../one", "exit 2")),
        pytest.param({"name": "."}, marks=pytest.mark.attempt("T11b", "the name .", "exit 2")),
        pytest.param({"name": "/etc/x"}, marks=pytest.mark.attempt("T11c", "an absolute name", "exit 2")),
        pytest.param({"name": "a/b"}, marks=pytest.mark.attempt("T11d", "the name a/b", "exit 2")),
        pytest.param({"name": "a\0b"}, marks=pytest.mark.attempt("T11e", "a name with NUL", "exit 2")),
        pytest.param({"name": "x" * 300}, marks=pytest.mark.attempt("T11f", "a name of 300 characters", "exit 2")),
        pytest.param({"verdict": "failed"}, marks=pytest.mark.attempt("T12a", "the verdict failed", "exit 2")),
        pytest.param({"dtype": "int4"}, marks=pytest.mark.attempt("T12b", "a dtype that is none", "exit 2")),
        {"base": None},
        pytest.param({"adapters": []}, marks=pytest.mark.attempt("T12c", "no adapters", "exit 2")),
    ],
)
def test_a_file_of_a_stranger_is_refused(place: Path, change: Mapping[str, Any]) -> None:
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    (place / "merged" / "one" / MANIFEST_NAME).write_text(json.dumps(document | change))
    assert rebuild(place) == 2
    assert nothing_is_left(place)


def test_no_code_runs_whatever_the_file_says(place: Path) -> None:
    config = place / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "x.Y"}}))
    assert play(place, "--publish", "merged") == 0
    edit(place, "trust_remote_code", True)
    assert rebuild(place) == 0, "the reference is removed, as in the first run"


@pytest.mark.attempt("T13y", "merge-gate.json with false facts, and the card as it was", "exit 1, and nothing is kept")
def test_an_edited_file_does_not_fit_its_card(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = place / "merged" / "one" / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"parameters": ', b'"parameters": 9'))
    assert rebuild(place) == 1
    assert "README.md" in capfd.readouterr().err
    assert nothing_is_left(place)


@pytest.mark.attempt("F14", "kill -9 of a rebuild, and again", "the leftover is removed")
def test_what_a_killed_rebuild_left_is_removed(place: Path) -> None:
    left = place / "again" / ".merge-gate-rebuild-abcdefgh"
    left.mkdir(0o700, parents=True)
    (left / "half").write_bytes(b"")
    os.utime(left, (0, 0))  # of a run that began long ago
    assert rebuild(place) == 0
    assert not left.exists()


def test_what_a_rebuild_has_just_made_stays(place: Path) -> None:
    young = place / "again" / ".merge-gate-rebuild-abcdefgh"
    young.mkdir(0o700, parents=True)
    assert rebuild(place) == 0
    assert young.exists()


def test_a_directory_without_a_record_gets_a_hint_for_reading(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rebuild", "base", "--output", "again"]) == 2
    err = capfd.readouterr().err
    assert "cannot read base/merge-gate.json: No such file or directory\n  name a published model" in err


@pytest.mark.attempt("T19", "rebuild FILE is a pipe", "exit 2")
def test_links_and_pipes_are_not_read(place: Path) -> None:
    manifest = place / "merged" / "one" / MANIFEST_NAME
    manifest.unlink()
    os.mkfifo(manifest)
    assert rebuild(place) == 2


def test_a_combination_is_made_of_its_members_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, names=["one", "two"])
    combine = {"method": "linear", "adapters": ["one", "two"], "weights": [0.5, 0.25]}
    config = {"version": 1, "base": "./base", "adapters": ["./one", "./two", {"name": "both", "combine": combine}]}
    (tmp_path / "gate.yml").write_text(json.dumps(config))
    assert play(tmp_path, "--publish", "merged", adapters=["gate.yml"]) == 0
    with played(tmp_path / "base"):
        assert main(["rebuild", "merged/both", "--output", "again"]) == 0
        assert main(["rebuild", "merged/both", "--output", "more", "--adapter", "one"]) == 2, "it has two members"
        assert main(["rebuild", "merged/both", "--output", "more", "--adapter", "one", "--adapter", "two"]) == 0
    assert (
        files(tmp_path / "again" / "both") == files(tmp_path / "more" / "both") == files(tmp_path / "merged" / "both")
    )


@pytest.mark.attempt("T12d", "an adapter has the combination's name", "exit 2")
def test_a_member_with_the_name_of_the_combination_is_refused(tmp_path: Path) -> None:
    combine = Combine(method="linear", adapters=("a", "b"), weights=(1.0, 1.0))
    document = json.loads(render(published.publish(tmp_path, combine=combine)))
    assert parse_manifest(json.dumps(document).encode(), "x").combination
    document["adapters"][0]["name"] = document["name"]
    with pytest.raises(UsageError, match="adapters"):
        parse_manifest(json.dumps(document).encode(), "x")


@pytest.mark.parametrize(
    ("option", "name", "meant"),
    [
        pytest.param("--base", "bsae", '"base"', marks=pytest.mark.attempt("D1-r1", "rebuild", "exit 2")),
        pytest.param("--adapter", "merge/one", '"merged/one"', marks=pytest.mark.attempt("D1-r2", "rebuild", "exit 2")),
    ],
)
def test_a_mistyped_place_is_not_fetched(
    place: Path, capfd: pytest.CaptureFixture[str], option: str, name: str, meant: str
) -> None:
    """Also if merge-gate.json has a revision: that is not the revision of another name."""
    record = place / "merged" / "one" / MANIFEST_NAME
    manifest = json.loads(record.read_text())
    manifest["base"]["revision"] = "0" * 40
    record.write_text(json.dumps(manifest))
    assert rebuild(place, option, name) == 2
    error = capfd.readouterr().err
    assert meant in error
    assert nothing_is_left(place)
