"""Which files are on a network file system, by the kernel's own list of mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_gate.sources.mounts import network_file_system


@pytest.mark.parametrize(
    ("system", "is_network"),
    [
        ("nfs4", True),
        ("cifs", True),
        ("fuse.sshfs", True),
        ("fuse", True),
        ("9p", True),
        ("ext4", False),
        ("overlay", False),
        ("fuseblk", False),
        ("fuse.fuse-overlayfs", False),
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
