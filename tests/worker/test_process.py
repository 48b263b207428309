"""The worker process as its parent starts it: what it sees, what it may import, and how its end is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_gate._internal.private_directory import PREFIX, private_directory
from merge_gate.demo import make_demo
from merge_gate.records.refusals import NotJudged
from merge_gate.worker import process
from merge_gate.worker.memory import REUSE, MemoryGroup
from merge_gate.worker.process import SLEEPING_THREADS, WorkerProcess, child_environment, describe_exit
from merge_gate.worker.protocol import Event, Finished, Idle, Job
from merge_gate.worker.supervisor import Attempt
from tests.support.command import alive, environment, merge_gate, strict_json, wait_until
from tests.support.played_worker import other_workers


@pytest.mark.attempt("A05a", "HF_TOKEN and the cache's key in the environment of a run", "not in the worker's")
@pytest.mark.attempt("A05b", "GH_TOKEN and GITHUB_TOKEN in the environment of a run", "not in the worker's")
@pytest.mark.attempt("A05c", "ACTIONS_ID_TOKEN_REQUEST_TOKEN in the environment of a run", "not in the worker's")
@pytest.mark.attempt("A05d", "tokens of other services under names that the gate does not know", "not in the worker's")
def test_the_child_gets_no_token_and_no_network(variables) -> None:
    for name in (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN",
        "MERGE_GATE_CACHE_KEY", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL",
        "AWS_SECRET_ACCESS_KEY", "PIP_INDEX_URL", "NETRC", "PYTHON_GITHUB_TOKEN", "DATABASE_URL",
    ):  # fmt: skip
        variables[name] = "hf_secret"
    with WorkerProcess() as child:
        seen = wait_until(lambda: _environment_of(child._process.pid))
        directory = Path(f"/proc/{child._process.pid}/cwd").resolve()
    assert "hf_secret" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == seen["TRANSFORMERS_OFFLINE"] == "1"
    assert directory != Path.cwd()
    assert seen["TMPDIR"] == str(directory)
    assert not directory.exists()


def test_no_code_comes_from_the_hubs_cache() -> None:
    """transformers replaces layers, and bitsandbytes an operation, by kernels that are there, signed or not."""
    env = child_environment({"HF_HOME": "/cache", "KERNELS_CACHE": "/cache", "USE_HUB_KERNELS": "1"})
    assert env["HF_HOME"] == "/cache"
    assert (env["USE_HUB_KERNELS"], env["KERNELS_CACHE"]) == ("0", os.devnull)


def _environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return environ if "PYTHONSAFEPATH" in environ else {}


def test_python_paths_that_lead_into_the_checkout_are_dropped(tmp_path: Path, cwd) -> None:
    path = os.pathsep.join([".", "", "src", str(tmp_path), str(tmp_path / "deep"), "/opt/site"])
    assert child_environment({"PYTHONPATH": path})["PYTHONPATH"] == "/opt/site"
    assert "PYTHONPATH" not in child_environment({"PYTHONPATH": str(tmp_path)})
    assert "PYTHONPATH" not in child_environment({})


def test_variables_of_libraries_pass_if_they_change_no_figure() -> None:
    """Without those of the linker, of threads, and of devices, a user's torch does not load or is slow."""
    names = ["PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "LC_ALL"]
    own = SLEEPING_THREADS | REUSE
    passed = child_environment(dict.fromkeys([*names, *own], "x"))
    assert dict.fromkeys([*names, *own], "x").items() <= passed.items()
    assert own.items() <= child_environment({}).items()
    rounding = dict.fromkeys(("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"), "1")
    assert not child_environment(rounding).keys() & rounding.keys()


def test_a_module_in_the_checkout_is_never_imported(tmp_path: Path) -> None:
    place = tmp_path / "here"
    make_demo(str(place))
    for name in ("torch", "peft", "transformers", "bitsandbytes", "merge_gate", "sitecustomize"):
        (place / f"{name}.py").write_text(f"open({str(place / 'imported')!r}, 'a').write({name!r})\n")
    answer = merge_gate("run", "merge-gate.yml", "--only", "good", cwd=place)
    assert answer.code == 0, answer.said
    assert not (place / "imported").exists()
    assert strict_json(place / "merge-gate-report" / "report.json")["counts"] == {"passed": 1, "failed": 0, "error": 0}


@pytest.mark.parametrize(
    ("code", "output", "memory"),
    [
        (-9, b"", None),
        (-9, b"", ""),
        (-9, b"", "used 2.0 GiB"),
        (-signal.SIGSEGV, b"", None),
        (-signal.SIGBUS, b"", None),
        (-200, b"", None),
        (1, b"Traceback\n  ...\nImportError: no x\n\n", None),
        (1, b"ImportError: x.so: failed to map segment from shared object", None),
        (1, b"MemoryError\n", None),
        (3, b"\xff\xfe" * 5000, None),
        (1, b"the GPU failed: CUDA error: device-side assert triggered\n", None),
    ],
)
def test_how_a_child_ended_is_said(code, output, memory, tmp_path, wording) -> None:
    with (tmp_path / "output").open("w+b") as file:
        file.write(output)
        ending = describe_exit(code, file, out_of_memory=memory)
    assert len(ending.message) < 1000
    assert (ending.log is None) == (output == b"")
    wording(f"{ending.message}\n> {ending.hint}")


def test_what_a_child_printed_before_it_was_ready_is_dropped(tmp_path: Path, variables) -> None:
    """And while it imports, its parent has time."""
    events: list[Event] = []
    (tmp_path / "sitecustomize.py").write_text("print('no kernel of this name', flush=True)\n")
    variables["PYTHONPATH"] = str(tmp_path)
    with WorkerProcess() as child:
        wait_until(lambda: b"no kernel" in os.pread(child._output.fileno(), 1000, 0))
        assert child.run(Attempt(Job(groups=(), device="cpu"), events.append)) is None
        assert describe_exit(-signal.SIGABRT, child._output).message.endswith("SIGABRT")
    assert isinstance(events[0], Idle)
    assert isinstance(events[-1], Finished)


ODD = "import os, signal, socket, time\nline = socket.socket(fileno=descriptors[0])\n"
SENDS_A_JOB = """
from merge_gate.worker.channel import Channel
from merge_gate.worker.protocol import Event, Finished, Idle, Job
Channel(line).send(Job(groups=()))
time.sleep(60)
"""


@pytest.fixture
def odd_child(tmp_path: Path) -> Callable[..., NotJudged]:
    """How a worker that does something else in place of its work is said to have ended."""

    def run(code: str, **counters: object) -> NotJudged:
        with other_workers(tmp_path, ODD + code), WorkerProcess() as child:
            vars(child).update(counters)
            ending = child.run(Attempt(Job(groups=()), lambda _event: None))
        assert ending is not None
        assert not alive(child._process.pid)
        return ending

    return run


@pytest.mark.parametrize(
    ("code", "said"),
    [("line.sendall(bytes([255]) * 16); time.sleep(60)", "18,446,744,073,709,551,615"), (SENDS_A_JOB, "Job")],
)
def test_a_child_that_sends_what_is_no_event_is_ended(odd_child, code, said, wording) -> None:
    ending = odd_child(code)
    assert said in ending.message
    wording(f"{ending.message}\n> {ending.hint}")


def test_a_child_that_hangs_up_and_stays_is_ended(odd_child: Callable[..., NotJudged], monkeypatch) -> None:
    monkeypatch.setattr(process, "EXIT_TIMEOUT_S", 0.1)
    assert "SIGKILL" in odd_child("line.close(); time.sleep(60)").message


@pytest.mark.parametrize(
    ("files", "killed_before"),
    [({"memory.max": f"{2 << 30}", "memory.peak": f"{3 << 29}"}, 0), ({"memory.max": "max"}, 0), ({}, 1), ({}, None)],
)
def test_a_killed_child_is_told_by_the_kernels_own_count(odd_child, tmp_path, files, killed_before, wording) -> None:
    for name, text in {"memory.events": "oom_kill 1\n", **files}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "proc").write_text("0::/\n")
    memory = MemoryGroup(tmp_path / "proc", tmp_path)
    ending = odd_child("os.kill(os.getpid(), signal.SIGKILL)", _memory=memory, _kills_before=killed_before)
    assert "SIGKILL" in ending.message
    wording(ending.message)


