"""The real command in a scrubbed environment: as a user's shell, a pipe or a CI runner would start it.

In: arguments and a directory. Out: `Answer`, or a running process. Nothing of the caller's environment that steers CI,
the Hub or Python reaches it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_gate.cli.dispatch import main

COMMAND = (sys.executable, "-P", "-m", "merge_gate")
SCRUBBED = re.compile(
    r"CI$|GITHUB_|ACTIONS_|RUNNER_|HF_|HUGGING|TRANSFORMERS_|MERGE_GATE_|PYTHON(?!PATH)|NO_COLOR|TERM|COLUMNS|LC_|LANG"
)
COMPILES = b"torch/_inductor/compile_worker"
PATIENCE_S = 360.0
"""How long anything may take before the test says that it hangs."""


@dataclass(frozen=True)
class Answer:
    """What a process left behind."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not SCRUBBED.match(name)}
    return kept | {"HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"} | changes


def merge_gate(*words: str | Path, cwd: Path, **changes: str) -> Answer:
    """Run `merge-gate` to its end."""
    return _answer([*COMMAND, *map(str, words)], cwd, changes)


def code_of(*words: str) -> int:
    """The exit code of `merge-gate` in this process."""
    try:
        return main(list(words))
    except SystemExit as leaving:
        return int(str(leaving.code))


def start(*words: str | Path, cwd: Path, **changes: str) -> subprocess.Popen[bytes]:
    """Start `merge-gate`, whose output goes to `log` beside the config, and leave it running."""
    with (cwd / "log").open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=cwd,
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def shell(script: str, *, cwd: Path, **changes: str) -> Answer:
    """Run a line of bash in which `merge-gate` is the command."""
    function = f'merge-gate() {{ "{COMMAND[0]}" {" ".join(COMMAND[1:])} "$@"; }}\n'
    return _answer(["bash", "-c", function + script], cwd, changes)


def _answer(command: list[str], cwd: Path, changes: dict[str, str]) -> Answer:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Answer(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def wait_until(what: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Poll until `what` gives something true; fail when the process ends or patience does."""
    deadline = time.monotonic() + PATIENCE_S
    while not (got := what()):
        assert process is None or process.poll() is None, f"ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.02)
    return got


def strict_json(path: Path) -> Any:
    """Parse JSON that holds no NaN, no Infinity and no key twice."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"{path} holds a key twice: {keys}"
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, object_pairs_hook=once)


def entries(directory: Path) -> list[dict[str, Any]]:
    """The adapters in the report in a directory."""
    return strict_json(directory / "report.json")["adapters"]  # type: ignore[no-any-return]


def children_of(pid: int) -> list[int]:
    """The living children of a process (zombies are dead), but those that torch 2.6 keeps for its compiler."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z" and COMPILES not in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
