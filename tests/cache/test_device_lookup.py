"""The device that a run would merge on: known without torch if there is no card, or an earlier run stored it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_gate.cache import device_lookup
from merge_gate.cache.device_lookup import KnownDevices
from tests.support.cache.caches import CARD, CPU
from tests.support.cache.store_writes import store as open_store


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that may have a card."""
    monkeypatch.setattr(device_lookup, "has_card", lambda: True)


def known(place: Path, requested: str = "cuda", **environ: str) -> KnownDevices:
    return KnownDevices(requested, open_store(place), environ)


def test_a_processor_is_known_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lookup, "has_card", lambda: False)
    for requested in ("cpu", "auto"):
        found = KnownDevices(requested, None, {}).lookup()
        assert found is not None
        assert (found.device, found.in_key) == ("cpu", "cpu")
    assert KnownDevices("cuda", None, {}).lookup() is None


def test_a_processor_is_not_stored(tmp_path: Path) -> None:
    known(tmp_path, "cpu").store(CPU)
    assert not [*(tmp_path / "cache" / "devices").iterdir()]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_stored_card_is_known_until_the_machine_restarts(
    tmp_path: Path, requested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known(tmp_path, requested).lookup() is None
    known(tmp_path, requested).store(CARD)
    assert known(tmp_path, requested).lookup() == CARD
    assert CARD.in_key == "a card"
    assert known(tmp_path, "cuda:1").lookup() is None
    assert known(tmp_path, requested, CUDA_VISIBLE_DEVICES="1").lookup() is None
    for torch in ("another release", None):
        with monkeypatch.context() as other:
            other.setattr(device_lookup, "libraries", lambda version=torch: {"torch": version})
            assert known(tmp_path, requested).lookup() is None
    monkeypatch.setattr(device_lookup, "boot_id", lambda: "another start")
    assert known(tmp_path, requested).lookup() is None
    monkeypatch.setattr(device_lookup, "boot_id", lambda: None)
    known(tmp_path, requested).store(CARD)
    assert known(tmp_path, requested).lookup() is None, "one start cannot be told from another"


@pytest.mark.parametrize("document", [{"device": 1, "name": "a card"}, {"device": "cuda"}, []])
def test_a_damaged_record_is_a_miss(tmp_path: Path, document: object) -> None:
    known(tmp_path).store(CARD)
    (name,) = (path.name for path in (tmp_path / "cache" / "devices").iterdir())
    open_store(tmp_path).put("devices", name, document)
    assert known(tmp_path).lookup() is None


@pytest.mark.parametrize("content", ["\n", None])
def test_a_system_without_a_boot_id(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_lookup.boot_id(), "this machine has one"
    if content is not None:
        (tmp_path / "boot_id").write_text(content)
    monkeypatch.setattr(device_lookup, "Path", lambda _: tmp_path / "boot_id")
    assert device_lookup.boot_id() is None
