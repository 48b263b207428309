"""A stored report in every format is what the run wrote, without torch; two are compared; others are refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from merge_gate._internal.errors import ExitCode, UsageError
from merge_gate.cli.dispatch import main
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import json_report, terminal_text
from merge_gate.report.formats.json_report import RenderedAdapters
from merge_gate.report.stored.report_files import FORMATS, WORDS, write_report
from merge_gate.report.stored.stored_report import Changes, Kind, compare, compared, render_markdown, render_text, shown
from tests.support.reports import (
    BASE,
    CRASHED,
    ENVIRONMENT,
    FAIL,
    FAILED,
    HALF,
    NAN,
    OVERFLOW,
    PASS,
    PASSED,
    ROUNDING,
    WARNED,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
)
from tests.support.tried import tried
from tests.support.wording import Wording


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
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError) as caught:
            shown(str(place), "html")
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


@pytest.mark.parametrize("make", tried("C11", "report show, diff, and baseline", "exit 2, no hang", HOSTILE))
def test_a_hostile_report_is_a_usage_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "report.json")
    (tmp_path / "good.json").write_text(json_report.render(PASS), encoding="utf-8")
    name, good = str(tmp_path / "run"), str(tmp_path / "good.json")
    assert main(["report", "show", name]) == 2
    assert main(["report", "diff", name, good]) == main(["report", "diff", good, name]) == 2
    assert main(["report", "baseline", name]) == 2


@pytest.mark.attempt("T18", "show a report that is a link", "a link is followed")
def test_a_report_behind_a_link_is_read(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json_report.render(PASS), encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    assert main(["report", "show", str(tmp_path / "link.json")]) == 0


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


BROKEN = replace(PASSED, verdict=Verdict.FAILED, cause=NAN.check, findings=(NAN,))
UNDECIDED = replace(CRASHED, name="support")
WORN = replace(PASSED, findings=(ROUNDING,))


def kinds(changes: Changes) -> list[tuple[str, str]]:
    return [(change.kind.value, change.adapter.name) for change in changes.changes]


@pytest.mark.parametrize(
    ("old", "new", "kind", "code"),
    [
        (PASSED, BROKEN, Kind.BROKE, ExitCode.FAIL),
        (PASSED, UNDECIDED, Kind.BROKE, ExitCode.FAIL),
        (None, BROKEN, Kind.BROKE, ExitCode.FAIL),
        (UNDECIDED, BROKEN, Kind.WORSE, ExitCode.FAIL),
        (PASSED, WORN, Kind.WORSE, ExitCode.FAIL),
        (BROKEN, replace(BROKEN, findings=(NAN, ROUNDING)), Kind.WORSE, ExitCode.FAIL),
        (BROKEN, replace(BROKEN, findings=(OVERFLOW,)), Kind.OTHER, ExitCode.FAIL),
        (BROKEN, PASSED, Kind.FIXED, ExitCode.PASS),
        (WORN, PASSED, Kind.BETTER, ExitCode.PASS),
        (PASSED, None, Kind.VANISHED, ExitCode.PASS),
        (None, PASSED, Kind.NEW, ExitCode.PASS),
    ],
)
def test_what_happened_to_an_adapter(old: Any, new: Any, kind: Kind, code: ExitCode) -> None:
    same = adapter("same")
    changes = compare(report(same, *filter(None, [old])), report(same, *filter(None, [new])))
    assert (kinds(changes), changes.unchanged) == ([(kind.value, "support")], 1)
    assert changes.exit_code is code
    assert f"1 {kind}" in render_text(changes).splitlines()[-1]


def test_time_place_and_wording_are_no_change() -> None:
    moved = replace(WARNED, line=90, seconds=7.0, findings=(replace(ROUNDING, message="x"),))
    assert compare(report(WARNED), report(moved)).changes == ()


def test_another_dtype_is_another_entry() -> None:
    both = report(PASSED, replace(BROKEN, base=HALF))
    assert kinds(compare(both, report(PASSED))) == [("vanished", "support")]


def test_a_base_is_the_same_however_its_path_is_written() -> None:
    one, other = (replace(PASSED, base=replace(BASE, model=model)) for model in ("./b", "b/"))
    assert compare(report(one), report(other)).changes == ()
    elsewhere = replace(PASSED, base=replace(BASE, model="c"))
    assert [change.kind for change in compare(report(one), report(elsewhere)).changes] == [Kind.VANISHED, Kind.NEW]


def test_a_newer_run_that_did_not_finish_proves_nothing(wording: Wording) -> None:
    assert compare(report(PASSED), report(PASSED, complete=False)).exit_code is ExitCode.ERROR
    wording(render_text(compare(report(PASSED), report(PASSED, complete=False))))


def test_versions_are_named() -> None:
    newer = replace(ENVIRONMENT, peft="0.22.0", bitsandbytes="0.51.0")
    text = render_text(compare(PASS, replace(PASS, environment=newer)))
    assert text.splitlines() == [
        "version    peft 0.21.2 → 0.22.0",
        "version    bitsandbytes absent → 0.51.0",
        "2 unchanged.",
    ]


def test_word_for_word() -> None:
    changes = compare(report(PASSED, FAILED), report(BROKEN, replace(PASSED, name="billing")))
    assert max(map(len, render_text(changes, width=70).splitlines())) <= 70
    text = render_text(changes, width=200)
    assert text.splitlines() == [
        "broke      support (bfloat16): passed → failed (adapter-nonfinite)",
        f"           adapter-nonfinite: {NAN.message}",
        "fixed      billing (bfloat16): failed (adapter-nonfinite) → passed",
        "1 broke, 1 fixed, 0 unchanged.",
    ]


@given(hostile_reports(), hostile_reports())
def test_any_two_reports(old: Any, new: Any) -> None:
    changes = compare(old, new)
    for text in (render_text(changes), render_markdown(changes)):
        assert not any(runner_obeys(line) for line in lines_of(text))
        assert all(line.isprintable() for line in lines_of(text))


@given(hostile_reports())
def test_a_report_is_as_itself(run: Any) -> None:
    assert compare(run, run).changes == ()


def test_markdown_is_a_table() -> None:
    markdown = render_markdown(compare(report(PASSED), FAIL))
    assert markdown.startswith("## 3 broke, 1 new, 1 unchanged")
    assert "| broke | `billing` (bfloat16) | absent → failed (adapter-nonfinite) |" in markdown


ONE, TWO = adapter("one"), adapter("two")


def test_a_text_is_reused_for_an_adapter_of_the_last_report() -> None:
    made: list[str] = []

    def make(adapter: AdapterReport) -> str:
        made.append(adapter.name)
        return adapter.name

    rendered = RenderedAdapters()
    for adapters in ([ONE], [TWO, ONE, ONE], [TWO, replace(ONE)], [TWO], [ONE]):
        assert rendered.texts(make, adapters) == [adapter.name for adapter in adapters]
    assert made == ["one", "two", "one", "one"], "an equal adapter is another one, and a text is kept for one report"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PASS, FAIL),
        (FAIL, PASS),
        (FAIL, replace(FAIL, config=config_file("elsewhere.yml"))),
        (FAIL, replace(FAIL, adapters=FAIL.adapters[::-1])),
        (replace(in_two_dtypes(), adapters=in_two_dtypes().adapters[1:]), in_two_dtypes()),
    ],
)
def test_a_report_does_not_depend_on_the_one_before(before: Report, after: Report) -> None:
    rendered = RenderedAdapters()
    same = tuple(next((own for own in after.adapters if own == one), one) for one in before.adapters)
    json_report.render(replace(before, adapters=same), rendered)
    fresh = json_report.render(replace(after, adapters=tuple(replace(one) for one in after.adapters)))
    assert json_report.render(after, rendered) == fresh
