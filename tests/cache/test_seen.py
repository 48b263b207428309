"""A base's digest is known without reading it only where nothing can have been written since."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from merge_gate.cache import seen
from merge_gate.cache.seal import Seal
from merge_gate.cache.seen import SeenBases
from merge_gate.cache.store import Store
from merge_gate.files.identity import base_identity

DIGEST = {"model.safetensors": "d" * 64}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose files are older than the clock's tick."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"


@pytest.fixture
def bases(tmp_path: Path) -> SeenBases:
    return SeenBases(Store(str(tmp_path / "cache"), Seal(), pytest.fail))


def learn(bases: SeenBases, base: Path, *, later_s: float = 3.0) -> None:
    bases.store(str(base), base_identity(str(base)), DIGEST, time.time_ns() + round(later_s * 1e9))


def known(bases: SeenBases, base: Path) -> dict[str, str] | None:
    return bases.lookup(str(base), base_identity(str(base)))


def test_an_unchanged_base_is_known(bases: SeenBases, base: Path) -> None:
    assert known(bases, base) is None
    learn(bases, base)
    assert known(bases, base) == DIGEST


def test_a_write_that_sets_size_and_time_back_is_seen(bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    file = base / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert known(bases, base) is None


def test_another_file_in_its_place_is_seen(bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    other = base / "other"
    other.write_bytes(b"WEIGHTS")
    other.rename(base / "model.safetensors")
    assert known(bases, base) is None


def test_one_more_file_is_seen(bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    (base / "modeling.py").write_text("")
    assert known(bases, base) is None


def test_files_as_young_as_the_digest_are_not_vouched_for(bases: SeenBases, base: Path) -> None:
    """A write in the same tick of the clock would not show."""
    learn(bases, base, later_s=1.0)
    assert known(bases, base) is None


def test_files_from_the_future_are_not_vouched_for(bases: SeenBases, base: Path) -> None:
    """A clock that was set back could reach that time again."""
    ahead = time.time() + 3600
    os.utime(base / "model.safetensors", (ahead, ahead))
    learn(bases, base)
    assert known(bases, base) is None


@pytest.mark.parametrize("ahead_s", [-3600.0, -3.0, 3.0, 3600.0])
def test_a_clock_that_was_set_makes_every_record_a_miss(
    bases: SeenBases, base: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    learn(bases, base)
    offset_s = seen.clock_offset_s()
    monkeypatch.setattr(seen, "clock_offset_s", lambda: offset_s + ahead_s)
    assert known(bases, base) is None


@pytest.mark.parametrize("start", ["another", None])
def test_another_machine_knows_nothing(
    bases: SeenBases, base: Path, monkeypatch: pytest.MonkeyPatch, start: str | None
) -> None:
    learn(bases, base)
    monkeypatch.setattr(seen, "boot_id", lambda: start)
    assert known(bases, base) is None


def test_fresh_reads_nothing(tmp_path: Path, bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    assert known(SeenBases(Store(str(tmp_path / "cache"), Seal(), pytest.fail), fresh=True), base) is None


def test_a_record_that_is_none_is_a_miss(tmp_path: Path, bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    (name,) = (path.name for path in (tmp_path / "cache" / "bases").iterdir())
    store = Store(str(tmp_path / "cache"), Seal(), pytest.fail)
    good = store.get("bases", name)
    assert good is not None
    short, wrong_type = good | {"sha256": {"model.safetensors": "d"}}, good | {"sha256": {"model.safetensors": 1}}
    of_all, empty = good | {"sha256": "d" * 64}, good | {"sha256": {}}
    for bad in ([], {}, "x", short, wrong_type, of_all, empty, good | {"offset_s": "0"}, good | {"files": None}):
        store.put("bases", name, bad)
        assert known(bases, base) is None
    assert str(base) not in str(good), "a cache that is shared would tell the layout of a machine"


def test_a_base_without_files_is_a_miss(tmp_path: Path, bases: SeenBases, base: Path) -> None:
    learn(bases, base)
    (name,) = (path.name for path in (tmp_path / "cache" / "bases").iterdir())
    store = Store(str(tmp_path / "cache"), Seal(), pytest.fail)
    record = store.get("bases", name)
    assert record is not None
    store.put("bases", name, record | {"files": []})
    assert bases.lookup(str(base), ()) is None


def test_without_a_boot_id_nothing_is_stored_or_found(
    tmp_path: Path, bases: SeenBases, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(bases, base)
    (path,) = (tmp_path / "cache" / "bases").iterdir()
    store = Store(str(tmp_path / "cache"), Seal(), pytest.fail)
    record = store.get("bases", path.name)
    assert record is not None
    store.put("bases", path.name, record | {"machine": None})
    monkeypatch.setattr(seen, "boot_id", lambda: None)
    assert known(bases, base) is None
    path.unlink()
    learn(bases, base)
    assert not path.exists()
