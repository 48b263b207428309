"""Wrong usage: exit code 2 and a sentence, before anything is judged or written; in this process."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.report.stored.report_files import write_report
from tests.support.command import Answer, environment, merge_gate
from tests.support.demo_place import configure, readable, tree
from tests.support.reports import PASS


@pytest.fixture
def place(demo: Path, tmp_path: Path) -> Path:
    """A private copy of the demo's base and adapters."""
    for name in ("base", "adapters"):
        shutil.copytree(demo / name, tmp_path / name)
    return tmp_path


def nothing(_: Path) -> None:
    """The command line alone does it."""


def reports(place: Path) -> None:
    """A report, a link to it, and another tool's file."""
    (place / "other.xml").write_text("<testsuites/>")
    write_report(PASS, place / "old")
    (place / "link.json").symlink_to("old/report.json")


USAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no-command": (nothing, (), "check"),
    "command-left-out": (nothing, ("adapters/good",), "`merge-gate run adapters/good`"),
    "command-left-out-of-a-file": (nothing, ("gone.yml", "--refresh"), "`merge-gate run gone.yml`"),
    "command-left-out-in-its-directory": (nothing, ("adapters",), "`merge-gate run adapters`"),
    "command-left-out-of-a-hostile-name": (nothing, ("\x1b[31m\n::error::x/",), "`merge-gate run '"),
    "near-a-command": (nothing, ("chek", "gate.yml"), '"check"'),
    "near-no-command": (nothing, ("zzz",), '"zzz"'),
    "near-an-option": (nothing, ("--verison",), '"--version"'),
    "no-default-config": (nothing, ("run", "--refresh"), "merge-gate.yml"),
    "an-abbreviation": (nothing, ("run", "gate.yml", "--refres"), '"--refresh"'),
    "report-without-a-command": (nothing, ("report", "out/report.json"), "`merge-gate report show out/report.json`"),
    "two-reports-without-a-command": (nothing, ("report", "a/", "b/"), "`merge-gate report diff a/ b/`"),
    "report-with-another-command": (nothing, ("report", "shwo"), '"show"'),
    "report-alone": (nothing, ("report",), "report show"),
    "near-no-option": (nothing, ("-q",), '"-q"'),
    "near-an-option-of-run": (nothing, ("run", "gate.yml", "--ouptut=x"), '"--output"'),
    "empty-dtype": (nothing, ("run", "adapters/good", "--dtype", " "), "--dtype"),
    "empty-name": (nothing, ("check", ""), "CONFIG|ADAPTER"),
    "option-of-run": (nothing, ("check", "adapters/good", "--dtype", "float16"), '"--dtype"'),
    "gone-rebuild": (nothing, ("rebuild", "merged/good", "--output", "again"), "`merge-gate verify`"),
    "gone-attest": (nothing, ("attest", "merged/good"), "`cosign attest-blob`"),
    "gone-read": (nothing, ("run", "gate.yml", "--read=touched"), "reads all of the base"),
    "gone-keys": (nothing, ("verify", "out", "--key", "key.pem"), "`cosign attest-blob`"),
    "list-with-a-blank": (nothing, ("run", "adapters/good", "--dtype", "float16,", "float32"), '"float32"'),
    "bad-device-index": (nothing, ("run", "gate.yml", "--device", "cuda:x"), "cuda:x"),
    "unknown-schema": (nothing, ("schema", "verdict"), "verdict"),
    "unknown-only-near-one": (nothing, ("run", "gate.yml", "--only", "goood"), '"good"'),
    "unknown-only-near-none": (nothing, ("run", "gate.yml", "--only", "zzz"), "good"),
    "several-only": (nothing, ("run", "gate.yml", "--only", "good,good"), "--only good --only good"),
    "unknown-only-of-check": (nothing, ("check", "gate.yml", "--only", "goood"), "--only goood"),
    "empty-list-of-check": (configure, ("check", "gate.yml"), "gate.yml:1:"),
    "empty-glob": (lambda place: configure(place, "./adapters/team-*"), ("run", "gate.yml"), "team-*"),
    "config-in-no-directory": (nothing, ("run", "gone/gate.yml"), "gone"),
    "config-a-directory": (nothing, ("run", "adapters"), "directory"),
    "config-binary": (lambda place: (place / "gate.yml").write_bytes(bytes(range(256))), ("run", "gate.yml"), "UTF-8"),
    "config-empty": (lambda place: (place / "gate.yml").write_bytes(b""), ("run", "gate.yml"), "gate.yml:1:1"),
    "config-deep": (lambda place: (place / "gate.yml").write_text("[" * 9000), ("run", "gate.yml"), "gate.yml"),
    "config-a-device": (nothing, ("run", "/dev/zero"), "larger than"),
    "config-with-hostile-name": (nothing, ("run", "\x1b[31m\n::error::x\udcff.yml"), ".yml"),
    "config-a-broken-link": (lambda place: (place / "dangling.yml").symlink_to("gone.yml"), ("run", "dangling.yml"),
                             '"gone.yml"'),
    "adapter-a-broken-link": (lambda place: (place / "dangling").symlink_to("gone"), ("run", "dangling/"), '"gone"'),
    "a-report": (lambda place: write_report(PASS, place / "out"), ("run", "out/report.json", "--output", "out"),
                 '"out/report.json"'),
    "output-below-a-file": (nothing, ("run", "gate.yml", "--output", "gate.yml/out"), "gate.yml/out"),
    "output-not-writable": (nothing, ("run", "gate.yml", "--output", "/proc/out"), "/proc/out"),
    "output-nameless": (nothing, ("run", "gate.yml", "--output", "x" * 300), "x" * 20),
    "demo-a-file": (nothing, ("demo", "gate.yml"), "gate.yml"),
    # copies of the report, which replace nothing that the gate did not write
    "not a format": (reports, ("run", "gate.yml", "--report", "yaml=x"), "yaml=x"),
    "no file": (reports, ("run", "gate.yml", "--report", "json="), "json="),
    "another tool's file": (reports, ("run", "gate.yml", "--report", "junit=other.xml"), "other.xml"),
    "another format's file": (reports, ("run", "gate.yml", "--report", "html=old/report.json"), "report.json"),
    "a link": (reports, ("run", "gate.yml", "--report", "json=link.json"), "link.json"),
    "a directory": (reports, ("run", "gate.yml", "--report", "json=adapters"), "adapters"),
    "a file of the output": (reports, ("run", "gate.yml", "--report", "html=merge-gate-report/junit.xml"), "junit.xml"),
    "below a file": (reports, ("run", "gate.yml", "--report", "html=other.xml/page.html"), "other.xml"),
    "one place twice": (nothing, ("check", "adapters/good", "--report", "json=-", "--report", "sarif=-"), '"-"'),
    # what cannot be had together
    "a base for a file": (nothing, ("run", "gate.yml", "--base", "./base"), "--base"),
    "a severity for a file": (nothing, ("run", "gate.yml", "--set", "no-effect=off"), "--set"),
    "pickles for a file": (nothing, ("run", "gate.yml", "--allow-pickle"), "--allow-pickle"),
    "no severity": (nothing, ("run", "adapters/good", "--set", "no-effect"), "no-effect"),
    "a limit that is no number": (nothing, ("run", "adapters/good", "--set", "headroom=error:much"),
                                  "headroom=error:much"),
    "two severities of one check":
        (nothing, ("run", "adapters/good", "--set", "no-effect=off", "--set", "no-effect=on"), "no-effect"),
    "nothing expected": (nothing, ("run", "adapters/good", "--expect", "r="), "'r='"),
    "a file for a container": (nothing, ("run", "adapters/good", "--container"), "--container"),
    "Ray in a container": (nothing, ("run", "gate.yml", "--container", "--ray", "auto"), "--ray"),
    "an image without a container": (nothing, ("run", "gate.yml", "--image", "x:y"), "--image"),
    "GPUs without a container": (nothing, ("run", "gate.yml", "--gpus", "0"), "--gpus"),
    "Ray and a shard": (nothing, ("run", "gate.yml", "--ray", "auto", "--shard", "1/2"), "--ray"),
    "a part that is none": (nothing, ("run", "gate.yml", "--shard", "0/2"), "'0/2'"),
    "more parts than there are": (nothing, ("run", "gate.yml", "--shard", "3/2"), "3/2"),
}  # fmt: skip
USAGE_BY_PROCESS = ("no-command", "config-with-hostile-name", "unknown-only-near-one", "output-not-writable")
"""Those that are tried with the real command too."""


