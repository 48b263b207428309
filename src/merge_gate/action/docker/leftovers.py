"""Labels containers with their launcher, and removes the containers of launchers that are gone.

A killed launcher cannot remove its container, so the next launcher on the machine removes it, by its labels.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import docker_api

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LABEL = {"merge-gate": "run"}
_LAUNCHER = "merge-gate.launcher"
_UNTIL = "merge-gate.until"
_MARGIN_S = 3600
_ATTEMPTS = 6
_PAUSE_S = 0.5


def labels(timeout_s: float) -> dict[str, str]:
    """Return the labels of a container that this process starts now."""
    return {**LABEL, _LAUNCHER: _process("self"), _UNTIL: str(int(time.time() + timeout_s + _MARGIN_S))}


def remove_orphans(client: Any, say: Callable[[str], None]) -> None:
    """Remove every merge-gate container whose launcher is gone; `say` gets a sentence for each that stays.

    If the engine cannot list its containers now, the run goes on.
    """
    try:
        listed = docker_api.labelled(client, LABEL)
    except LauncherError as error:
        say(f"containers of earlier runs were not searched for: {error.message}")
        return
    for name, labels_of_container in listed:
        if is_orphan(labels_of_container, time.time()):
            remove(client, name, say)


def is_orphan(container_labels: Mapping[str, str], now: float) -> bool:
    """Whether the launcher that set these labels is gone.

    This is visible for a launcher of the same boot and PID namespace. For any other launcher, its time limit must be
    over.
    """
    launcher = container_labels.get(_LAUNCHER, "")
    own = _process("self").split("/")
    place, process = launcher.split("/")[:2], launcher.split("/")[2:]
    if len(process) == len(own[2:]) and process[0].isdecimal() and place == own[:2]:
        return _process(process[0]).split("/")[2:] != process
    until = container_labels.get(_UNTIL, "")
    return until.isdecimal() and int(until) < now


def _process(number: str) -> str:
    """Boot, PID namespace, process id, and start time, which identify a process; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
        status = Path("/proc", number, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The program's name is in parentheses and may contain anything. State and start time are fields 3 and 22.
    process, fields = status.partition(" ")[0], status.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot}/{space}/{process}/{fields[19]}"


def remove(client: Any, name: str, say: Callable[[str], None]) -> None:
    """Remove a container by its name, running or not; `say` gets a sentence if it stays.

    The removal is repeated until the container is gone. podman removes half of a container that it is still creating,
    reports success, and cannot list containers until the other half is gone. A container that does not exist may still
    be created by an engine that did not answer in time.
    """
    problem, existed = "", False
    for _ in range(_ATTEMPTS):
        try:
            exists, problem = docker_api.removed(client, name), ""
        except LauncherError as error:
            exists, problem = False, error.message
        if existed and not exists and not problem:
            return
        existed = existed or exists
        if not exists:
            time.sleep(_PAUSE_S)
    if problem:
        say(f"the container {name} still exists, and the next run will try again: {problem}")
