"""A stored report in every format is what the run wrote, without torch; what is no report is a usage error."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from merge_gate._internal.errors import ExitCode, UsageError
from merge_gate.cli.dispatch import main
from merge_gate.report.formats import json_report, terminal_text
from merge_gate.report.stored.report_files import FORMATS, WORDS, write_report
from merge_gate.report.stored.stored_report import compared, shown
from tests.support.reports import FAIL, PASS
from tests.support.tried import tried
from tests.support.wording import Wording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("word", WORDS)
def test_every_format_is_rendered_again_as_the_run_wrote_it(tmp_path: Path, word: str) -> None:
    write_report(FAIL, tmp_path)
    assert shown(str(tmp_path / "report.json"), word) == (tmp_path / WORDS[word]).read_text(encoding="utf-8")


def test_the_terminal_shows_the_end_of_the_run(tmp_path: Path) -> None:
    write_report(FAIL, tmp_path)
    assert shown(str(tmp_path / "report.json"), "terminal") == terminal_text.render(FAIL, "")


def test_every_file_has_a_word() -> None:
    assert set(WORDS.values()) == set(FORMATS)


def test_two_are_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json_report.render(PASS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json_report.render(FAIL), encoding="utf-8")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    text, code = compared(a, b, "terminal")
    assert (text.splitlines()[-1], code) == ("3 broke, 2 unchanged.", ExitCode.FAIL)
    text, code = compared(b, a, "markdown")
    assert (text.splitlines()[0], code) == ("## 3 vanished, 2 unchanged", ExitCode.PASS)


def test_what_cannot_be_read_is_a_usage_error(tmp_path: Path, wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        shown(str(tmp_path / "none.json"), "html")
    wording(caught.value)
    with pytest.raises(UsageError) as caught:
        shown(str(tmp_path), "html")
    wording(caught.value)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a directory": lambda path: path.mkdir(),
    "a terabyte": lambda path: os.truncate(path, 1 << 40) if path.write_bytes(b"{}") else None,
    "empty": lambda path: path.write_bytes(b""),
    "no UTF-8": lambda path: path.write_bytes(b"\xff"),
    "a list": lambda path: path.write_bytes(b"[]"),
    "nested 100,000 deep": lambda path: path.write_bytes(b"[" * 100_000),
    "NaN": lambda path: path.write_bytes(b'{"schema_version": NaN}'),
    "a key twice": lambda path: path.write_text(json_report.render(PASS).replace("{\n", '{"complete": true,\n', 1)),
    "cut off": lambda path: path.write_text(json_report.render(PASS)[:-9]),
    "an edited count": lambda path: path.write_text(json_report.render(FAIL).replace('"passed": ', '"passed": 9', 1)),
}


@pytest.mark.parametrize("make", tried("C11", "report show, diff, baseline, and attest", "exit 2, no hang", HOSTILE))
def test_a_hostile_report_is_a_usage_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "report.json")
    (tmp_path / "good.json").write_text(json_report.render(PASS), encoding="utf-8")
    name, good = str(tmp_path / "run"), str(tmp_path / "good.json")
    assert main(["report", "show", name]) == 2
    assert main(["report", "diff", name, good]) == main(["report", "diff", good, name]) == 2
    assert main(["report", "baseline", name]) == 2
    assert main(["attest", name]) == 2


@pytest.mark.attempt("T18", "attest a report that is a link, edited, or incomplete", "exit 2, a link is followed")
def test_a_report_behind_a_link_is_read(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json_report.render(PASS), encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    assert main(["attest", str(tmp_path / "link.json")]) == 0
    (tmp_path / "real.json").write_text(json_report.render(replace(PASS, complete=False)), encoding="utf-8")
    assert main(["attest", str(tmp_path / "link.json")]) == 2


def test_a_directory_stands_for_the_report_in_it(tmp_path: Path) -> None:
    write_report(FAIL, tmp_path)
    assert shown(str(tmp_path), "markdown") == shown(str(tmp_path / "report.json"), "markdown")


def test_the_command_prints_it_without_torch(tmp_path: Path) -> None:
    write_report(FAIL, tmp_path)
    code = (
        "import sys; from merge_gate.cli.dispatch import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "report", "show", str(tmp_path / "report.json")]
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    for word, name in WORDS.items():
        ended = subprocess.run([*command, "--format", word], check=False, capture_output=True, env=env)
        assert (ended.returncode, ended.stdout) == (0, (tmp_path / name).read_bytes()), ended.stderr
    (tmp_path / "broken.json").write_text("{}")
    ended = subprocess.run([*command[:-1], str(tmp_path / "broken.json")], check=False, capture_output=True, env=env)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert b"is not a report of merge-gate: schema_version is missing" in ended.stderr
