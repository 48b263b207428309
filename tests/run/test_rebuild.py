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

from merge_gate.cli.dispatch import main
from merge_gate.publish.manifest import MANIFEST_NAME
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.protocol import PublicationSent
from merge_gate.worker.publish_service import Publisher
from tests.support.played_merges import MERGED, lay, play, played, send_all


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


def test_other_versions_are_named_if_the_bytes_differ(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    document["versions"]["torch"] = "0.1"
    (place / "merged" / "one" / MANIFEST_NAME).write_text(json.dumps(document))
    assert rebuild(place, send=flips_a_bit) == 1
    assert "torch is" in capfd.readouterr().err
    assert rebuild(place) == 0, "with the same bytes, versions do not matter"


def refuses(publisher: Publisher, task: int, _: Mapping[str, bytes]) -> None:
    publisher.sent(PublicationSent(task=task, refusal=NotJudged(message="no way back", hint="none")))


def test_a_model_that_cannot_be_made_is_a_sentence(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert rebuild(place, send=refuses) == 3
    assert "the model could not be made" in capfd.readouterr().err
    assert nothing_is_left(place)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../one"},
        {"name": "."},
        {"verdict": "failed"},
        {"dtype": "int4"},
        {"base": None},
        {"adapters": []},
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
    document = json.loads((place / "merged" / "one" / MANIFEST_NAME).read_text())
    (place / "merged" / "one" / MANIFEST_NAME).write_text(json.dumps(document | {"trust_remote_code": True}))
    assert rebuild(place) == 0, "the reference is removed, as in the first run"


def test_what_a_killed_rebuild_left_is_removed(place: Path) -> None:
    left = place / "again" / ".merge-gate-rebuild-x"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"")
    os.utime(left, (0, 0))  # of a run that began long ago
    assert rebuild(place) == 0
    assert not left.exists()


def test_what_a_rebuild_has_just_made_stays(place: Path) -> None:
    young = place / "again" / ".merge-gate-rebuild-x"
    young.mkdir(parents=True)
    assert rebuild(place) == 0
    assert young.exists()


def test_a_directory_without_a_record_gets_a_hint_for_reading(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rebuild", "base", "--output", "again"]) == 2
    err = capfd.readouterr().err
    assert "cannot read base/merge-gate.json: No such file or directory\n  name a published model" in err


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
