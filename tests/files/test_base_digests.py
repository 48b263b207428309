"""Digests of bases, taken beside the run: each once, of files that stay, and none where it cannot be taken."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from merge_gate.files import base_digests
from merge_gate.files.base_digests import BaseDigests
from merge_gate.files.identity import base_identity
from merge_gate.files.resolve import base_setting_files, base_weight_files, digest_directory
from merge_gate.records.files import BaseContent

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.files import FileIdentity


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return str(tmp_path / "base")


def taken(base: str, digests: BaseDigests | None = None) -> BaseDigests:
    digests = digests or BaseDigests()
    digests.start(base)
    digests.wait()
    return digests


class Memory:
    """What an earlier run has learned of one base, or nothing."""

    def __init__(self, digest: str | None = None) -> None:
        self.digest = digest
        self.told: list[str] = []

    def known(self, _directory: str, _identity: tuple[FileIdentity, ...]) -> str | None:
        return self.digest

    def learned(self, _directory: str, _identity: tuple[FileIdentity, ...], digest: str, _began_ns: int) -> None:
        self.told.append(digest)


def weights_of(base: str) -> str:
    return digest_directory(base, base_weight_files(base))


def test_it_is_that_of_the_weights_and_known_once_it_is_taken(base: str) -> None:
    digests = BaseDigests()
    assert digests.of(base) is None
    assert digests.content(base) is None
    assert not digests.holds(base)
    taken(base, digests)
    assert digests.of(base) == weights_of(base)
    assert digests.holds(base)


def test_what_lies_beside_the_weights_may_change(base: str, tmp_path: Path) -> None:
    (tmp_path / "base" / "README.md").write_text("before")
    digests = taken(base)
    (tmp_path / "base" / "README.md").write_text("after it was hashed")
    assert digests.holds(base)


def test_it_is_taken_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(base_digests, "base_identity", lambda directory: calls.append(directory) or ())
    taken(base, taken(base))
    assert calls == [base]


def test_the_settings_are_read_once_and_belong_to_it(base: str, tmp_path: Path) -> None:
    digests = taken(base)
    settings = digest_directory(base, base_setting_files(base))
    assert digests.content(base) == BaseContent(weights=weights_of(base), settings=settings)
    (tmp_path / "base" / "config.json").write_text('{"dtype": "float16"}')
    assert digests.content(base) == BaseContent(weights=weights_of(base), settings=settings)


@pytest.mark.parametrize(
    "config", [json.dumps({"auto_map": {"AutoModel": "acme/code--modeling.Model"}}).encode(), b"{", None]
)
def test_settings_that_are_not_all_here_leave_no_digest_of_them(
    config: bytes | None, base: str, tmp_path: Path
) -> None:
    """Code of another repository, a file that is no JSON, and one that is gone."""
    file = tmp_path / "base" / "config.json"
    file.unlink()
    if config is not None:
        file.write_bytes(config)
    digests = taken(base)
    assert digests.of(base) == weights_of(base)
    assert digests.content(base) is None


def test_a_base_that_cannot_be_hashed_has_none(base: str, tmp_path: Path) -> None:
    (tmp_path / "base" / "model.safetensors").unlink()
    digests = taken(base)
    assert digests.of(base) is None
    assert taken(str(tmp_path / "gone")).of(str(tmp_path / "gone")) is None


def test_without_a_thread_the_run_goes_on_without_it(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert taken(base).of(base) is None


def test_what_an_earlier_run_knows_is_not_hashed_again(base: str) -> None:
    known = Memory("d" * 64)
    assert taken(base, BaseDigests(known)).of(base) == "d" * 64
    assert known.told == []


def test_what_is_learned_is_told_to_later_runs(base: str) -> None:
    memory = Memory()
    assert taken(base, BaseDigests(memory)).of(base) == weights_of(base)
    assert memory.told == [weights_of(base)]


def test_a_digest_of_files_that_changed_meanwhile_is_told_to_nobody(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_hash(directory: str, names: tuple[str, ...]) -> str:
        (tmp_path / "base" / "model.safetensors").write_bytes(b"other weights")
        return digest_directory(directory, names)

    monkeypatch.setattr(base_digests.resolve, "digest_directory", write_and_hash)
    memory = Memory()
    digests = taken(base, BaseDigests(memory))
    assert memory.told == []
    assert not digests.holds(base)


def test_whether_it_is_of_the_files_that_were_loaded(base: str, tmp_path: Path) -> None:
    loaded = base_identity(base)
    assert BaseDigests().is_of(base, loaded), "without a digest there is nothing to compare"
    digests = taken(base)
    assert digests.is_of(base, loaded)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"others")
    assert not digests.is_of(base, loaded)
    assert not digests.is_of(base, base_identity(base))
    for file in (tmp_path / "base").iterdir():
        file.unlink()
    (tmp_path / "base").rmdir()
    assert not digests.is_of(base, loaded)
    assert not BaseDigests().is_of(base, loaded)
