"""The commands in this process and without a worker: what is asked for in vain, what is handed on, and accidents.

tests/test_cli.py runs the real command.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest
import torch
import yaml

from merge_gate import __main__, demo
from merge_gate._internal.errors import GateError
from merge_gate.action.docker import launcher
from merge_gate.action.docker.container import ContainerRun, gate_words
from merge_gate.cli import demo_command, dispatch, init_command
from merge_gate.cli.dispatch import main
from merge_gate.cli.parser import COMMANDS
from merge_gate.config.yaml_document import MAX_LISTED
from merge_gate.features.ray import feature as run_on_ray
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS, WITHOUT_SETTING
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import Sandbox
from merge_gate.report.stored.report_files import WORDS, write_report
from merge_gate.run import flow, groups
from merge_gate.worker import protocol
from merge_gate.worker.memory import too_large
from merge_gate.worker.protocol import Event, Job
from tests.support.fake_ray import Ray
from tests.support.reports import FAIL, PASS
from tests.support.schemas import report_schema
from tests.support.tried import tried
from tests.support.wording import Wording

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": "./base"}
SHAPES = {"base_model.model.q.lora_A.weight": [4, 8], "base_model.model.q.lora_B.weight": [8, 4]}


def weights() -> bytes:
    """The tensors of a LoRA in safetensors, all zeros."""
    at = range(0, 4 * 32 * len(SHAPES), 4 * 32)
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * 32]}
        for begin, (name, shape) in zip(at, SHAPES.items(), strict=True)
    }
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(4 * 32 * len(SHAPES))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cwd: Path) -> Path:
    """A directory with one adapter and its config, in which the commands run."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(weights())
    (tmp_path / "gate.yml").write_text("version: 1\nadapters: [./one]\n")
    return tmp_path


def lay_base(place: Path) -> None:
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text("{}")
    (place / "base" / "model.safetensors").write_bytes(weights())


def cut(place: Path) -> None:
    (place / "one" / "adapter_model.safetensors").write_bytes(weights()[:-1])


@pytest.fixture
def replace_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Gives a command another function."""
    return lambda name, run: monkeypatch.setitem(COMMANDS, name, (COMMANDS[name][0], run))


def raising(error: BaseException) -> Callable[..., int]:
    def run(*_: object) -> int:
        raise error

    return run


# --- before the command, and around it -----------------------------------------------------------------------------


@pytest.fixture
def interrupt() -> Iterator[Callable[..., None]]:
    """Sets what SIGINT does; afterwards it does what it did."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("before", "then"),
    [(signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)],
    ids=["a terminal", "in the background"],
)
def test_an_interrupt_during_the_imports_leaves_no_traceback(before, then, interrupt, monkeypatch) -> None:
    """A shell has a command in the background ignore it, which stays so."""
    seen: list[Any] = []

    def run() -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 7

    interrupt(before)
    monkeypatch.setattr(dispatch, "main", run)
    assert __main__.main() == 7
    assert seen == [then]


class Killing(list[str]):
    """Words that send a signal when they are read."""

    def __iter__(self) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__iter__()


def test_a_signal_before_the_command_leaves_no_verdict(capsys: pytest.CaptureFixture[str], wording: Wording) -> None:
    assert main(Killing(["check", "gate.yml"])) == 3
    wording(capsys.readouterr().err)


def test_a_signal_during_a_command_without_an_output(replace_command, capsys) -> None:
    replace_command("check", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["check", "gate.yml"]) == 3
    assert "SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("by zero"),
        ModuleNotFoundError("absent", name="jsonschema.absent"),
        OSError(errno.EMFILE, "no"),
        OSError(errno.ENOMEM, "no"),
    ],
    ids=["a defect", "a package", "files", "memory"],
)
def test_an_error_of_a_command_is_a_sentence(error, replace_command, capsys, wording) -> None:
    """Never exit code 1, with which Python ends by itself."""
    replace_command("schema", raising(error))
    assert main(["schema", "config"]) == 3
    wording(capsys.readouterr().err)


def test_the_details_of_a_defect_are_to_be_had(replace_command, variables, capsys) -> None:
    replace_command("schema", raising(ZeroDivisionError("by zero")))
    variables["MERGE_GATE_DEBUG"] = "1"
    assert main(["schema", "config"]) == 3
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.endswith("ZeroDivisionError: by zero\n")


