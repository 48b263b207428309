"""Whole runs with workers in the hands of an attacker: each costs its own base, within limits, and ends with the run.

The attacks are in tests/support/attacking_worker.py. One base brings code of its own.
"""

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from merge_gate.worker.call_service import CALL_CHANNELS
from tests.support.attacking_worker import MESSAGES, OWN_LIES, attacked
from tests.support.command import (
    COMMAND,
    PATIENCE_S,
    alive,
    children_of,
    environment,
    merge_gate,
    start,
    strict_json,
    wait_until,
)
from tests.support.models import Shelf

STOP_S = 10.0
"""Within this time after SIGTERM, a run has ended, also on a busy machine. On a quiet one it takes 3 s at most."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@contextmanager
def told(place: Path) -> Iterator[socket.socket]:
    """Where an attack says that it begins."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(place / "started"))
        line.settimeout(120)
        yield line


@pytest.mark.slow
def test_messages_of_an_attacker_cost_its_own_base_alone(place: Path) -> None:
    names = ["healthy", *MESSAGES, "broken"]
    answer = merge_gate("run", "gate.yml", cwd=place, **attacked(place, names))
    assert answer.code == 1, answer.said
    assert "Traceback" not in answer.said
    report = strict_json(place / "merge-gate-report" / "report.json")
    assert report["complete"]
    verdicts = {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]}
    assert verdicts["healthy"] == ("passed", None)
    assert verdicts["broken"] == ("failed", "merged-nonfinite")
    others = {name: verdict for name, (verdict, _) in verdicts.items() if name in MESSAGES and name not in OWN_LIES}
    assert others == dict.fromkeys(others, "error")
    assert {one["base"]["model"] for one in report["adapters"]} == {f"./{name}" for name in names}
    assert not [*place.rglob("ran")]


@pytest.mark.parametrize("attack", ["silent", "floods", "holds-the-interpreter"])
def test_no_attack_outlasts_the_time_limit(attack: str, place: Path) -> None:
    with told(place):
        began_s = time.monotonic()
        answer = merge_gate("run", "gate.yml", cwd=place, **attacked(place, [attack], seconds=1))
    assert answer.code == 3, answer.said
    assert time.monotonic() - began_s < 60
    (adapter,) = strict_json(place / "merge-gate-report" / "report.json")["adapters"]
    assert any("time limit" in finding["message"] for finding in adapter["findings"]), answer.said


@pytest.mark.parametrize(
    "attack", ["floods", "sends-large-messages", "holds-the-interpreter", "reads-nothing", "sends-large-calls"]
)
def test_a_run_ends_soon_after_sigterm_whatever_its_worker_does(attack: str, place: Path) -> None:
    variables = attacked(place, [attack], publish="calls" in attack or "reads" in attack)
    with told(place) as line:
        run = start("run", "gate.yml", cwd=place, **variables)
        line.recv(100)
    workers = children_of(run.pid)
    time.sleep(0.5)
    began_s = time.monotonic()
    run.send_signal(signal.SIGTERM)
    try:
        code = run.wait(60)
    finally:
        run.kill()
    taken_s = time.monotonic() - began_s
    assert code == 3, (place / "log").read_text()[-2000:]
    assert taken_s < STOP_S
    assert workers
    assert not any(map(alive, workers))
    assert not strict_json(place / "merge-gate-report" / "report.json")["complete"]


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had. 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("VmHWM:", 1)[1].split()[0]) << 10 if "VmHWM:" in status else 0


def _grown_bytes(run: subprocess.Popen[bytes]) -> int:
    """By how much the most memory that a process has had grows until it ends."""
    before = peak = _peak_bytes(run.pid)
    until = time.monotonic() + PATIENCE_S
    while run.poll() is None and time.monotonic() < until:
        peak = max(peak, _peak_bytes(run.pid))
        time.sleep(0.01)
    return peak - before