WORDED = {
    "command-left-out", "near-a-command", "near-no-command", "near-no-option", "no-default-config",
    "report-with-another-command", "option-of-run", "gone-rebuild", "gone-keys", "list-with-a-blank",
    "unknown-only-near-none", "several-only", "config-a-broken-link", "a-report",
    "not a format", "no file", "another tool's file", "another format's file", "a link", "a directory",
    "a file of the output", "below a file", "one place twice",
    "a base for a file", "a severity for a file", "pickles for a file", "no severity",
    "a limit that is no number", "two severities of one check", "nothing expected", "a file for a container",
    "Ray in a container", "an image without a container", "GPUs without a container", "Ray and a shard",
    "a part that is none", "more parts than there are",
}  # fmt: skip
"""The other sentences are in the goldens of configurations, of the output directory, and of users' mistakes."""


@pytest.mark.parametrize("name", USAGE)
def test_2_when_there_is_nothing_to_judge(name, place, variables, cwd, capsys, wording) -> None:
    """In this process, which takes a hundredth of the time that a command takes to start."""
    arrange, words, _ = USAGE[name]
    before = arranged(place, arrange)
    kept = environment()
    variables.clear()
    variables.update(kept)
    os.chdir(place)
    try:
        code = main(list(words))
    except SystemExit as left:
        code = int(str(left.code))
    said = capsys.readouterr()
    nothing_judged(name, place, Answer(code, said.out, said.err), before)
    if name in WORDED:
        wording(said.err.rpartition("error: ")[2])


