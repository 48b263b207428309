"""Names the network file system that a file is on, if it is on one.

Mapped files of such a system may hang or end the process (SIGBUS) when the connection fails, so they are read instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(r"fuse(\..*)?|nfs4?|cifs|smb3|smbfs|9p|ceph|lustre|afs|gfs2|ocfs2|beegfs|gpfs|glusterfs")
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.portal"})


def network_file_system(paths: Iterable[Path], mounts: Path = _MOUNTS) -> str | None:
    """The type of the network file system (as mount names it) that holds one of these files; None for local disks."""
    try:
        types = dict(map(_device_and_type, mounts.read_text().splitlines()))
        devices = {path.stat().st_dev for path in paths}  # a link leads to the file's own device
    except (OSError, LookupError, UnicodeDecodeError):
        return None
    found = {types.get(f"{os.major(device)}:{os.minor(device)}", "") for device in devices}
    return next((name for name in sorted(found) if _NETWORK.fullmatch(name) and name not in _LOCAL_FUSE), None)


def _device_and_type(line: str) -> tuple[str, str]:
    """https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html: the type follows a hyphen."""
    before, _, after = line.partition(" - ")
    return before.split()[2], after.split()[0]
