"""The command as people and workflows meet it: exit codes, report, bad input, signals, speed; all by subprocess."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from merge_gate._internal.errors import ExitCode
from merge_gate.cli.arguments import EXIT_CODES
from merge_gate.cli.check_command import EXIT_CODES_OF_CHECK
from merge_gate.cli.dispatch import main
from merge_gate.cli.parser import parsers
from merge_gate.judging.all_checks import refused
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.worker.device import has_card
from merge_gate.worker.protocol import refusal_of
from tests.support.command import (
    COMMAND,
    PATIENCE_S,
    Answer,
    alive,
    children_of,
    environment,
    merge_gate,
    shell,
    start,
    strict_json,
    wait_until,
)
from tests.support.demo_place import configure, readable, tree

REPORT = "merge-gate-report/report.json"
WEIGHTS = "adapter_model.safetensors"
STOPPED_WITHIN_S = 7.0
"""A cancelled workflow gives 7.5 s between SIGINT and SIGTERM."""


@pytest.fixture
def place(demo: Path, tmp_path: Path) -> Path:
    """A private copy of the demo's base and adapters, to be gated by a config of the test's own."""
    for name in ("base", "adapters"):
        shutil.copytree(demo / name, tmp_path / name)
    return tmp_path


def report_of(place: Path) -> dict[str, Any]:
    """The report, held against the schema that the command prints."""
    report = strict_json(place / REPORT)
    schema = json.loads(merge_gate("schema", "report", cwd=place).out)
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(report)
    return report


def verdicts(report: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]}


# --- the exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [EXIT_CODES, EXIT_CODES_OF_CHECK])
def test_the_help_lists_every_exit_code(text: str) -> None:
    assert re.findall(r"^  (\d)  ", text, re.MULTILINE) == [str(int(code)) for code in ExitCode]


@pytest.mark.parametrize(("words", "merges"), [(["run"], True), (["check"], False), (["report combine"], True)])
def test_the_help_of_a_command_that_merges_nothing_says_so(words: list[str], *, merges: bool) -> None:
    (commands,) = (one for one in parsers()[0]._actions if one.dest == "command")
    assert commands.choices[words[0]].epilog.endswith(EXIT_CODES) == merges


def test_0_when_every_adapter_passes(place: Path) -> None:
    """One of two adapters is in a directory whose name is no text."""
    shutil.copytree(place / "adapters" / "good", os.fsdecode(os.fsencode(place) + b"/many/\xff\xfe-adapter"))
    config = configure(place, "good", "./many/*")
    before = tree(place)
    answer = merge_gate("run", config.name, cwd=place)
    report = report_of(place)
    assert answer.code == 0, answer.said
    assert (report["result"], report["complete"]) == ("pass", True)
    good, other = report["adapters"]
    assert (good["name"], good["verdict"], good["cause"], other["verdict"]) == ("good", "passed", None, "passed")
    coverage = good["coverage"]
    assert coverage["parameters_checked"] == coverage["parameters_total"] == report["bases"][0]["parameters"] > 0
    assert len(report["bases"][0]["sha256"]) == 64
    assert report["config"]["path"] == "gate.yml"
    assert report["config"]["sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()
    assert "PASS" in answer.out
    assert tree(place) == before


def test_1_when_an_adapter_fails(place: Path) -> None:
    elsewhere = {"name": "elsewhere", "path": "./adapters/good", "base": {"model": "acme/nowhere"}}
    configure(place, "good", "nan", "lfs-pointer", elsewhere)
    answer = merge_gate("run", "gate.yml", "--output", "elsewhere/deep", cwd=place)
    assert answer.code == 1, answer.said
    report = strict_json(place / "elsewhere" / "deep" / "report.json")
    assert report["result"] == "fail"
    assert verdicts(report) == {
        "good": ("passed", None),
        "nan": ("failed", "adapter-nonfinite"),
        "lfs-pointer": ("failed", "file-lfs-pointer"),
        "elsewhere": ("error", "not-judged"),
    }
    assert not (place / "merge-gate-report").exists()


@pytest.mark.parametrize(("command", "names"), [("run", ["empty"]), ("run", ["adapters/nan", "empty"]),
                                                ("check", ["adapters/good", "empty"])])  # fmt: skip
def test_1_for_an_empty_directory(command: str, names: list[str], place: Path, cwd: Path, capsys) -> None:
    """It is one adapter's failure. A path that does not exist, and a glob without a match, are usage errors."""
    os.chdir(place)
    (place / "empty").mkdir()
    assert main([command, *names, "--base", "base", "--report", "json=report.json"]) == 1
    capsys.readouterr()
    (finding,) = next(one for one in strict_json(place / "report.json")["adapters"] if one["name"] == "empty")[
        "findings"
    ]
    assert (finding["check"], finding["severity"]) == ("file-missing", "error")
    assert finding["hint"] == "check that an earlier step has created or downloaded it"
    for nothing in ("./nowhere", "no-match-*"):
        assert main([command, *names, nothing, "--base", "base"]) == 2


