"""The kernel's own account of memory, in both of its versions."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from merge_gate.worker.memory import MemoryGroup, give_back, too_large
from tests.support.wording import Wording

GIB = 2**30


def lay(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_version_2(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "proc": "0::/job\n",
            "sys/job/memory.events": "low 0\nhigh 3\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n",
            "sys/job/memory.max": f"{2 * GIB}\n",
            "sys/job/memory.peak": f"{2 * GIB}\n",
        },
    )
    group = MemoryGroup(tmp_path / "proc", tmp_path / "sys")
    assert (group.kills(), group.max_bytes(), group.peak_bytes()) == (1, 2 * GIB, 2 * GIB)


def test_version_1(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "proc": "5:cpu:/\n4:memory:/job\n0::/\n",
            "sys/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
            "sys/memory/job/memory.usage_in_bytes": "1\n",
            "sys/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/memory/job/memory.max_usage_in_bytes": f"{GIB}\n",
        },
    )
    group = MemoryGroup(tmp_path / "proc", tmp_path / "sys")
    assert (group.kills(), group.max_bytes(), group.peak_bytes()) == (4, None, GIB)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    lay(tmp_path, {"proc": "0::/../../job\n", "sys/memory.events": "oom_kill 0\n", "sys/memory.max": "max\n"})
    group = MemoryGroup(tmp_path / "proc", tmp_path / "sys")
    assert (group.kills(), group.max_bytes(), group.peak_bytes()) == (0, None, None)


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
