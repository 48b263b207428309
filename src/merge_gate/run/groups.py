"""Groups the entries that need a merge by base, and decides how each base is read, and by which process.

In: entries. Out: `Group`s for the worker, in the order of the configuration. It imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from merge_gate.judging import all_checks
from merge_gate.limits.timeout import ANSWER_TIMEOUT_S, within
from merge_gate.records.files import Entry
from merge_gate.records.terms import BaseKey
from merge_gate.worker.memory import MemoryGroup, too_large
from merge_gate.worker.protocol import DEFAULT_TIMEOUT_S, Group, Task

TIMEOUT_PER_GIB_S = 180.0

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(r"fuse(\..*)?|nfs4?|cifs|smb3|smbfs|9p|ceph|lustre|afs|gfs2|ocfs2|beegfs|gpfs|glusterfs")
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.portal"})

HEADERS_TIMEOUT_S = 60.0
"""How long reading the headers of a base on a network mount may take. Without a limit, a dead mount hangs the run."""


def group_by_base(entries: Iterable[tuple[int, Entry]]) -> tuple[Group, ...]:
    """Group entries by the key of their base. Each comes with the index of its task."""
    groups: dict[BaseKey, Group] = {}
    for index, entry in entries:
        base, files = entry.base, entry.base_files
        if base is None or files is None:
            raise AssertionError("an entry without a base has a verdict before it is grouped")
        named = replace(entry.spec.base.key(entry.dtype), model=base.name, revision=base.revision)
        key = replace(named, model=base.directory)  # a directory may be written in several ways
        group = groups.get(key) or Group(base=named, directory=base.directory, files=files, tasks=())
        # Several times what a merge takes on two slow cores. The size is the one that the files had when their headers
        # were read: now, their mount may not answer.
        timeout_s = entry.spec.timeout_seconds or DEFAULT_TIMEOUT_S + TIMEOUT_PER_GIB_S * files.weight_bytes / 2**30
        task = Task(
            index=index,
            files=entry.members,
            combine=entry.spec.combine,
            measure_options=all_checks.measure_options(entry.spec),
            timeout_s=timeout_s,
        )
        groups[key] = replace(group, tasks=(*group.tasks, task))
    return tuple(groups.values())


def with_models(group: Group, entries: Sequence[Entry]) -> Group:
    """The group, whose tasks say whether base and adapter are run as models. What a feature has said stays."""
    tasks = (
        replace(task, no_forward=entries[task.index].no_forward) if task.no_forward is None else task
        for task in group.tasks
    )
    return replace(group, tasks=tuple(tasks))


def headers_timeout_s(directory: str) -> float | None:
    """The time limit for reading the headers of a base; None for one on a local disk."""
    return HEADERS_TIMEOUT_S if is_on_network([Path(directory)]) else None


def is_on_network(paths: list[Path]) -> bool:
    """Whether one of these files is on a network file system. A mount that does not answer counts as one."""
    try:
        return within(ANSWER_TIMEOUT_S, lambda: network_file_system(paths)) is not None
    except TimeoutError:
        return True


def network_file_system(paths: Iterable[Path], mounts: Path = _MOUNTS) -> str | None:
    """The type of the network file system (as mount names it) that holds one of these files; None for local disks.

    Mapped files of such a system may hang or end the process (SIGBUS) when the connection fails, so they are read.
    """
    try:
        types = dict(map(_device_and_type, mounts.read_text().splitlines()))
        devices = {path.stat().st_dev for path in paths}  # a link leads to the file's own device
    except (OSError, LookupError, UnicodeDecodeError):
        return None
    file_systems = {types.get(f"{os.major(device)}:{os.minor(device)}", "") for device in devices}
    return next((name for name in sorted(file_systems) if _NETWORK.fullmatch(name) and name not in _LOCAL_FUSE), None)


def _device_and_type(line: str) -> tuple[str, str]:
    """https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html: the type follows a hyphen."""
    before, _, after = line.partition(" - ")
    return before.split()[2], after.split()[0]


def placed(group: Group, notify: Callable[[str], None]) -> Group:
    """Decide whether a group's base is read in passes, and by which process."""
    if group.files.is_streamed:
        return replace(group, one_pass=True, fed=True)
    note = too_large(group.base.name, group.files.weight_bytes, MemoryGroup().free_bytes())
    if note is not None:
        notify(note)
    is_network = is_on_network([Path(group.directory, name) for name in group.files.weights])
    return replace(group, one_pass=note is not None, fed=note is not None or is_network)
