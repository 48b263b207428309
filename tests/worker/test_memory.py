"""What the system's files tell of memory, in both versions of the kernel's account, and of the device."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from merge_gate.worker import sandbox
from merge_gate.worker.device import OF_DRIVERS, cpu_name, has_card, why_no_card
from merge_gate.worker.memory import MemoryGroup, give_back, too_large
from tests.support.wording import Wording

GIB = 2**30


def lay(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "kills", "max_bytes", "peak_bytes"),
    [
        (
            {
                "proc": "0::/job\n",
                "sys/job/memory.events": "low 0\nhigh 3\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n",
                "sys/job/memory.max": f"{2 * GIB}\n",
                "sys/job/memory.peak": f"{2 * GIB}\n",
            },
            1,
            2 * GIB,
            2 * GIB,
        ),
        (
            {
                "proc": "5:cpu:/\n4:memory:/job\n0::/\n",
                "sys/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
                "sys/memory/job/memory.usage_in_bytes": "1\n",
                "sys/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/memory/job/memory.max_usage_in_bytes": f"{GIB}\n",
            },
            4,
            None,
            GIB,
        ),
        ({"proc": "0::/../../job\n", "sys/memory.events": "oom_kill 0\n", "sys/memory.max": "max\n"}, 0, None, None),
    ],
    ids=["version 2", "version 1", "a container, which sees its own group as the root"],
)
def test_the_kernels_account(files, kills, max_bytes, peak_bytes, tmp_path) -> None:
    lay(tmp_path, files)
    group = MemoryGroup(tmp_path / "proc", tmp_path / "sys")
    assert (group.kills(), group.max_bytes(), group.peak_bytes()) == (kills, max_bytes, peak_bytes)


@pytest.mark.parametrize("text", [None, "", "0::/\n", "4:memory:/x\n", "5:cpu:/x\n"])
def test_where_the_system_does_not_tell_nothing_is_known(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "proc").write_text(text)
    group = MemoryGroup(tmp_path / "proc", tmp_path / "sys")
    assert (group.kills(), group.max_bytes(), group.peak_bytes()) == (None, None, None)


@pytest.mark.parametrize(("limit", "free"), [(None, 3 * GIB), (2 * GIB, 2 * GIB), (4 * GIB, 3 * GIB)])
def test_what_is_free_is_the_smaller_of_machine_and_group(limit: int | None, free: int, tmp_path: Path) -> None:
    lay(tmp_path, {"proc": "0::/\n", "meminfo": f"MemTotal: 9 kB\nMemAvailable:   {3 * GIB // 1024} kB\n"})
    lay(tmp_path, {"sys/memory.events": "oom_kill 0\n", "sys/memory.max": f"{limit or 'max'}\n"})
    assert MemoryGroup(tmp_path / "proc", tmp_path / "sys", tmp_path / "meminfo").free_bytes() == free
    assert MemoryGroup(tmp_path / "none", tmp_path / "none", tmp_path / "none").free_bytes() is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.events": "", "memory.max": f"{2 * GIB}\n", "memory.stat": f"anon {GIB}\nfile 7\nshmem 5\n"}, GIB - 5),
        ({"memory.events": "", "memory.max": f"{8 * GIB}\n", "memory.stat": f"anon {GIB}\nshmem 0\n"}, 3 * GIB),
        ({"memory.events": "", "memory.max": f"{2 * GIB}\n", "memory.stat": f"anon {3 * GIB}\nshmem 0\n"}, 0),
        ({"memory.events": "", "memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ({"memory.events": "", "memory.max": "max\n", "memory.stat": f"anon {GIB}\n"}, 3 * GIB),
    ],
    ids=["of its limit", "of the machine", "none", "unknown use", "no limit"],
)
def test_what_is_left_is_what_the_group_has_not_taken(files: dict[str, str], left: int, tmp_path: Path) -> None:
    lay(tmp_path, {"proc": "0::/\n", "meminfo": f"MemAvailable:   {3 * GIB // 1024} kB\n"})
    lay(tmp_path, {f"sys/{name}": text for name, text in files.items()})
    assert MemoryGroup(tmp_path / "proc", tmp_path / "sys", tmp_path / "meminfo").left_bytes() == left
    assert MemoryGroup(tmp_path / "none", tmp_path / "none", tmp_path / "none").left_bytes() is None


def test_what_is_left_in_version_1(tmp_path: Path) -> None:
    stat = f"cache 9\ntotal_rss {GIB}\ntotal_shmem 3\n"
    files = {"memory.usage_in_bytes": "1", "memory.limit_in_bytes": f"{2 * GIB}", "memory.stat": stat}
    lay(tmp_path, {"proc": "4:memory:/job\n"} | {f"sys/memory/job/{name}": text for name, text in files.items()})
    assert MemoryGroup(tmp_path / "proc", tmp_path / "sys", tmp_path / "none").left_bytes() == GIB - 3


def test_a_base_that_may_not_fit_is_named_before_it_is_loaded(wording: Wording) -> None:
    wording(too_large("acme/base", 2000, 1999))
    assert too_large("acme/base", 2000, 2000) is None
    assert too_large("acme/base", 2000, None) is None


@pytest.mark.parametrize("can", [True, False])
def test_pages_are_given_back_where_the_libc_can(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    libc = SimpleNamespace(malloc_trim=asked.append) if can else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    give_back()
    assert asked == ([0] if can else [])


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
    assert any((tmp_path / device).match(pattern) for pattern in sandbox.DEVICES)


def test_where_devices_cannot_be_listed_there_may_be_a_card(tmp_path: Path) -> None:
    assert has_card(tmp_path / "absent")


@pytest.mark.parametrize("state", ["driver", "server", "calls", "off", "none"])
def test_what_keeps_the_worker_from_a_card_is_named(state: str, tmp_path: Path, wording: Wording) -> None:
    if state != "none":
        (tmp_path / "nvidiactl").touch()
    if state != "driver":
        (tmp_path / "nvidia-uvm" if state != "none" else tmp_path / "null").touch()
    pipes = tmp_path / "pipes"
    if state == "server":
        pipes.mkdir()
        (pipes / "control").touch()
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), sandbox.SWITCH: "off" if state == "off" else ""}
    why = why_no_card(environ, tmp_path)
    assert set(OF_DRIVERS) <= sandbox._REFUSED.keys()
    wording(why.replace(str(tmp_path), "/dev"))
