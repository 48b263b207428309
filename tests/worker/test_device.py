"""The device as far as the system's files tell of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_gate.worker import sandbox
from merge_gate.worker.device import cpu_name, has_card, why_no_card
from tests.support.wording import Wording


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


@pytest.mark.parametrize("device", ["nvidia0", "nvidiactl", "nvhost-gpu", "nvmap", "nvgpu", "dxg", "kfd"])
def test_a_card_shows_by_its_device_files(device: str, tmp_path: Path) -> None:
    """The sandbox lets the driver open the same files."""
    (tmp_path / "null").touch()
    assert not has_card(tmp_path)
    (tmp_path / device).touch()
    assert has_card(tmp_path)
    assert any((tmp_path / device).match(pattern) for pattern in sandbox._DEVICES)


def test_where_devices_cannot_be_listed_there_may_be_a_card(tmp_path: Path) -> None:
    assert has_card(tmp_path / "absent")


@pytest.mark.parametrize("state", ["driver", "server", "neither"])
def test_what_keeps_the_worker_from_a_card_is_named(state: str, tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "nvidiactl").touch()
    if state != "driver":
        (tmp_path / "nvidia-uvm").touch()
    pipes = tmp_path / "pipes"
    if state == "server":
        pipes.mkdir()
        (pipes / "control").touch()
    why = why_no_card({"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}, tmp_path)
    wording(why.replace(str(tmp_path), "/dev"))