def test_without_a_name_the_usual_config_is_read(place, cwd, capsys) -> None:
    os.chdir(place)
    configure(place, "good").rename("merge-gate.yml")
    codes, texts = [], []
    for words in ((), ("merge-gate.yml",)):
        codes.append(main(["check", *words]))
        texts.append(capsys.readouterr().out)
    assert codes[0] == codes[1]
    assert texts[0] == texts[1] != ""


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content)


def named_pipe(place: Path) -> None:
    (place / "base" / "model.safetensors").unlink()
    os.mkfifo(place / "base" / "model.safetensors")


BROKEN_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not-in-the-cache": (lambda _: None, "acme/nowhere"),
    "empty": (lambda place: [file.unlink() for file in (place / "base").iterdir()], "base"),
    "no-config": (lambda place: (place / "base/config.json").unlink(), "config.json"),
    "config-not-json": (overwrite("base/config.json", b'{"model_type": '), "config.json"),
    "config-a-list": (overwrite("base/config.json", b"[]"), "config.json"),
    "config-of-no-model": (overwrite("base/config.json", b'{"model_type": "frobnicator"}'), "frobnicator"),
    "config-binary": (overwrite("base/config.json", bytes(range(256))), "config.json"),
    "config-deep": (overwrite("base/config.json", b'{"a":' * 20_000), "config.json"),
    "named-pipe": (named_pipe, "model.safetensors"),
}


@pytest.fixture(scope="module")
def on_broken_bases(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The report's entry of a good adapter on each broken base, from one run."""
    place = tmp_path_factory.mktemp("bases")
    shutil.copytree(demo / "adapters" / "good", place / "adapters" / "good")
    for name, (arrange, _) in BROKEN_BASES.items():
        shutil.copytree(demo / "base", place / name / "base")
        arrange(place / name)
    bases = {name: "acme/nowhere" if name == "not-in-the-cache" else f"./{name}/base" for name in BROKEN_BASES}
    entries = ({"name": name, "path": "./adapters/good", "base": {"model": base}} for name, base in bases.items())
    configure(place, *entries, base=None)
    answer = merge_gate("run", "gate.yml", cwd=place)
    assert answer.code == 3, answer.said
    readable(answer)
    return {adapter["name"]: adapter for adapter in strict_json(place / REPORT)["adapters"]}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_3_when_the_base_cannot_be_used(name: str, on_broken_bases: dict[str, dict[str, Any]]) -> None:
    _, names = BROKEN_BASES[name]
    adapter = on_broken_bases[name]
    assert adapter["verdict"] == "error"
    finding = adapter["findings"][0]
    assert names in finding["message"], finding
    assert finding["hint"]
    assert finding["hint"] != refused(refusal_of(ValueError())).hint, "it is taken for a bug"


@pytest.mark.skipif(has_card(), reason="there is a card here")
def test_3_when_the_device_that_was_asked_for_is_not_there(place: Path) -> None:
    configure(place, "good")
    answer = merge_gate("run", "gate.yml", "--device", "cuda:1", cwd=place)
    assert answer.code == 3, answer.said
    readable(answer)
    report = report_of(place)
    assert verdicts(report) == {"good": ("error", "not-judged")}
    assert "cuda:1" in report["adapters"][0]["findings"][0]["message"]


def test_names_that_no_terminal_should_see_are_made_harmless(place: Path) -> None:
    hostile = "a\udcff\n::error::x\x1b[2J\u202e"
    (place / "adapters" / "good").rename(place / "adapters" / hostile)
    configure(place, "./adapters/a*")
    answer = merge_gate("check", "gate.yml", cwd=place)
    readable(answer)
    said = answer.out + answer.err
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert not any(line.lstrip().startswith("::") for line in said.splitlines()), said
    assert answer.code in {0, 2}, answer.said


# --- the streams ---------------------------------------------------------------------------------------------------


STREAMS = {
    "merge-gate run gate.yml >&- 2>&- <&-": True,
    "merge-gate run gate.yml 2>&1 | head -1; exit ${PIPESTATUS[0]}": True,
    "merge-gate run gate.yml | true; exit ${PIPESTATUS[0]}": False,
    "merge-gate run gate.yml > /dev/full 2> /dev/full": False,
    "TERM=dumb COLUMNS=20 merge-gate run gate.yml": False,
    "unset LANG; LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 merge-gate run gate.yml": False,
    "PYTHONIOENCODING=ascii:strict merge-gate run gate.yml": False,
}
"""Lines of bash, and whether `make test` merges an adapter with them: a worker inherits what is closed or broken."""


@pytest.mark.parametrize(
    ("script", "merges"),
    [
        *STREAMS.items(),
        *(pytest.param(script, True, marks=pytest.mark.slow) for script, merges in STREAMS.items() if not merges),
    ],
)
def test_where_the_words_go_does_not_change_the_verdict(script: str, *, merges: bool, place: Path) -> None:
    odd = {"name": "ñandú✓", "path": f"./adapters/{'no-effect' if merges else 'lfs-pointer'}"}
    configure(place, *(["good"] if merges else []), "lfs-pointer", odd)
    answer = shell(script, cwd=place)
    assert answer.code == 1, answer.said
    readable(answer)
    report = strict_json(place / REPORT)
    assert report["complete"] is True
    assert report["counts"] == {"passed": int(merges), "failed": 2, "error": 0}
    assert {file.name for file in (place / "merge-gate-report").iterdir()} == set(FORMATS)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("merge-gate check gate.yml | true; exit ${PIPESTATUS[0]}", 1),
        ("merge-gate check gate.yml >&- 2>&- <&-", 1),
        ("merge-gate check gate.yml > /dev/full", 1),
        ("merge-gate check gone.yml 2>&-", 2),
        ("merge-gate check gone.yml 2>/dev/full", 2),
        ("merge-gate --help > /dev/full", 0),
        ("merge-gate schema config > /dev/full", 3),
        ("merge-gate schema config >&-", 0),
    ],
)
def test_short_commands_keep_their_exit_code_too(script: str, code: int, place: Path) -> None:
    configure(place, "good", "lfs-pointer")
    answer = shell(script, cwd=place)
    assert answer.code == code, answer.said
    readable(answer)


