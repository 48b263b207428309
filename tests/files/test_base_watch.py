"""Bases are hashed once each, and a base that changes makes the verdicts on it void."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.files import base_watch
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.identity import base_identity
from merge_gate.files.resolve import (
    base_setting_files,
    base_weight_files,
    digest_directory,
    digest_files,
    digest_of_digests,
)
from merge_gate.records.files import BaseContent, FileIdentity
from tests.support.judged_entry import based_entry


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return str(tmp_path / "base")


def hashed(base: str, watch: BaseWatch | None = None, *, memory: Memory | None = None) -> BaseWatch:
    watch = watch or BaseWatch()
    watch.remembered = memory
    watch.start(base)
    watch.wait()
    assert not watch.is_hashing
    return watch


class Memory:
    """What an earlier run stored about a base: nothing by default. It is asked before a base is hashed."""

    def __init__(self, lookup: Callable[[], Mapping[str, str] | None] = lambda: None) -> None:
        self._lookup, self.lookups = lookup, 0
        self.stored: list[Mapping[str, str]] = []

    def lookup(self, _directory: str, _identity: tuple[FileIdentity, ...]) -> Mapping[str, str] | None:
        self.lookups += 1
        return self._lookup()

    def store(self, _directory: str, _identity: object, digests: Mapping[str, str], _began_ns: int) -> None:
        self.stored.append(digests)


ZEROS = {"model.safetensors": "0" * 64}


def weights_of(base: str) -> str:
    return digest_directory(base, base_weight_files(base))


def test_the_digests_of_a_base_are_known_once_it_is_hashed(base: str) -> None:
    watch = BaseWatch()
    assert watch.digest(base) is None
    assert watch.content(base) is None
    hashed(base, watch)
    assert watch.digest(base) == weights_of(base)
    settings = digest_directory(base, base_setting_files(base))
    assert watch.content(base) == BaseContent(weights=weights_of(base), settings=settings)


def test_a_base_is_hashed_once(base: str) -> None:
    memory = Memory()
    hashed(base, hashed(base, memory=memory), memory=memory)
    assert memory.lookups == 1


def test_a_watch_is_hashing_until_the_digest_is_known(base: str) -> None:
    may_end, watch = threading.Event(), BaseWatch()
    watch.remembered = Memory(lambda: ZEROS if may_end.wait(60) else None)
    assert not watch.is_hashing
    watch.start(base)
    assert watch.is_hashing
    assert watch.digest(base) is None
    may_end.set()
    watch.wait()
    assert not watch.is_hashing
    assert watch.digest(base) == digest_of_digests(ZEROS)
    assert [(file.path, file.size_bytes, file.sha256) for file in watch.files(base)] == [
        ("model.safetensors", len(b"weights"), "0" * 64)
    ]


def test_a_base_that_changes_after_it_was_hashed_has_no_content(base: str, tmp_path: Path) -> None:
    watch = hashed(base)
    (tmp_path / "base" / "README.md").write_text("not a file of the base")
    assert watch.content(base) is not None
    (tmp_path / "base" / "config.json").write_text('{"dtype": "float16"}')
    assert watch.content(base) is None
    assert watch.digest(base) == weights_of(base)


@pytest.mark.parametrize(
    "config", [json.dumps({"auto_map": {"AutoModel": "acme/code--modeling.Model"}}).encode(), b"{", None]
)
def test_a_base_whose_settings_are_not_all_here_has_no_content(config: bytes | None, base: str, tmp_path: Path) -> None:
    """Code of another repository, a file that is not JSON, and one that is missing."""
    file = tmp_path / "base" / "config.json"
    file.unlink()
    if config is not None:
        file.write_bytes(config)
    watch = hashed(base)
    assert watch.digest(base) == weights_of(base)
    assert watch.content(base) is None


def test_a_base_that_cannot_be_hashed_has_no_digest(base: str, tmp_path: Path) -> None:
    (tmp_path / "base" / "model.safetensors").unlink()
    watch = hashed(base)
    assert watch.digest(base) is None
    assert watch.content(base) is None
    assert hashed(str(tmp_path / "gone")).digest(str(tmp_path / "gone")) is None


def test_without_a_thread_the_run_goes_on_without_the_digest(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert hashed(base).digest(base) is None


def test_a_remembered_base_is_not_hashed_again(base: str) -> None:
    memory = Memory(lambda: ZEROS)
    watch = hashed(base, memory=memory)
    assert watch.digest(base) == digest_of_digests(ZEROS)
    assert watch.content(base) is not None
    assert memory.stored == []


def test_a_digest_is_remembered(base: str) -> None:
    memory = Memory()
    assert hashed(base, memory=memory).digest(base) == weights_of(base)
    assert memory.stored == [digest_files(base, base_weight_files(base))]


def test_a_digest_of_files_that_changed_is_not_remembered(base: str) -> None:
    memory = Memory(lambda: Path(base, "model.safetensors").write_bytes(b"other weights") and None)
    watch = hashed(base, memory=memory)
    assert watch.digest(base) == weights_of(base)
    assert memory.stored == []
    assert watch.content(base) is None


def test_a_base_whose_mount_gives_no_more_bytes_has_no_digest(base: str) -> None:
    never, watch = threading.Event(), BaseWatch(silence_timeout_s=0.05)
    watch.remembered = Memory(lambda: never.wait() and None)
    watch.start(base)
    watch.wait()
    assert watch.digest(base) is None
    assert not watch.is_silent(base), "only the comparison at the end decides about verdicts"
    never.set()


def test_slow_bytes_are_waited_for(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_slowly(_directory: str, names: tuple[str, ...], on_read: Callable[[], object]) -> dict[str, str]:
        for _ in range(30 if "model.safetensors" in names else 0):
            on_read()
            time.sleep(0.05)
        return ZEROS

    monkeypatch.setattr(base_watch.resolve, "digest_files", hash_slowly)
    assert hashed(base, BaseWatch(silence_timeout_s=0.5)).digest(base) == digest_of_digests(ZEROS)


TASKS = (7, 8)


def load(watch: BaseWatch, base: str) -> None:
    """The worker reads the base as it is now."""
    watch.loaded(base, base_identity(base), TASKS)


def touch(base: str) -> None:
    os.utime(Path(base, "model.safetensors"), ns=(1, 1))


def test_a_base_that_stays_the_same_voids_nothing(base: str) -> None:
    watch = BaseWatch()
    assert not watch.is_unchanged(7), "it was not loaded"
    load(watch, base)
    assert watch.is_unchanged(7)
    assert watch.void() == {}, "without a digest the identities are compared"
    hashed(base, watch)
    load(watch, base)
    assert watch.is_unchanged(7)
    assert watch.void() == {}


CHANGES: dict[str, Callable[[BaseWatch, str], object]] = {
    "before it is loaded": lambda watch, base: (hashed(base, watch), touch(base), load(watch, base)),
    "after it was loaded": lambda watch, base: (load(watch, base), hashed(base, watch), touch(base)),
    "between load and hash": lambda watch, base: (load(watch, base), touch(base), hashed(base, watch)),
    "between two loads": lambda watch, base: (load(watch, base), touch(base), load(watch, base), hashed(base, watch)),
    "by one file less": lambda watch, base: (
        load(watch, base),
        hashed(base, watch),
        Path(base, "config.json").unlink(),
    ),
    "by its removal": lambda watch, base: (load(watch, base), hashed(base, watch), shutil.rmtree(base)),
    "without a digest": lambda watch, base: (load(watch, base), touch(base)),
}


@pytest.mark.parametrize("when", CHANGES)
def test_a_base_that_changes_voids_the_verdicts_on_it(base: str, when: str) -> None:
    watch = BaseWatch()
    CHANGES[when](watch, base)
    assert not watch.is_unchanged(7)
    assert watch.void() == {base: [*TASKS]}


def test_a_cached_verdict_is_void_too(base: str) -> None:
    watch = hashed(base)
    watch.reused(base, 3)
    assert watch.is_unchanged(3)
    assert watch.void() == {}
    touch(base)
    assert watch.void() == {base: [3]}


def test_a_load_of_other_files_voids_its_own_verdicts_only(base: str) -> None:
    watch = hashed(base)
    load(watch, base)
    watch.loaded(base, (), (9,))
    assert watch.void() == {base: [9]}


def test_an_entry_without_a_base_is_a_bug(tmp_path: Path) -> None:
    one = based_entry(tmp_path)
    assert base_directory(one) == str(tmp_path / "base")
    with pytest.raises(AssertionError):
        base_directory(replace(one, base=None))


def sha256_of(base: str) -> dict[str, str]:
    return {"model.safetensors": hashlib.sha256(Path(base, "model.safetensors").read_bytes()).hexdigest()}


def test_a_base_whose_bytes_passed_is_not_hashed_again(base: str) -> None:
    weights = weights_of(base)
    watch = BaseWatch()
    watch.read_whole(base, base_identity(base), sha256_of(base))
    watch.remembered = Memory(pytest.fail)
    watch.start(base)
    watch.wait()
    assert watch.digest(base) == weights
    watch.loaded(base, base_identity(base), [1])
    assert watch.void() == {}
    Path(base, "config.json").write_text("{ }")
    assert watch.void() == {base: [1]}


def test_digests_of_files_that_are_gone_do_not_count(base: str) -> None:
    watch = BaseWatch()
    identity, digests = base_identity(base), sha256_of(base)
    Path(base, "model.safetensors").unlink()
    watch.read_whole(base, identity, digests)
    assert watch.digest(base) is None


def test_a_streamed_base_has_a_digest_when_its_bytes_passed(base: str) -> None:
    weights, digests = weights_of(base), sha256_of(base)
    watch = BaseWatch()
    watch.listed(base, base_identity(base), digests)
    watch.start(base)
    assert not watch.is_hashing
    content = watch.content(base)
    assert content.weights == weights
    assert watch.digest(base) is None
    watch.read_whole(base, base_identity(base), {"model.safetensors": "0" * 64})
    assert watch.digest(base) is None, "other bytes than the Hub lists"
    watch.read_whole(base, base_identity(base), digests)
    assert watch.digest(base) == weights


def test_a_cached_verdict_on_a_streamed_base_names_its_digest(base: str) -> None:
    watch = BaseWatch()
    watch.listed(base, base_identity(base), sha256_of(base))
    watch.reused(base, 0)
    assert watch.digest(base) == weights_of(base)
    assert watch.void() == {}
    assert watch.is_only_listed(base), "its bytes have not passed"