@pytest.mark.slow
def test_the_largest_messages_and_calls_take_a_gibibyte_of_the_parent_at_most(place: Path) -> None:
    variables = attacked(place, ["sends-large-calls"], publish=True)
    with told(place) as line:
        run = start("run", "gate.yml", cwd=place, **variables)
        line.recv(100)
    grown = _grown_bytes(run)
    assert run.wait(10) == 3, (place / "log").read_text()
    assert 100 << 20 < grown < 1 << 30
    assert strict_json(place / "merge-gate-report" / "report.json")["complete"]


def test_files_that_a_worker_sends_stay_open_nowhere(place: Path) -> None:
    """By the thousand, with events and calls. Only a call that is being answered may have one open."""
    with told(place) as line:
        run = start("run", "gate.yml", cwd=place, **attacked(place, ["sends-files"], publish=True))
        line.recv(100)
        before = len([*Path(f"/proc/{run.pid}/fd").iterdir()])
        line.recv(100)
        assert len([*Path(f"/proc/{run.pid}/fd").iterdir()]) <= before + CALL_CHANNELS
    assert run.wait(60) == 3, (place / "log").read_text()
    report = strict_json(place / "merge-gate-report" / "report.json")
    assert report["complete"]
    assert len(report["adapters"]) == 1


@pytest.mark.parametrize("attack", ["floods-with-bases", "floods-with-devices"])
def test_what_a_flood_leaves_in_the_parent_is_bounded(attack: str, place: Path) -> None:
    """Its memory, what it prints, and the report."""
    with told(place) as line:
        run = start("run", "gate.yml", "--verbose", cwd=place, **attacked(place, [attack, "healthy"], seconds=30))
        line.recv(100)
        grown = _grown_bytes(run)
    code, log = run.wait(10), (place / "log").read_text()
    assert code == 3, log[-2000:]
    assert grown < 100 << 20
    assert len(log) < 20_000
    report = place / "merge-gate-report" / "report.json"
    assert report.stat().st_size < 1 << 20
    verdicts = [one["verdict"] for one in strict_json(report)["adapters"]]
    assert verdicts == ["error", "passed"]


def test_a_worker_that_holds_the_interpreter_dies_with_its_parent(place: Path) -> None:
    """It has tried to change its end, too."""
    with told(place) as line:
        run = start("run", "gate.yml", cwd=place, **attacked(place, ["holds-the-interpreter"]))
        worker = int(line.recv(100))
    assert children_of(run.pid) == [worker]
    run.kill()
    run.wait()
    wait_until(lambda: not alive(worker))


def test_what_code_in_a_worker_can_still_do(place: Path) -> None:
    """The list of docs/concepts/security.md. Lies about its own base are in `test_messages_of_an_attacker...`."""
    with told(place) as line:
        answer = merge_gate("run", "gate.yml", cwd=place, **attacked(place, ["still"]))
        done = json.loads(line.recv(1000))
    assert answer.code == 0, answer.said
    names = {"reads", "locks", "chooses cores", "fills its directory", "has a limit of its memory"}
    assert done == dict.fromkeys(names, True)


# --- a terminal ------------------------------------------------------------------------------------------------------


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