@pytest.mark.parametrize("name", USAGE_BY_PROCESS)
def test_2_is_the_exit_code_of_the_process(name: str, place: Path) -> None:
    arrange, words, _ = USAGE[name]
    before = arranged(place, arrange)
    nothing_judged(name, place, merge_gate(*words, cwd=place), before)


def arranged(place: Path, arrange: Callable[[Path], object]) -> dict[str, str]:
    """Write a config of a good adapter, change what `arrange` changes, and return the digests of all files."""
    configure(place, "good")
    arrange(place)
    return tree(place)


def nothing_judged(name: str, place: Path, answer: Answer, before: dict[str, str]) -> None:
    _, _, names = USAGE[name]
    assert answer.code == 2, answer.said
    readable(answer)
    assert answer.out == ""
    assert names in answer.err
    assert "\x1b" not in answer.err
    assert not any(line.startswith("::") for line in answer.err.splitlines()), answer.err
    assert tree(place) == before
    assert not (place / "merge-gate-report").exists()


@pytest.mark.parametrize("words", [("run", "/nowhere"), ("check", "/nowhere"), ("report", "show", "x"), ("init", ".")])
def test_a_deleted_directory_is_named(words: tuple[str, ...], cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cwd.rmdir()
    try:
        assert main([*words]) == 2
        assert main(["explain", "no-effect"]) == 0
    finally:
        cwd.mkdir()
    assert "the current directory no longer exists" in capsys.readouterr().err
