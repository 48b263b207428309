"""What the container gets besides its description: a token by standard input, and proofs of its mounts and GPUs."""

import io
import re
from pathlib import Path

import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import handover
from tests.support.wording import Wording


def test_what_is_written_is_read() -> None:
    variables = {"HF_TOKEN": "hf_x", "HTTPS_PROXY": "http://user:pässword\n@proxy"}
    line = handover.written(variables)
    assert line.count(b"\n") == 1
    stream = io.BytesIO(line + b"more")
    assert handover.read({handover.MARKER: "1"}, stream) == variables
    assert stream.read() == b"more"


def test_nothing_promised_nothing_read() -> None:
    stream = io.BytesIO(b'{"HF_TOKEN": "x"}\n')
    assert handover.read({}, stream) == {}
    assert stream.tell() == 0


@pytest.mark.parametrize("data", [b"", b'{"HF_TO', b"[]\n", b"\xff\n"])
def test_a_line_that_does_not_come_is_an_error(data: bytes, wording: Wording) -> None:
    with wording.of(LauncherError) as raised:
        handover.read({handover.MARKER: "1"}, io.BytesIO(data))
    assert raised.value.hint


def test_a_line_that_would_not_fit_is_not_sent(wording: Wording) -> None:
    with wording.of(LauncherError):
        handover.written({"HF_TOKEN": "x" * 100_000})


def test_canaries_that_are_there(tmp_path: Path) -> None:
    first, second = handover.plant(tmp_path), handover.plant(tmp_path)
    assert first.read_text() != second.read_text()
    assert handover.verify(handover.expectations({first: first, second: second}, ""), tmp_path) == []
    assert handover.verify({"PATH": "/bin"}, tmp_path) == [], "nothing is asked by hand"


@pytest.mark.parametrize("change", ["gone", "other", "directory"])
def test_a_mount_that_is_not_the_one(tmp_path: Path, change: str, wording: Wording) -> None:
    planted = handover.plant(tmp_path)
    expected = handover.expectations({planted: planted}, "")
    planted.unlink()
    if change == "other":
        planted.write_text("other", encoding="utf-8")
    if change == "directory":
        planted.mkdir()
    with pytest.raises(LauncherError) as raised:
        handover.verify(expected, tmp_path)
    wording(re.sub(r"canary-\w+", "canary-<random>", f"{raised.value.message}\n{raised.value.hint}"))


@pytest.mark.parametrize("name", ["nvidia0", "nvidia15", "nvhost-gpu", "dxg"])
def test_a_gpu_that_was_asked_for(tmp_path: Path, name: str, wording: Wording) -> None:
    expected = handover.expectations({}, "all")
    (tmp_path / "nvme0n1").touch()
    with wording.of(LauncherError):
        handover.verify(expected, tmp_path)
    (tmp_path / name).touch()
    assert handover.verify(expected, tmp_path) == [str(tmp_path / name)]
    assert handover.verify(handover.expectations({}, ""), tmp_path) == [], "not asked for, not looked at"


@pytest.mark.parametrize(
    ("asked", "there", "enough"),
    [
        ("0,1", ["nvidia0"], False),
        ("0,1", ["nvidia0", "nvidia1", "nvidiactl"], True),
        ("GPU-1,GPU-2", ["nvidia3", "nvidiactl"], False),
        ("all", ["nvidia0"], True),
        ("nvidia.com/gpu=all", ["nvidia0"], True),
        ("nvidia.com/gpu=0,nvidia.com/gpu=1", ["nvidia0"], False),
        ("MIG-1,MIG-2", ["nvidia0"], True),
        ("0,1", ["nvhost-gpu"], True),
    ],
)
def test_the_gpus_that_were_asked_for_are_counted(tmp_path, asked, there, enough, wording) -> None:
    for name in there:
        (tmp_path / name).touch()
    expected = handover.expectations({}, asked)
    if enough:
        assert len(handover.verify(expected, tmp_path)) == len(there)
    else:
        with wording.of(LauncherError):
            handover.verify(expected, tmp_path)