PARENT = """
import os, signal, time
from merge_gate.worker.process import WorkerProcess
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
    used_s = 0.0

    def is_gone() -> bool:
        nonlocal used_s
        try:
            user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
        except (FileNotFoundError, ProcessLookupError):
            return True
        used_s = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return not alive(child)

    wait_until(is_gone)
    assert used_s < 2.0, "it has imported torch"


STOPPED = """
import sys, time
from merge_gate.worker.process import WorkerProcess
child = WorkerProcess()
print(child._process.pid, flush=True)
while True:
    time.sleep(0.05)
"""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_stops_continues_and_dies_with_its_parent(tmp_path: Path) -> None:
    """Ctrl-Z, `fg`, and SIGKILL of the parent's group, although the worker is in a session of its own."""
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", STOPPED],
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert os.getsid(worker) == worker != os.getsid(parent.pid)
    for _ in range(2):
        os.killpg(parent.pid, signal.SIGTSTP)
        wait_until(lambda: _state(parent.pid) == _state(worker) == "T")
        os.killpg(parent.pid, signal.SIGCONT)
        wait_until(lambda: "T" not in _state(parent.pid) + _state(worker))
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: not alive(worker))


def test_the_directory_of_a_dead_run_alone_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}dead1234"
    users = [tmp_path / "merge-gate-other", tmp_path / f"{PREFIX}notes", tmp_path / f"{PREFIX}my_notes"]
    for directory in (dead, *users):
        directory.mkdir(mode=0o755 if directory == users[-1] else 0o700)
        (directory / "file").write_text("left behind")
        os.utime(directory, (0, 0))
    young = tmp_path / f"{PREFIX}young123"
    young.mkdir(mode=0o700)  # it may be one that is being made
    with private_directory(tmp_path) as living:
        os.utime(living, (0, 0))
        assert not dead.exists()
        with private_directory(tmp_path) as other:
            assert Path(living).is_dir()
            assert Path(other).is_dir()
    assert {one.name for one in tmp_path.iterdir()} == {*(one.name for one in users), young.name}


def test_a_process_that_cannot_be_killed_is_left_behind() -> None:
    """It is in an uninterruptible wait of the kernel: signals do not end it."""
    kills: list[bool] = []

    def wait(timeout: float | None = None) -> int:
        assert timeout is not None, "no one waits for it without a limit"
        raise subprocess.TimeoutExpired("worker", timeout)

    child: Any = SimpleNamespace(returncode=None, poll=lambda: None, kill=lambda: kills.append(True), wait=wait)
    assert process._exit_code(child) == -signal.SIGKILL
    assert kills == [True]
