"""The supervisor and its child process: what a crash costs, what the child may see, and that nobody outlives anybody.

A child that must hang at a known place is given a named pipe where the weights of one adapter were: it waits there
until it is killed.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate.engine import worker
from merge_gate.engine.worker import (
    BaseLoading,
    Child,
    Event,
    Finished,
    Group,
    Job,
    Merged,
    Quiet,
    Ready,
    Started,
    Task,
    Undecided,
    child_environment,
    listening,
    supervise,
)
from merge_gate.errors import EngineError
from merge_gate.records import Refusal
from merge_gate.sources.preflight import preflight
from tests.command import alive, merge_gate, strict_json, wait_until

if TYPE_CHECKING:
    from merge_gate.records import AdapterFiles
    from tests.models import Shelf

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(shelf: Shelf, tmp_path: Path) -> list[AdapterFiles]:
    """Three sound adapters; `hang` makes one of them a trap."""
    for number in range(3):
        shutil.copytree(shelf.adapter("plain"), tmp_path / f"adapter-{number}")
    return [preflight(str(tmp_path / f"adapter-{number}"), allow_pickle=False) for number in range(3)]


def hang(files: AdapterFiles) -> None:
    path = Path(files.directory, WEIGHTS)
    path.unlink()
    os.mkfifo(path)


def group(base: Path, adapters: list[AdapterFiles], *, first: int = 0) -> Group:
    tasks = tuple(Task(index=first + number, files=(files,)) for number, files in enumerate(adapters))
    return Group(label=base.name, directory=str(base), dtype="float32", tasks=tasks)


class Killer:
    """Hears everything, and kills the child when the event that it waits for has come."""

    def __init__(self, *when: Event) -> None:
        self.heard: list[Event] = []
        self.child: Child | None = None
        self._when = when

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Quiet):
            self.heard.append(event)
        if event in self._when and self.child is not None:
            self.child._process.kill()
            self.child = None

    def outcomes(self) -> dict[int, str]:
        ends = [event for event in self.heard if isinstance(event, Merged | Undecided)]
        assert max(Counter(event.task for event in ends).values()) == 1, "no task may be settled twice"
        return {event.task: type(event).__name__ for event in ends}

    def refusal(self, task: int) -> Refusal:
        (found,) = [event.refusal for event in self.heard if isinstance(event, Undecided) and event.task == task]
        return found


def run(job: Job, killer: Killer) -> None:
    with Child() as child:
        killer.child = child
        supervise(job, killer, child)


def test_each_task_is_merged_in_order_and_the_child_ends(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    killer = Killer()
    with Child() as child:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer, child)
        assert child._process.poll() == 0
    assert killer.outcomes() == {0: "Merged", 1: "Merged", 2: "Merged"}
    assert [event.task for event in killer.heard if isinstance(event, Started)] == [0, 1, 2]
    assert isinstance(killer.heard[0], Ready)
    assert killer.heard[0].device == "cpu" or killer.heard[0].device.startswith("cuda")
    assert isinstance(killer.heard[-1], Finished)


def test_a_death_within_an_adapter_costs_that_adapter(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    hang(adapters[1])
    killer = Killer(Started(task=1))
    run(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    assert killer.outcomes() == {0: "Merged", 1: "Undecided", 2: "Merged"}
    refusal = killer.refusal(1)
    assert "while it merged this adapter: killed by SIGKILL" in refusal.message
    assert refusal.check is None
    assert refusal.hint


def test_a_death_while_a_base_loads_costs_the_adapters_on_that_base(
    shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path
) -> None:
    slow = shutil.copytree(shelf.base("llama"), tmp_path / "slow")
    (slow / "model.safetensors").unlink()
    os.mkfifo(slow / "model.safetensors")
    killer = Killer(BaseLoading(group=0))
    run(Job(groups=(group(slow, adapters[:2]), group(shelf.base("llama"), adapters[2:], first=2))), killer)
    assert killer.outcomes() == {0: "Undecided", 1: "Undecided", 2: "Merged"}
    assert "while it loaded base slow" in killer.refusal(0).message


def test_a_child_that_dies_at_once_costs_all_and_is_not_started_forever(
    shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    killer = Killer()
    with Child() as child:
        child._process.kill()
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer, child)
    assert set(killer.outcomes().values()) == {"Undecided"}
    assert len(killer.outcomes()) == 3
    assert "before it judged this adapter" in killer.refusal(2).message


def test_a_child_that_forgets_an_adapter_does_not_make_it_disappear(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    killer = Killer()
    watch = worker._Watch(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    watch.hear(Undecided(task=0, refusal=Refusal(check=None, message="m")))
    watch.hear(Finished())
    watch.close()
    assert killer.outcomes() == dict.fromkeys(range(3), "Undecided")
    assert "without a word" in killer.refusal(1).message


def test_a_death_between_two_adapters_costs_none(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    watch = worker._Watch(Job(groups=(group(shelf.base("llama"), adapters),)), Killer())
    watch.hear(Started(task=0))
    watch.hear(Undecided(task=0, refusal=Refusal(check=None, message="m")))
    left = watch.bury("killed by SIGKILL")
    assert [task.index for one in left.groups for task in one.tasks] == [1, 2]


def test_what_the_listener_raises_ends_the_child(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    class Stop(BaseException):
        pass

    def listen(event: Event) -> None:
        raise Stop

    child = Child()
    with pytest.raises(Stop), child:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen, child)
    assert child._process.poll() == -signal.SIGKILL


def test_a_broken_pipe_of_the_listener_is_not_taken_for_the_childs(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    def listen(event: Event) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen)


def test_a_child_without_a_job_leaves_when_it_is_let_go() -> None:
    with Child() as child:
        pid = child._process.pid
        child._ours.close()
        wait_until(lambda: not alive(pid))
        assert child._process.wait() == 0


def test_a_job_without_tasks_starts_nothing(shelf: Shelf) -> None:
    killer = Killer()
    supervise(Job(groups=(group(shelf.base("llama"), []),)), killer)
    assert killer.heard == []


# --- what the child sees ---------------------------------------------------------------------------------------------


def test_the_child_gets_no_token_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in worker.SECRETS:
        monkeypatch.setenv(name, "hf_secret")
    with Child() as child:
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


# --- what is said of an exception ------------------------------------------------------------------------------------


def test_an_exception_becomes_a_sentence() -> None:
    refusal = worker._refusal(ValueError("\n  first line\nsecond line"))
    assert "ValueError: first line" in refusal.message
    assert "second" not in refusal.message
    assert "report this as a bug" in refusal.hint
    assert "no message" in worker._refusal(ValueError()).message
    assert len(worker._refusal(ValueError("x" * 9000)).message) < 600


def test_our_own_errors_keep_their_hint() -> None:
    refusal = worker._refusal(EngineError("what", hint="what next"))
    assert (refusal.check, refusal.message, refusal.hint) == (None, "what", "what next")


def test_out_of_memory_is_told_from_a_bug() -> None:
    import torch  # noqa: PLC0415 - see conftest

    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (MemoryError(), of_torch.value, torch.OutOfMemoryError("CUDA out of memory")):
        refusal = worker._refusal(error)
        assert "out of memory" in refusal.message
        assert "bug" not in refusal.hint


def test_a_file_that_went_away_is_told_from_a_bug() -> None:
    refusal = worker._refusal(FileNotFoundError(2, "No such file or directory", "model.safetensors"))
    assert "model.safetensors" in refusal.message
    assert "bug" not in refusal.hint


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
        assert worker._how(code, file).startswith(said)


def test_a_listener_hands_each_event_to_its_handler() -> None:
    heard: list[Event] = []
    listen = listening({Started: heard.append})
    listen(Finished())
    listen(Started(task=3))
    assert heard == [Started(task=3)]
