"""Which entries share a load, and which bases this process reads for the worker."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.records.config import AdapterSpec, BaseSpec
from merge_gate.records.files import AdapterFiles, BaseFiles, Entry, Snapshot
from merge_gate.records.terms import BaseKey, ForwardMode, Quantization
from merge_gate.run import groups
from merge_gate.run.groups import TIMEOUT_PER_GIB_S, group_by_base, network_file_system, placed
from merge_gate.worker.protocol import DEFAULT_TIMEOUT_S, Group

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / WEIGHTS).write_bytes(b"weights")
    return str(tmp_path / "base")


def group(directory: str, is_large: bool = False) -> Group:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization=Quantization.NONE)
    files = BaseFiles(directory=directory, weights=(WEIGHTS,), weight_bytes=1 << 60 if is_large else 7)
    return Group(base=key, directory=directory, files=files, tasks=())


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("system", [None, "nfs4"])
def test_a_base_that_is_large_or_on_a_network_is_fed(is_large, system, base, monkeypatch) -> None:
    monkeypatch.setattr(groups, "network_file_system", lambda _: system)
    notes: list[str] = []
    scheduled = placed(group(base, is_large), notes.append)
    assert (scheduled.one_pass, scheduled.fed) == (is_large, is_large or system is not None)
    assert ["of memory are free" in note for note in notes] == [True] * is_large
    assert groups.headers_timeout_s("/base") == (groups.HEADERS_TIMEOUT_S if system else None)


def test_a_streamed_base_is_fed_in_a_pass(base: str) -> None:
    streamed = BaseFiles(directory=base, weights=(WEIGHTS,), is_streamed=True)
    scheduled = placed(replace(group(base), files=streamed), pytest.fail)
    assert (scheduled.one_pass, scheduled.fed) == (True, True)


BASE = BaseSpec(model="./base", label="./base")


def entry(directory: Path, dtype: str = "float32", timeout_seconds: float | None = None, size_bytes: int = 0) -> Entry:
    spec = AdapterSpec(name="a", source="./a", base=BASE, checks=(), line=1, column=1, timeout_seconds=timeout_seconds)
    files = BaseFiles(directory=str(directory), weight_bytes=size_bytes)
    base = Snapshot(name=directory.name, directory=str(directory), base_files=files)
    return Entry(spec=spec, dtype=dtype, members=(AdapterFiles(directory="a"),), base=base)


def test_one_group_for_each_base_and_dtype_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    entries = [entry(second), entry(first), entry(second, "bfloat16"), entry(second)]
    made = group_by_base(enumerate(entries))
    assert [(group.base.name, group.base.dtype, [task.index for task in group.tasks]) for group in made] == [
        ("second", "float32", [0, 3]),
        ("first", "float32", [1]),
        ("second", "bfloat16", [2]),
    ]


def test_the_time_limit_grows_with_the_base_unless_it_is_given(tmp_path: Path) -> None:
    """The size is known from the headers: the mount of the base may not answer any more."""
    absent = tmp_path / "absent"
    entries = [entry(tmp_path, size_bytes=2 << 30), entry(tmp_path, timeout_seconds=7.0), entry(absent)]
    made = group_by_base(enumerate(entries))
    limits = {task.index: task.timeout_s for group in made for task in group.tasks}
    assert limits == {0: DEFAULT_TIMEOUT_S + 2 * TIMEOUT_PER_GIB_S, 1: 7.0, 2: DEFAULT_TIMEOUT_S}


@pytest.mark.parametrize(
    ("forward", "is_run", "is_run_if_streamed"),
    [(ForwardMode.AUTO, True, False), (ForwardMode.OFF, False, False), (ForwardMode.REQUIRED, True, True)],
)
def test_the_models_of_a_streamed_base_are_run_only_if_required(forward, is_run, is_run_if_streamed, tmp_path) -> None:
    for is_streamed, expected in ((False, is_run), (True, is_run_if_streamed)):
        one = entry(tmp_path)
        base = replace(one.base, base_files=BaseFiles(directory=str(tmp_path), is_streamed=is_streamed))  # type: ignore[type-var]
        made = replace(one, spec=replace(one.spec, forward=forward), base=base)
        assert (made.no_forward == "") is expected


def test_an_entry_that_was_to_be_settled_before_is_a_bug(tmp_path: Path) -> None:
    one = entry(tmp_path)
    with pytest.raises(AssertionError, match="has a verdict before it is grouped"):
        group_by_base([(0, replace(one, base=None))])


@pytest.mark.parametrize(
    ("system", "is_network"),
    [
        *((system, True) for system in ("nfs4", "cifs", "fuse.sshfs", "fuse", "9p")),
        *((system, False) for system in ("ext4", "overlay", "fuseblk", "fuse.fuse-overlayfs")),
    ],
)
def test_the_type_of_the_mount_decides(system: str, is_network: bool, tmp_path: Path) -> None:
    weights, mounts = tmp_path / "model.safetensors", tmp_path / "mountinfo"
    weights.touch()
    (tmp_path / "linked.safetensors").symlink_to(weights)
    device = weights.stat().st_dev
    mounts.write_text(
        "21 1 0:999 / /other rw,relatime shared:1 - nfs4 server:/x rw\n"
        f"22 1 {os.major(device)}:{os.minor(device)} / /mnt rw,relatime shared:1 master:2 - {system} source rw\n"
    )
    for path in (weights, tmp_path / "linked.safetensors"):
        assert network_file_system([path], mounts) == (system if is_network else None)


def test_what_cannot_be_looked_up_is_no_network(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    assert network_file_system([tmp_path], mounts) is None
    mounts.write_text("garbled\n")
    assert network_file_system([tmp_path], mounts) is None
    mounts.write_text("")
    assert network_file_system([tmp_path / "absent"], mounts) is None
    assert network_file_system([], Path("/proc/self/mountinfo")) is None