@contextmanager
def terminal(place: Path, line: socket.socket, variables: dict[str, str]) -> Iterator[tuple[int, int, int]]:
    """A shell at a terminal, in which a run waits for its worker: the terminal, and the ids of run and worker."""
    shell, screen = pty.fork()
    if shell == 0:
        os.chdir(place)
        os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], environment(TERM="dumb", **variables))
    try:
        os.write(screen, " ".join([*COMMAND, "run", "gate.yml", ">log", "2>&1", "\n"]).encode())
        worker = int(line.recv(100))
        (run,) = children_of(shell)
        yield screen, run, worker
    finally:
        with suppress(OSError):
            os.kill(shell, signal.SIGKILL)
        os.waitpid(shell, 0)


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="there is no shell with job control")
def test_keys_at_the_terminal_reach_the_worker(place: Path) -> None:
    """Ctrl-Z stops run and worker, `fg` continues both, and Ctrl-C ends both."""
    with told(place) as line, terminal(place, line, attacked(place, ["holds-the-interpreter"])) as ids:
        screen, run, worker = ids
        for _ in range(2):
            os.write(screen, b"\x1a")
            wait_until(lambda: _state(run) == _state(worker) == "T")
            os.write(screen, b"fg\n")
            wait_until(lambda: "T" not in _state(run) + _state(worker))
        os.write(screen, b"\x03")
        wait_until(lambda: not alive(worker))
        wait_until(lambda: not alive(run))
        os.close(screen)
    report = strict_json(place / "merge-gate-report" / "report.json")
    assert not report["complete"]


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="there is no shell with job control")
def test_a_terminal_that_is_closed_ends_the_worker(place: Path) -> None:
    with told(place) as line, terminal(place, line, attacked(place, ["holds-the-interpreter"])) as ids:
        screen, run, worker = ids
        os.close(screen)
        wait_until(lambda: not alive(worker))
        wait_until(lambda: not alive(run))


# --- a base's own code -----------------------------------------------------------------------------------------------

PLANTED = """
import ctypes, os, re, resource, socket, sys
from pathlib import Path
from transformers import LlamaForCausalLM
from merge_gate.records.measured import BaseFacts, TensorStats
from merge_gate.worker.channel import Channel
from merge_gate.worker.protocol import BaseMeasured

libc = ctypes.CDLL(None, use_errno=True)
refused = []
for what, call in {
    "the end": lambda: libc.prctl(1, 0, 0, 0, 0) and ctypes.get_errno() and (_ for _ in ()).throw(PermissionError()),
    "limits": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)),
    "a terminal": lambda: os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY),
    "a segment": lambda: libc.shmget(0x6B6B, 4096, 0o1600) < 0 and (_ for _ in ()).throw(PermissionError()),
}.items():
    try:
        call()
    except OSError:
        refused.append(what)
stats = TensorStats(name="w", dtype="float32", shape=(1,), numel=1, nan=1, first_index=(0,))
facts = BaseFacts(model="./planted", revision=None, dtype="float32", quantization="none", nonfinite=(stats,) * 100_000)
parent = Channel(socket.socket(fileno=os.dup(int(sys.argv[3]))))


def peak():
    return int(Path(f"/proc/{os.getppid()}/status").read_text().split("VmHWM:", 1)[1].split()[0]) << 10


before = peak()
for _ in range(3):
    parent.send(BaseMeasured(group=0, task=0, facts=facts))
line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
line.sendto(f"{os.getpid()} {before} {','.join(refused)}".encode(), PLACE)
re.match(r"(a+)+$", "a" * 60 + "b")  # it holds the interpreter


class PlantedForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.mark.slow
def test_code_of_a_base_is_held_until_its_parent_is_killed(shelf: Shelf, tmp_path: Path) -> None:
    """It sends the largest messages, tries to outlive its parent, and holds the interpreter."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "adapter")
    shutil.copytree(shelf.base("llama"), tmp_path / "planted")
    config = tmp_path / "planted" / "config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    code = PLANTED.replace("PLACE", repr(str(tmp_path / "started")))
    (tmp_path / "planted" / "modeling_planted.py").write_text(code)
    entry = {"path": "./adapter", "base": "./planted"}
    (tmp_path / "gate.yml").write_text(json.dumps({"version": 1, "trust-remote-code": True, "adapters": [entry]}))
    with told(tmp_path) as line:
        run = start("run", "gate.yml", "--device", "cpu", cwd=tmp_path)
        worker, before, refused = line.recv(1000).decode().split(maxsplit=2)
    assert set(refused.split(",")) == {"the end", "limits", "a terminal", "a segment"}
    time.sleep(2)
    assert _peak_bytes(run.pid) - int(before) < 1 << 30
    run.kill()
    run.wait()
    wait_until(lambda: not alive(int(worker)))
