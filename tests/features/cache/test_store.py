"""The cache directory attacked: what is not whole and not ours is not there."""

import os
import time
from pathlib import Path

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate.features.cache.store import ABANDONED_S, LONGEST_BYTES, Seal, Store
from tests.support.cache.store_writes import NAME, OTHER, kill_while_writing, store
from tests.support.wording import Wording

DOCUMENT = {"verdict": "failed", "figures": [1, 2.5, None]}
SECRET = "s" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a document that was kept."""
    store(tmp_path).put("verdicts", NAME, DOCUMENT)
    return tmp_path / "cache" / "verdicts" / NAME


def test_what_was_put_is_there(tmp_path: Path, file: Path) -> None:
    assert store(tmp_path).get("verdicts", NAME) == DOCUMENT
    assert [path.name for path in file.parent.iterdir()] == [NAME], "something unfinished was left"
    assert not store(tmp_path).is_empty("verdicts")
    assert store(tmp_path).is_empty("bases")


def test_every_truncation_is_a_miss(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert store(tmp_path).get("verdicts", NAME) is None, length


def test_every_changed_byte_is_a_miss(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert store(tmp_path).get("verdicts", NAME) is None, position


def test_a_renamed_document_is_a_miss(tmp_path: Path, file: Path) -> None:
    file.rename(file.with_name(OTHER))
    assert store(tmp_path).get("verdicts", OTHER) is None
    file.with_name(OTHER).rename(tmp_path / "cache" / "bases" / NAME)
    assert store(tmp_path).get("bases", NAME) is None


@pytest.mark.attempt("C03a", "a cached verdict is a link", "a miss, and the link is not written through")
def test_a_link_is_a_miss_wherever_it_leads(tmp_path: Path, file: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert store(tmp_path).get("verdicts", NAME) is None
    store(tmp_path).put("verdicts", NAME, {"verdict": "passed"})
    assert b"failed" in elsewhere.read_bytes(), "it was written through a link"
    assert not file.is_symlink()


@pytest.mark.attempt("C03b", "a folder of the cache is a link", "exit 2")
@pytest.mark.parametrize("kind", ["verdicts", "bases"])
def test_a_kind_that_is_a_link_or_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    if kind == "verdicts":
        (tmp_path / "cache" / kind).symlink_to(tmp_path)
    else:
        (tmp_path / "cache" / kind).touch()
    with pytest.raises(UsageError, match=str(tmp_path / "cache")):
        store(tmp_path)


@pytest.mark.attempt("C03c", "a cached verdict is a pipe, a directory, or too large", "a miss, no hang")
@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a file that is too large"])
def test_what_is_no_plain_small_file_is_a_miss(tmp_path: Path, file: Path, kind: str) -> None:
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a directory":
        file.mkdir()
    else:
        with file.open("wb") as hole:
            hole.truncate(LONGEST_BYTES + 1)
    began = time.monotonic()
    assert store(tmp_path).get("verdicts", NAME) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a": 1, "a": 2}', b"NaN", b"\xff", b"", b'{"a": 1'])
def test_what_is_sealed_and_no_json_is_a_miss(tmp_path: Path, file: Path, body: bytes) -> None:
    file.write_bytes(Seal().of("verdicts", NAME, body).encode() + b"\n" + body)
    assert store(tmp_path).get("verdicts", NAME) is None


def test_a_name_cannot_lead_out(tmp_path: Path, file: Path) -> None:
    (tmp_path / NAME).write_bytes(file.read_bytes())
    for name in (f"../../{NAME}", str(tmp_path / NAME), "", ".", NAME.upper()):
        assert store(tmp_path).get("verdicts", name) is None


@pytest.mark.attempt("C01b", "a verdict under another secret, or none", "a miss")
def test_another_secret_or_none_is_a_miss(tmp_path: Path, file: Path) -> None:
    assert store(tmp_path, SECRET).get("verdicts", NAME) is None, "a forged document passed for one with a secret"
    store(tmp_path, SECRET).put("verdicts", NAME, DOCUMENT)
    assert store(tmp_path, SECRET).get("verdicts", NAME) == DOCUMENT
    assert store(tmp_path, "t" * 32).get("verdicts", NAME) is None
    assert store(tmp_path).get("verdicts", NAME) is None
    assert SECRET.encode() not in file.read_bytes()


@pytest.mark.attempt("C05", "a short secret", "exit 2")
def test_a_short_secret_is_refused(wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        Seal("secret")
    wording(caught.value)


def test_a_directory_that_cannot_be_is_a_usage_error(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match=str(tmp_path / "cache")) as caught:
        store(tmp_path)
    wording(caught.value)


def test_a_full_disk_is_reported_once_and_costs_no_verdict(tmp_path: Path) -> None:
    notes: list[str] = []
    there = Store(str(tmp_path / "cache"), Seal(), notes.append)
    there.close()
    (tmp_path / "cache" / "verdicts").rmdir()
    for name in (NAME, OTHER):
        there.put("verdicts", name, DOCUMENT)
    assert len(notes) == 1


def test_without_permission_to_write_one_note_is_reported(wording: Wording) -> None:
    notes: list[str] = []
    cache = Store("/proc/self", Seal(""), notify=notes.append)  # no user can make a directory there
    assert cache.is_empty("verdicts")
    assert cache.get("verdicts", NAME) is None
    for _ in range(2):
        cache.put("verdicts", NAME, DOCUMENT)
    cache.tidy()
    cache.close()
    (note,) = notes
    assert "/proc/self: Permission denied" in note
    wording(note)


def test_what_killed_runs_have_left_is_removed_after_a_day(tmp_path: Path, file: Path) -> None:
    old, young = file.with_name(f".{NAME}.{'1' * 16}.tmp"), file.with_name(f".{NAME}.{'2' * 16}.tmp")
    users = file.with_name(".gitkeep")
    for path in (old, young, users):
        path.write_text("half")
    for path in (old, users):
        os.utime(path, (0, time.time() - ABANDONED_S - 60))
    store(tmp_path).tidy()
    assert not old.exists()
    assert young.exists(), "another run may be writing it"
    assert users.exists(), "the directory may be one of the user's, of the same name"
    assert file.exists()


def test_a_kill_while_writing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    store(tmp_path).put("verdicts", NAME, {"turn": -1, "same": -1})  # a slow writer is killed before its first one
    for turn in range(10):
        found = kill_while_writing(tmp_path, 0.02 + 0.0013 * turn)
        assert isinstance(found, dict)
        assert found["turn"] == found["same"]
