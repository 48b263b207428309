"""What earlier runs found out holds for the same machine, files, bytes, code, and dtype, and for nothing else."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_gate.features.cache import remembered
from merge_gate.features.cache.remembered import StoredDevices, StoredDigests, boot_id
from merge_gate.files.identity import base_identity
from merge_gate.worker.device import has_card
from merge_gate.worker.protocol import DeviceChosen
from tests.support.cache.store_writes import store as open_store

CPU = DeviceChosen(device="cpu", device_name="a CPU")
CARD = DeviceChosen(device="cuda", device_name="a card")

# --- devices ---------------------------------------------------------------------------------------------------------


BOOT = "a start of this machine"


def known_devices(place: Path, requested: str = "cuda", boot: str | None = BOOT, **environ: str) -> StoredDevices:
    return StoredDevices(requested, open_store(place), boot, environ)


def test_a_processor_is_known_without_a_document(tmp_path: Path) -> None:
    found = known_devices(tmp_path, "cpu").lookup()
    assert found.device == "cpu"
    assert known_devices(tmp_path, "auto").lookup() == (None if has_card() else found)
    assert known_devices(tmp_path).lookup() is None


def test_a_processor_is_not_stored(tmp_path: Path) -> None:
    known_devices(tmp_path, "cpu").store(CPU)
    assert not [*(tmp_path / "cache" / "devices").iterdir()]


def test_a_stored_card_is_known_until_the_machine_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_devices(tmp_path).lookup() is None
    known_devices(tmp_path).store(CARD)
    assert known_devices(tmp_path).lookup() == CARD
    assert known_devices(tmp_path, "cuda:1").lookup() is None
    assert known_devices(tmp_path, boot="another start").lookup() is None
    assert known_devices(tmp_path, CUDA_VISIBLE_DEVICES="1").lookup() is None
    known_devices(tmp_path, boot=None).store(CARD)
    assert known_devices(tmp_path, boot=None).lookup() is None, "one start cannot be told from another"
    for version in ("another release", None):
        monkeypatch.setattr(remembered, "libraries", lambda version=version: {"torch": version})
        assert known_devices(tmp_path).lookup() is None


@pytest.mark.parametrize("document", [{"device": 1, "name": "a card"}, {"device": "cuda"}, []])
def test_a_damaged_record_is_a_miss(tmp_path: Path, document: object) -> None:
    known_devices(tmp_path).store(CARD)
    (name,) = (path.name for path in (tmp_path / "cache" / "devices").iterdir())
    open_store(tmp_path).put("devices", name, document)
    assert known_devices(tmp_path).lookup() is None


@pytest.mark.parametrize("content", ["\n", None])
def test_a_system_without_a_boot_id(content: str | None, tmp_path: Path) -> None:
    assert boot_id(), "this machine has one"
    if content is not None:
        (tmp_path / "boot_id").write_text(content)
    assert boot_id(tmp_path / "boot_id") is None


# --- digests of bases ------------------------------------------------------------------------------------------------

DIGEST = {"model.safetensors": "d" * 64}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose files are older than the clock's tick."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"


@pytest.fixture
def bases(tmp_path: Path) -> StoredDigests:
    return StoredDigests(open_store(tmp_path), BOOT)


def learn(bases: StoredDigests, base: Path, *, later_s: float = 3.0) -> None:
    bases.store(str(base), base_identity(str(base)), DIGEST, time.time_ns() + round(later_s * 1e9))


def digests_of(bases: StoredDigests, base: Path) -> dict[str, str] | None:
    return bases.lookup(str(base), base_identity(str(base)))


def test_an_unchanged_base_is_known(bases: StoredDigests, base: Path) -> None:
    assert digests_of(bases, base) is None
    learn(bases, base)
    assert digests_of(bases, base) == DIGEST


def write_and_set_back(base: Path) -> None:
    """Size and time are as before."""
    file = base / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def exchange(base: Path) -> None:
    (base / "other").write_bytes(b"WEIGHTS")
    (base / "other").rename(base / "model.safetensors")


def add(base: Path) -> None:
    (base / "modeling.py").write_text("")


@pytest.mark.parametrize("change", [write_and_set_back, exchange, add])
def test_a_change_is_seen(change: Callable[[Path], None], bases: StoredDigests, base: Path) -> None:
    learn(bases, base)
    change(base)
    assert digests_of(bases, base) is None


@pytest.mark.parametrize(("later_s", "ahead_s"), [(1.0, 0.0), (3.0, 3600.0)])
def test_young_files_are_not_vouched_for(later_s: float, ahead_s: float, bases: StoredDigests, base: Path) -> None:
    """A write in the same tick of the clock would not show, and a clock that was set back could reach a later time."""
    now = time.time() + ahead_s
    os.utime(base / "model.safetensors", (now, now))
    learn(bases, base, later_s=later_s)
    assert digests_of(bases, base) is None


@pytest.mark.parametrize("ahead_s", [-3600.0, -3.0, 0.0, 3.0, 3600.0])
def test_a_clock_that_was_set_makes_every_record_a_miss(
    tmp_path: Path, bases: StoredDigests, base: Path, ahead_s: float
) -> None:
    learn(bases, base)
    name, record = stored_record(tmp_path)
    open_store(tmp_path).put("bases", name, record | {"offset_s": record["offset_s"] + ahead_s})
    assert digests_of(bases, base) == (None if ahead_s else DIGEST)


def test_another_machine_or_a_fresh_run_knows_nothing(tmp_path: Path, bases: StoredDigests, base: Path) -> None:
    learn(bases, base)
    for boot, fresh in (("another", False), (None, False), (BOOT, True)):
        assert digests_of(StoredDigests(open_store(tmp_path), boot, fresh=fresh), base) is None


def stored_record(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    (name,) = (path.name for path in (tmp_path / "cache" / "bases").iterdir())
    record = open_store(tmp_path).get("bases", name)
    assert isinstance(record, dict)
    return name, record


def test_a_record_that_is_none_is_a_miss(tmp_path: Path, bases: StoredDigests, base: Path) -> None:
    learn(bases, base)
    name, good = stored_record(tmp_path)
    short, wrong_type = good | {"sha256": {"model.safetensors": "d"}}, good | {"sha256": {"model.safetensors": 1}}
    of_all, empty = good | {"sha256": "d" * 64}, good | {"sha256": {}}
    for bad in ([], {}, "x", short, wrong_type, of_all, empty, good | {"offset_s": "0"}, good | {"files": None}):
        open_store(tmp_path).put("bases", name, bad)
        assert digests_of(bases, base) is None
    open_store(tmp_path).put("bases", name, good | {"files": []})
    assert bases.lookup(str(base), ()) is None, "a base without files"
    assert str(base) not in str(good), "a cache that is shared would tell the layout of a machine"


def test_without_a_boot_id_nothing_is_stored_or_found(tmp_path: Path, bases: StoredDigests, base: Path) -> None:
    nowhere = StoredDigests(open_store(tmp_path), None)
    learn(nowhere, base)
    assert not [*(tmp_path / "cache" / "bases").iterdir()]
    learn(bases, base)
    name, record = stored_record(tmp_path)
    open_store(tmp_path).put("bases", name, record | {"machine": None})
    assert digests_of(nowhere, base) is None