def test_a_directory_that_one_may_not_read_is_no_defect(place, capsys) -> None:
    """Named here or in a config, it is judged alike."""
    lay_base(place)
    # pytest's own directories are closed to others
    with tempfile.TemporaryDirectory() as top, contextlib.chdir(top):
        shutil.copytree(place, top, dirs_exist_ok=True)
        assert [main(["check", name]) for name in ("./one", "gate.yml")] == [0, 0], "and all that it takes is imported"
        Path("one").chmod(0)
        Path(top).chmod(0o755)
        capsys.readouterr()
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            codes, said = zip(
                *((main(["check", name]), capsys.readouterr()) for name in ("./one", "gate.yml")), strict=True
            )
        finally:
            os.seteuid(user)
            Path("one").chmod(0o755)
    assert codes == (3, 3)
    assert said[0] == said[1]
    assert re.search(r"one\S* .*: Permission denied where .* to do ", " ".join(said[0].out.split()))
    assert not said[0].err


def test_problems_without_end_are_counted(place: Path, capsys: pytest.CaptureFixture[str], wording: Wording) -> None:
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": [{"path": 7}] * (MAX_LISTED + 4)}))
    assert main(["check", "gate.yml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "4" in said[-2]
    assert str(MAX_LISTED + 4) in said[-1]
    wording(*said[-2:])


# --- run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def container(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[ContainerRun]:
    """What was asked of a container. The gate in it fails; if the configuration is `begins.yml`, it begins first."""
    asked: list[ContainerRun] = []

    def run(wanted: ContainerRun, log: Callable[[bytes], None]) -> int:
        asked.append(wanted)
        log(b"from the inside\n")
        if wanted.config.name == "begins.yml":
            wanted.begins()
        write_report(FAIL, place / "merge-gate-report")
        return 1

    monkeypatch.setattr(launcher, "run_in_container", run)
    return asked


@pytest.mark.parametrize(
    ("words", "inside"),
    [
        ((), ()),
        (("--shard", "2/4", "--refresh", "--only", "one"), ("--only", "one", "--refresh", "--shard", "2/4")),
        (("--refresh", "--access", "stream", "--image", "x:y"), ("--refresh", "--access", "stream")),
        (("--forward", "required"), ("--forward", "required")),
    ],
)
def test_a_run_in_a_container_is_told_what_this_one_was(words, inside, container, capfd) -> None:
    assert main(["run", "gate.yml", "--container", *words]) == 1
    assert [one.arguments for one in container] == [inside]
    assert capfd.readouterr().out == "from the inside\n"


def test_a_run_in_a_container_is_told_where_to_publish(container: list[ContainerRun], place: Path) -> None:
    assert main(["run", "gate.yml", "--container", "--publish", "merged", "--max-shard-size", "1KiB"]) == 1
    assert container[0].publish == place / "merged"
    more = ["--publish", str(place / "merged"), "--max-shard-size", "1.024KB"]
    assert gate_words(container[0], "cpu")[-4:] == more


@pytest.mark.usefixtures("container")
@pytest.mark.parametrize("config", ["begins.yml", "gate.yml"])
def test_copies_are_made_of_the_report_of_a_container(config, place, capfd) -> None:
    (place / "begins.yml").write_bytes((place / "gate.yml").read_bytes())
    assert main(["run", config, "--container", "--report", "junit=-"]) == 1
    said = capfd.readouterr()
    assert said.err == "from the inside\n"
    made = (place / "merge-gate-report" / "junit.xml").read_text()
    assert said.out == (made if config == "begins.yml" else "")


# --- run, with somebody else in the worker's place -------------------------------------------------------------------


@pytest.fixture
def worker(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What the worker says before it gives up on every adapter. There is a base to merge into."""
    lay_base(place)
    says: list[Event] = []

    def supervise(job: Job, on_event: Callable[[Event], None], *_: object) -> None:
        for event in says:
            on_event(event)
        for group in job.groups:
            for task in group.tasks:
                on_event(protocol.Unjudged(task=task.index, refusal=REFUSAL))

    monkeypatch.setattr(flow, "supervise", supervise)
    return says


REFUSAL = NotJudged(message="no worker merges here", hint="start one")


def report_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "merge-gate-report" / "report.json").read_text())


@pytest.mark.usefixtures("worker")
def test_a_base_larger_than_the_memory_is_told_before_its_load(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(groups.MemoryGroup, "free_bytes", lambda _: 100)
    assert main(["run", "gate.yml"]) == 3
    said = capsys.readouterr()
    assert str(too_large("./base", len(weights()), 100)) in said.out + said.err


def test_a_sandbox_that_is_not_whole_is_told_once(place, worker, capsys, wording) -> None:
    """A second worker that has as little of it is no news."""
    chosen = protocol.DeviceChosen(device="cpu", device_name="", sandbox=Sandbox(missing=("files: no Landlock here",)))
    worker += [chosen, chosen]
    assert main(["run", "gate.yml"]) == 3
    said = capsys.readouterr()
    (line,) = (line for line in (said.out + said.err).splitlines() if "files: no Landlock here" in line)
    wording(line)
    assert report_of(place)["environment"]["sandbox"]["missing"] == ["files: no Landlock here"]


@pytest.mark.usefixtures("place")
def test_a_base_or_an_adapter_that_takes_long_is_named(worker, capsys, wording) -> None:
    worker += [protocol.Idle(task=task, base="./base", seconds=61.0, timeout_s=900.0) for task in (None, 0)]
    assert main(["run", "gate.yml"]) == 3
    said = capsys.readouterr()
    of_base, of_adapter = (line for line in (said.out + said.err).splitlines() if "15 min 00 s" in line)
    assert {"./base:", "1", "01"} <= set(of_base.split())
    assert {"one:", "1", "01"} <= set(of_adapter.split())
    wording(of_base, of_adapter)


@pytest.mark.usefixtures("worker")
def test_a_run_on_a_cluster_has_the_options_of_the_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @contextlib.contextmanager
    def cluster(address: str) -> Iterator[Any]:
        asked.append(address)
        yield Ray({"CPU": 1.0})

    monkeypatch.setattr(run_on_ray, "cluster", cluster)
    assert main(["run", "gate.yml", "--ray", "auto", "--access", "stream", "--publish", "merged"]) == 3
    assert asked == ["auto"]
    assert [one["findings"][0]["message"] for one in report_of(place)["adapters"]] == [REFUSAL.message]
    assert (report_of(place)["complete"], report_of(place)["shard"]) == (True, None)


# --- check: options for adapters named on the command line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "checks"),
    [
        ((), 0, []),
        (("--expect", "r=4", "--expect", "peft_type=lora", "--expect", "lora_alpha=8"), 0, []),
        (("--expect", "r=16"), 1, ["expectation-failed"]),
        (("--expect", "sha256:adapter_model.safetensors=" + "0" * 64), 1, ["expectation-failed"]),
        (("--expect", "r=16", "--set", "expectation-failed=warning"), 0, ["expectation-failed"]),
        (("--base", "elsewhere"), 0, ["base-mismatch"]),
    ],
)
def test_options_judge_adapters_as_a_config_does(words, code, checks, place, capsys) -> None:
    lay_base(place)
    shutil.copytree(place / "base", place / "elsewhere")
    assert main(["check", "one", "--report", "json=-", *words]) == code
    (one,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [finding["check"] for finding in one["findings"]] == checks


def test_pickled_weights_are_read_on_request(place: Path) -> None:
    lay_base(place)
    (place / "one" / "adapter_model.safetensors").unlink()
    torch.save({name: torch.ones(shape) for name, shape in SHAPES.items()}, place / "one" / "adapter_model.bin")
    assert main(["check", "one"]) == 1
    assert main(["check", "one", "--allow-pickle"]) == 0


# --- run and check: --report -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
def test_a_run_writes_the_copies_of_its_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output there is nothing else; what a person reads is on standard error."""
    assert main(["run", "gate.yml", "--report", "sarif=new/own.sarif", "--report", "json=-"]) == 3
    said = capsys.readouterr()
    written = place / "merge-gate-report"
    assert said.out == (written / "report.json").read_text()
    assert (place / "new" / "own.sarif").read_text() == (written / "report.sarif").read_text()
    assert "could not be judged" in said.err


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_run_that_ends_early_leaves_no_old_copy(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(PASS, place / "old")
    old = shutil.copy(place / "old" / "junit.xml", place / "tests.xml").read_bytes()
    words = [command, "gate.yml", "--report", "junit=tests.xml"]
    assert main([*words, "--only", "absent"]) == 2
    assert (place / "tests.xml").read_bytes() == old

    def end(*_: object, **__: object) -> NoReturn:
        raise GateError("the run ends")

    monkeypatch.setattr("merge_gate.judging.all_checks.judge_files", end)
    assert main(words) == 3
    assert not (place / "tests.xml").exists()


@pytest.mark.usefixtures("worker")
def test_a_new_copy_replaces_the_old_one(place: Path) -> None:
    for _ in range(2):
        assert main(["run", "gate.yml", "--report", "json=ci/report.json", "--report", "junit=ci/junit.xml"]) == 3
        assert {path.name for path in (place / "ci").iterdir()} == {"report.json", "junit.xml"}


@pytest.mark.parametrize("held", tried("Y52", "--report json=", "exit 2, kept", ["other", "other/previous"]))
@pytest.mark.parametrize("names", ["gate.yml", "gate.yaml"])
def test_a_copy_replaces_no_report_of_another_run(names: str, held: str, place: Path) -> None:
    write_report(PASS, place / held)
    kept = {path: path.read_bytes() for path in (place / held).iterdir()}
    for command in ("run", "check"):
        assert main([command, names, "--report", f"json={held}/report.json"]) == 2
        assert main([command, names, "--report", f"junit={held}/more.xml"]) == 2
    assert kept == {path: path.read_bytes() for path in (place / held).iterdir()}


@pytest.mark.parametrize(
    "words",
    tried(
        "Y53",
        "run gate.yml --report",
        "exit 2, nothing changes",
        {
            "foreign": ("json=foreign.txt",),
            "twice": ("json=a.json", "--report", "json=a.json"),
            "foreign, in a container": ("json=foreign.txt", "--container"),
            "of the output": ("json=merge-gate-report/report.json",),
        },
    ),
)
def test_a_mistake_with_a_copy_touches_nothing(words: tuple[str, ...], place: Path) -> None:
    (place / "foreign.txt").write_text("mine")
    write_report(PASS, place / "merge-gate-report")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert main(["run", "gate.yml", "--report", *words]) == 2
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_check_has_a_report_that_claims_no_merge(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_base(place)
    copies = [f"--report={word}=check.{word}" for word in WORDS if word != "json"]
    assert main(["check", "gate.yml", "--report", "json=-", *copies]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    jsonschema.Draft202012Validator(report_schema()).validate(document)
    assert (document["files_only"], document["result"]) == (True, "pass")
    assert [one["name"] for one in document["adapters"]] == ["one"]
    assert "sound" in said.err
    for word in ("markdown", "html", "sarif"):
        assert "files only: the only adapter passed" in (place / f"check.{word}").read_text()
    cut(place)
    assert main(["check", "gate.yml", "--report", "json=-"]) == 1
    assert json.loads(capsys.readouterr().out)["adapters"][0]["cause"] == "file-corrupt"


# --- check, init, demo ---------------------------------------------------------------------------------------------


def unreadable(place: Path) -> None:
    weights = place / "one" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(weights.name)


@pytest.mark.parametrize(
    ("break_", "code"), [(lambda _: None, 0), (cut, 1), (unreadable, 3)], ids=["sound", "broken", "unreadable"]
)
def test_a_check_says_what_it_found_and_that_nothing_was_merged(break_, code, place, capsys, wording) -> None:
    lay_base(place)
    break_(place)
    assert main(["check", "one"]) == code
    wording(" ".join(capsys.readouterr().out.split("\n\n")[-1].split()))


def test_a_first_config_is_written_once(place: Path, capsys: pytest.CaptureFixture[str], wording: Wording) -> None:
    assert main(["init", "."]) == 0
    written = (place / "merge-gate.yml").read_text()
    assert "one" in written
    wording(capsys.readouterr().out)
    assert main(["init", "."]) == 2
    wording(capsys.readouterr().err)
    assert (place / "merge-gate.yml").read_text() == written


def test_half_a_first_config_does_not_stay(place: Path) -> None:
    class Full(io.StringIO):
        def flush(self) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (place / "merge-gate.yml").write_text("vers")
    with pytest.raises(OSError, match="No space left"):
        init_command._write_or_remove(Full(), "version: 1", place / "merge-gate.yml")
    assert not (place / "merge-gate.yml").exists()


def test_a_first_config_where_nobody_can_write(place, cwd, capsys, wording) -> None:
    os.chdir("/proc")  # where not even root can make a file
    assert main(["init", str(place)]) == 2
    said = capsys.readouterr().err
    assert "merge-gate.yml" in said
    assert "--output" not in said
    wording(said.splitlines()[0])


def test_a_demo_that_is_judged_otherwise_is_no_demo(monkeypatch, capsys, wording) -> None:
    monkeypatch.setattr(demo_command, "gate_adapters", lambda *_, **__: PASS)
    assert main(["demo", "new"]) == 3
    said = capsys.readouterr().err
    assert all(f"{name} ({dtype})" in said for name, dtype in demo.EXPECTED)
    wording(re.sub(": good .*", ": …", said))


# --- report --------------------------------------------------------------------------------------------------------


def test_a_stored_report_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(FAIL, place / "out")
    assert main(["report", "show", "out/report.json", "--format", "junit"]) == 0
    assert capsys.readouterr().out == (place / "out" / "junit.xml").read_text()


def test_what_broke_since_another_report_is_an_exit_code(place: Path) -> None:
    write_report(PASS, place / "before")
    write_report(FAIL, place / "after")
    assert main(["report", "diff", "before/report.json", "after/report.json"]) == 1
    assert main(["report", "diff", "after/report.json", "after/report.json"]) == 0


def test_a_first_baseline_accepts_each_failure(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once each failure has a reason and an owner."""
    write_report(FAIL, place / "out")
    assert main(["report", "baseline", "out/report.json"]) == 0
    said = capsys.readouterr().out
    assert all(f"{one.name}" in said for one in FAIL.adapters if one.verdict == "failed")
    baseline = yaml.safe_load(said)
    assert main(["schema", "baseline"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert not jsonschema.Draft202012Validator(schema).is_valid(baseline)
    baseline["accept"] = [entry | {"reason": "known", "owner": "the team"} for entry in baseline["accept"]]
    jsonschema.Draft202012Validator(schema).validate(baseline)


def test_a_check_is_explained(capsys: pytest.CaptureFixture[str], wording: Wording) -> None:
    assert main(["explain", "no-effect"]) == 0
    assert capsys.readouterr().out.startswith("no-effect\n\n")
    assert main(["explain"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    ids = [line.split()[0] for line in listed if line and not line.endswith(":")]
    assert ids[:-1] == [*sorted(CHECKS, key=ids.index), *WITHOUT_SETTING, *ANSWERS]
    assert [line for line in listed if line.endswith(":")] == [
        "Checks of the adapter's files:",
        "Checks of the base:",
        "Checks of the merge:",
        "Checks of the running model:",
        "Findings without a setting:",
        "Results of `merge-gate verify`:",
    ]
    assert all(main(["explain", one]) == 0 for one in ids[:-1])
    capsys.readouterr()
    for unknown in ("no-efect", "zzz"):
        assert main(["explain", unknown]) == 2
        wording(capsys.readouterr().err)


def test_what_prints_no_table_does_without_rich(place: Path) -> None:
    write_report(FAIL, place / "out")
    commands = (["explain", "no-effect"], ["report", "show", "out", "--format", "json"], ["report", "baseline", "out"])
    code = (
        "import sys; from merge_gate.cli.dispatch import main;"
        f"codes = [main(words) for words in {commands!r}]; sys.exit(any(codes) or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=place, capture_output=True).returncode == 0


@pytest.mark.attempt("Y65", "check --expect base-sha256=…", "exit 2")
def test_a_check_knows_no_digest_of_a_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_base(place)
    assert main(["check", "one", "--expect", f"base-sha256={'0' * 64}"]) == 2
    assert "base-sha256" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["config", "report"])
def test_a_schema_is_all_that_is_printed(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", document]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"]