def test_an_unwritable_directory_will_do_with_another_output(place: Path, tmp_path: Path) -> None:
    configure(place, "lfs-pointer")
    out = tmp_path / "out"
    answer = merge_gate(
        "run", place / "gate.yml", "--output", out, cwd=Path("/proc")
    )  # where not even root can make a file
    assert answer.code == 1, answer.said
    assert strict_json(out / "report.json")["complete"] is True


# --- speed ---------------------------------------------------------------------------------------------------------


def cpu_seconds(*words: str, cwd: Path) -> tuple[float, Answer]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = merge_gate(*words, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, answer


def test_help_answers_at_once(tmp_path: Path) -> None:
    took, answer = min((cpu_seconds("--help", cwd=tmp_path) for _ in range(3)), key=lambda pair: pair[0])
    assert answer.code == 0
    assert took < 0.3
    assert set(parsers()[0].format_help().split()) >= {"run", "check", "demo", "schema", "--version"}


WITHOUT_TORCH = (
    "--help", "run --help", "--version", "check gate.yml", "run broken.yml", "schema report", "explain no-effect"
)  # fmt: skip
COMMANDS_IN_TURN = """
import sys
from merge_gate.cli.dispatch import main
heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy"}
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit:
        pass
    print("after", command, sorted(heavy & {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_torch_is_imported_by_the_worker_only(place: Path) -> None:
    configure(place, "good", "lfs-pointer")
    (place / "broken.yml").write_text("version: 1\nadapters: 7\n")
    done = subprocess.run(
        [COMMAND[0], "-P", "-c", COMMANDS_IN_TURN, *WITHOUT_TORCH],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    after = [line for line in done.stderr.splitlines() if line.startswith("after ")]
    assert after == [f"after {command} []" for command in WITHOUT_TORCH]


def test_check_answers_for_a_thousand_adapters_in_ten_seconds(place: Path) -> None:
    for number in range(1000):
        shutil.copytree(place / "adapters" / "good", place / "many" / f"adapter-{number:04}")
    configure(place, "./many/*")
    took, answer = cpu_seconds("check", "gate.yml", cwd=place)
    assert answer.code == 0, answer.said
    assert "1,000 adapters" in answer.out
    assert took < 10


def test_the_report_of_a_thousand_adapters_is_written_seldom(place: Path) -> None:
    configure(place, *({"name": f"a{number}", "path": "./adapters/lfs-pointer"} for number in range(1000)))
    took, answer = cpu_seconds("run", "gate.yml", cwd=place)
    assert answer.code == 1, answer.said
    assert report_of(place)["counts"]["failed"] == 1000
    assert took < 15


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stuck(place: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A run that has judged four adapters and hangs in the fifth.

    The fifth has a regular expression that takes ten seconds of trial.
    """
    for name in ("good-2", "stuck", "good-3"):
        shutil.copytree(place / "adapters" / "good", place / "adapters" / name)
    path = place / "adapters" / "stuck" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "(([a-z0-9_.])+)+!"}))
    configure(place, "lfs-pointer", "good", "nan", "good-2", "stuck", "good-3")
    process = start("run", "gate.yml", cwd=place)
    try:
        wait_until(lambda: judged(place) >= 4, process)
        yield process, place
    finally:
        for pid in [*children_of(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def judged(place: Path) -> int:
    """How many adapters the report on disk has: at any moment it is there and whole, or not there yet."""
    return len(strict_json(place / REPORT)["adapters"]) if (place / REPORT).exists() else 0


BEFORE_IT_HUNG = {
    "lfs-pointer": ("failed", "file-lfs-pointer"),
    "good": ("passed", None),
    "nan": ("failed", "adapter-nonfinite"),
    "good-2": ("passed", None),
}


def left_alone(place: Path) -> None:
    """The report of a run that was ended from outside: unfinished, and true."""
    report = report_of(place)
    assert report["complete"] is False
    assert verdicts(report) == BEFORE_IT_HUNG


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_a_signal_ends_a_run_in_order(number, stuck, wording) -> None:
    process, place = stuck
    (worker,) = children_of(process.pid)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 3
    assert time.monotonic() - began < STOPPED_WITHIN_S
    assert not alive(worker)
    left_alone(place)
    assert [file.name for file in (place / "merge-gate-report").iterdir() if file.suffix == ".tmp"] == []
    log = (place / "log").read_text()
    assert number.name in log.splitlines()[-2]
    assert "--cache" in log.splitlines()[-1]
    stopped, next_step = log.splitlines()[-2:]
    wording(stopped.partition("; ")[2], next_step)
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_run_is_refused_and_no_worker_outlives_a_kill(stuck: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, place = stuck
    before = (place / REPORT).read_bytes()
    answer = merge_gate("run", "gate.yml", cwd=place)
    assert answer.code == 2, answer.said
    assert "merge-gate-report" in answer.err
    assert (place / REPORT).read_bytes() == before
    (worker,) = children_of(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not alive(worker))
    left_alone(place)  # but for a half-written file, perhaps, which the next run removes


@pytest.mark.slow
def test_a_killed_worker_costs_the_adapter_that_it_was_judging(stuck: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, place = stuck
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 1
    report = report_of(place)
    assert report["complete"] is True
    assert verdicts(report) == BEFORE_IT_HUNG | {"stuck": ("error", "not-judged"), "good-3": ("passed", None)}
    (finding,) = [finding for one in report["adapters"] if one["name"] == "stuck" for finding in one["findings"]]
    assert "SIGKILL" in finding["message"]
    assert finding["hint"]


@pytest.mark.parametrize("delay_s", [0.03, 0.06, 0.1, 0.2, 0.4, 0.8])
def test_a_burst_of_signals_at_any_moment_leaves_no_traceback(delay_s: float, place: Path) -> None:
    """Before Python has come to the command, SIGINT ends the process as it ends any other."""
    configure(place, "good")
    process = start("run", "gate.yml", cwd=place)
    time.sleep(delay_s)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM) * 3:
        process.send_signal(number)
    code = process.wait(PATIENCE_S)
    log = (place / "log").read_text()
    assert code in {3, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}, log
    assert "Traceback" not in log or "merge_gate" not in log, log
    assert "race condition" not in log


def test_a_signal_after_the_last_word_leaves_the_verdict(place, capfd, wording) -> None:
    """The report is complete on disk before the terminal is told: a signal in between must not say otherwise."""
    configure(place, "lfs-pointer")
    script = (
        "import os, signal, sys; from merge_gate.run import view as terminal\n"
        "from merge_gate.cli.dispatch import main\n"
        "terminal.PlainView.finish = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(main(['run', 'gate.yml']))"
    )
    done = subprocess.run([COMMAND[0], "-P", "-c", script], cwd=place, env=environment(), check=False)
    assert done.returncode == 1, capfd.readouterr()
    assert report_of(place)["complete"] is True
    said = capfd.readouterr().err
    wording(said.splitlines()[-1])


def test_a_path_is_found_in_a_locale_without_its_letters(place: Path) -> None:
    shutil.copytree(place / "adapters" / "good", place / "adaptér")
    config = place / "gate.yml"
    config.write_text("version: 1\nadapters: [./adaptér]\n", encoding="utf-8")
    for changes in ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        for name in (config, "adaptér"):
            answer = merge_gate("check", name, cwd=place, **changes)
            assert answer.code == 0, answer.said


def test_check_can_be_interrupted(place: Path) -> None:
    for number in range(10_000):
        (place / "many" / f"adapter-{number:04}").mkdir(parents=True)
    configure(place, "./many/*")
    process = start("check", "gate.yml", cwd=place)
    memory = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: b"_yaml" in memory.read_bytes(), process)  # it reads the configuration, and then 10,000 adapters
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 3
    assert "Traceback" not in (place / "log").read_text()
