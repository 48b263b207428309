"""The worker process as its parent starts it: what it sees, what it may import, and how its end is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from merge_gate.engine.heap import REUSE
from merge_gate.engine.private import PREFIX, private_directory
from merge_gate.engine.process import SECRETS, WAITING, WorkerProcess, child_environment, describe_exit
from tests.command import alive, environment, merge_gate, strict_json, wait_until

# --- what the child sees ---------------------------------------------------------------------------------------------


def test_the_child_gets_no_token_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_secret")
    with WorkerProcess() as child:
        seen = wait_until(lambda: _environment_of(child._process.pid))
        directory = Path(f"/proc/{child._process.pid}/cwd").resolve()
    assert "hf_secret" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == seen["TRANSFORMERS_OFFLINE"] == "1"
    assert directory != Path.cwd()
    assert seen["TMPDIR"] == str(directory)
    assert not directory.exists()


def _environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return environ if "PYTHONSAFEPATH" in environ else {}


def test_python_paths_that_lead_into_the_checkout_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([".", "", "src", str(tmp_path), str(tmp_path / "deep"), "/opt/site"])
    assert child_environment({"PYTHONPATH": path})["PYTHONPATH"] == "/opt/site"
    assert "PYTHONPATH" not in child_environment({"PYTHONPATH": str(tmp_path)})
    assert "PYTHONPATH" not in child_environment({})


@pytest.mark.parametrize("name", [*WAITING, *REUSE])
def test_threads_and_memory_are_the_workers_choice_unless_they_are_the_callers(name: str) -> None:
    assert child_environment({})[name] == {**WAITING, **REUSE}[name]
    assert child_environment({name: "other"})[name] == "other"


def test_a_module_in_the_checkout_is_never_imported(tmp_path: Path) -> None:
    made = merge_gate("demo", "here", cwd=tmp_path)
    assert made.code == 0, made.said
    place = tmp_path / "here"
    for name in ("torch", "peft", "transformers", "bitsandbytes", "merge_gate", "sitecustomize"):
        (place / f"{name}.py").write_text(f"open({str(place / 'imported')!r}, 'a').write({name!r})\n")
    answer = merge_gate("run", "merge-gate.yml", "--only", "good", cwd=place)
    assert answer.code == 0, answer.said
    assert not (place / "imported").exists()
    assert strict_json(place / "merge-gate-report" / "report.json")["counts"] == {"passed": 1, "failed": 0, "error": 0}


# --- how it ended ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output", "memory", "said", "to_do"),
    [
        (-9, b"", None, "killed by SIGKILL, most likely because the machine is out of memory", "more memory"),
        (-9, b"", "", "killed by SIGKILL from outside", "what sent the signal"),
        (-9, b"", "used 2.0 GiB", "killed by SIGKILL, out of memory: used 2.0 GiB", "more memory"),
        (-signal.SIGSEGV, b"", None, "killed by SIGSEGV", "report it as a bug"),
        (-signal.SIGBUS, b"", None, "killed by SIGBUS", "let nothing write to base and adapters"),
        (-200, b"", None, "killed by signal 200", "report it"),
        (1, b"Traceback\n  ...\nImportError: no x\n\n", None, "exit code 1; its last words: ImportError: no x", "bug"),
        (3, b"\xff\xfe" * 5000, None, "exit code 3; its last words: ", "bug"),
    ],
)
def test_how_a_child_ended_is_said(
    code: int, output: bytes, memory: str | None, said: str, to_do: str, tmp_path: Path
) -> None:
    with (tmp_path / "output").open("w+b") as file:
        file.write(output)
        ending = describe_exit(code, file, out_of_memory=memory)
    assert ending.text.startswith(said)
    assert to_do in ending.hint


# --- it leaves nothing behind ----------------------------------------------------------------------------------------


PARENT = """
import os, signal, time
from merge_gate.engine.process import WorkerProcess
child = WorkerProcess()
print(child._process.pid, flush=True)
time.sleep(float(os.environ["DELAY"]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.1, 0.3])
def test_no_child_outlives_a_parent_that_is_killed_at_once(delay_s: float, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PARENT],
        env=environment(DELAY=str(delay_s), TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        check=False,
    )
    child = int(done.stdout)
    began = time.monotonic()
    wait_until(lambda: not alive(child))
    assert time.monotonic() - began < 2.0


def test_the_directory_of_a_dead_run_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, foreign = tmp_path / f"{PREFIX}dead", tmp_path / "merge-gate-other"
    for directory in (dead, foreign):
        directory.mkdir()
        (directory / "file").write_text("left behind")
        os.utime(directory, (0, 0))
    young = tmp_path / f"{PREFIX}young"
    young.mkdir()  # it may be one that is being made
    with private_directory() as living:
        os.utime(living, (0, 0))
        assert not dead.exists()
        with private_directory() as other:
            assert Path(living).is_dir()
            assert Path(other).is_dir()
    assert {one.name for one in tmp_path.iterdir()} == {foreign.name, young.name}
