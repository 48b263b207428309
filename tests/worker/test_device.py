"""The device as far as the system's files tell of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_gate.worker.device import cpu_name, has_card


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Xeon: 2.1 GHz\nmodel name\t: other\n", "Xeon: 2.1 GHz"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_processors_name_is_the_systems(text: str | None, name: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path / "cpuinfo") == name


@pytest.mark.parametrize("device", ["nvidia0", "nvidiactl", "nvmap", "dxg", "kfd"])
def test_a_card_shows_by_its_device_files(device: str, tmp_path: Path) -> None:
    (tmp_path / "null").touch()
    assert not has_card(tmp_path)
    (tmp_path / device).touch()
    assert has_card(tmp_path)


def test_where_devices_cannot_be_listed_there_may_be_a_card(tmp_path: Path) -> None:
    assert has_card(tmp_path / "absent")
