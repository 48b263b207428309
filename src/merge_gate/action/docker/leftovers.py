"""Containers of merge-gate that nobody waits for any longer, and how one is removed for certain.

In: a client of the engine. Out: labels by which a container says whose it is; none left that belongs to a launcher
which is gone. A launcher that was killed cannot clear away; the next one on that machine does it, by these labels.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action.docker import docker_api
from merge_gate.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OURS = {"merge-gate": "run"}
_LAUNCHER = "merge-gate.launcher"
_UNTIL = "merge-gate.until"
_MARGIN_S = 3600
_ATTEMPTS = 6
_PAUSE_S = 0.5


def labels(time_limit_s: float) -> dict[str, str]:
    """Return the labels of a container that this process starts now."""
    return {**OURS, _LAUNCHER: _process("self"), _UNTIL: str(int(time.time() + time_limit_s + _MARGIN_S))}


def remove_orphans(client: Any, say: Callable[[str], None]) -> None:
    """Remove every container of ours whose launcher is gone; `say` gets a sentence for each that stays.

    An engine that cannot list its containers at this moment is no reason to judge no adapter.
    """
    try:
        listed = docker_api.labelled(client, OURS)
    except LauncherError as error:
        say(f"containers of earlier runs are not looked for: {error.message}")
        return
    for name, ours in listed:
        if is_orphan(ours, time.time()):
            remove(client, name, say)


def is_orphan(ours: Mapping[str, str], now: float) -> bool:
    """Tell whether the launcher that set these labels is gone.

    On the same boot and in the same space of process ids that can be seen; elsewhere its time limit has to be over.
    """
    launcher = ours.get(_LAUNCHER, "")
    here = _process("self").split("/")
    place, process = launcher.split("/")[:2], launcher.split("/")[2:]
    if len(process) == len(here[2:]) and process[0].isdecimal() and place == here[:2]:
        return _process(process[0]).split("/")[2:] != process
    until = ours.get(_UNTIL, "")
    return until.isdecimal() and int(until) < now


def _process(number: str) -> str:
    """Boot, space of process ids, process id, start: what no two processes share. Empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
        status = Path("/proc", number, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program stands in brackets and may hold anything; state and start are fields 3 and 22.
    process, fields = status.partition(" ")[0], status.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot}/{space}/{process}/{fields[19]}"


def remove(client: Any, name: str, say: Callable[[str], None]) -> None:
    """Remove a container by its name, alive or dead; `say` gets a sentence if it stays.

    It is asked for until it is not there: podman takes away half of a container that it is still making, says that it
    is done, and cannot list any container until the other half is gone too. One that was never there may yet be made
    by an engine that did not answer in time, so it is asked for again.
    """
    trouble, was_there = "", False
    for _ in range(_ATTEMPTS):
        try:
            is_there, trouble = docker_api.removed(client, name), ""
        except LauncherError as error:
            is_there, trouble = False, error.message
        if was_there and not is_there and not trouble:
            return
        was_there = was_there or is_there
        if not is_there:
            time.sleep(_PAUSE_S)
    if trouble:
        say(f"the container {name} is still there, the next run will try again: {trouble}")
