"""The worker process as its parent starts it: what it sees, what it may import, and how its end is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from merge_gate.engine.process import SECRETS, WorkerProcess, child_environment, describe_exit
from tests.command import merge_gate, strict_json, wait_until

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
    ("code", "output", "said"),
    [
        (-signal.SIGKILL, b"", "killed by SIGKILL, most likely because the machine is out of memory"),
        (-signal.SIGSEGV, b"", "killed by SIGSEGV"),
        (-200, b"", "killed by signal 200"),
        (1, b"Traceback\n  ...\nImportError: no torch\n\n", "exit code 1; its last words: ImportError: no torch"),
        (3, b"\xff\xfe" * 5000, "exit code 3; its last words: "),
    ],
)
def test_how_a_child_ended_is_said(code: int, output: bytes, said: str, tmp_path: Path) -> None:
    with (tmp_path / "output").open("w+b") as file:
        file.write(output)
        assert describe_exit(code, file).startswith(said)
