"""What a job on GitHub shows of a report: when it says pass, its outputs, annotations, and summary."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate.action.workflow import JobFacts
from merge_gate.ci import github
from merge_gate.cli import dispatch
from merge_gate.records.files import FileRecord
from merge_gate.records.report import Accepted, AdapterReport, PublishedModel, Report, Shard
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from merge_gate.report.stored.report_files import FORMATS, write_report
from merge_gate.report.wording import run_result
from tests.support.action.commands import decode, is_command, outputs_in
from tests.support.reports import (
    CRASHED,
    EMPTY,
    FAIL,
    FAILED,
    NAN,
    PASS,
    PASSED,
    ROUNDING,
    UNDECIDED,
    WARNED,
    hostile_reports,
    report,
)
from tests.support.reports import adapter as make_adapter
from tests.support.wording import Wording

ACCEPTED = Accepted(reason="known", owner="team-a", until="2099-12-31")
KNOWN = report(replace(FAILED, accepted=ACCEPTED))
SHARD = Shard(index=3, count=4, plan_sha256="0" * 64, versions_sha256="0" * 64, entries=3)


def shown(folder: Path, found: Report | str, **facts: object) -> dict[str, str]:
    """The outputs of a job, and its summary under the name `text`."""
    if isinstance(found, Report):
        write_report(found, folder)
    else:
        (folder / "report.json").write_text(found, encoding="utf-8")
    files = {name: folder / name for name in ("outputs", "text")}
    github.show(folder, JobFacts(output_file=str(files["outputs"]), summary_file=str(files["text"]), **facts))
    return {**outputs_in(files["outputs"]), "text": files["text"].read_text(encoding="utf-8")}


# --- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "found", "result"),
    [
        (0, PASS, "pass"),
        (1, FAIL, "fail"),
        (3, UNDECIDED, "error"),
        (0, KNOWN, "pass"),
        (1, KNOWN, None),
        (0, FAIL, None),
        (1, PASS, None),
        (2, PASS, None),
        (3, PASS, None),
        (-9, PASS, None),
        (0, EMPTY, None),
        (1, replace(FAIL, complete=False), None),
        (3, report(), None),
        (0, report(shard=SHARD), "pass"),
        (3, report(shard=replace(SHARD, entries=0)), None),
        (3, replace(PASS, complete=False, stale="pass"), None),
    ],
)
def test_pass_and_fail_need_exit_code_and_finished_report(
    tmp_path: Path, code: int, found: Report, result: str | None, wording: Wording
) -> None:
    """Without a verdict the job fails in any case, and code scanning gets nothing."""
    facts = {"fail_on": "never", "fail_on_not_judged": False, "uploads_sarif": True}
    said = shown(tmp_path, found, exit_code=code, last_lines="the last words", **facts)
    assert said["result"] == (result or "error")
    assert (said["conclusion"], said["upload-sarif"]) == (("success", "true") if result else ("failure", "false"))
    if result is None:
        wording(said["text"].partition("\n\n<!--")[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "{",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"result": "fail"', '"result": "pass"'),
        lambda text: text.replace('"failed": 2', '"failed": 1'),
        lambda text: text.replace('"schema_version": "1', '"schema_version": "2'),
        lambda text: text.replace('"severity": "error"', '"severity": 3'),
    ],
)
def test_a_report_that_cannot_be_used_is_no_verdict(tmp_path: Path, change) -> None:
    text = FORMATS["report.json"](FAIL)
    assert change(text) != text
    for code in (0, 1):
        said = shown(tmp_path, change(text), exit_code=code, uploads_report=True)
        assert (said["result"], said["failed"], said["upload"]) == ("error", "[]", "false")
        (tmp_path / "outputs").unlink()


def test_a_problem_of_the_runner_outranks_the_report(tmp_path: Path) -> None:
    """What was judged before is shown."""
    said = shown(tmp_path, FAIL, exit_code=1, problem="the container was lost\nand more", uploads_report=True)
    assert (said["result"], said["failed"], said["upload"]) == ("error", '["billing", "summaries"]', "true")
    assert said["headline"] == "merge-gate ERROR: the container was lost"
    assert said["text"].startswith("### merge-gate: error\n\n    the container was lost\n    and more\n\n<!--")


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_the_outputs_of_a_red_run(tmp_path: Path) -> None:
    said = shown(tmp_path, FAIL, exit_code=1, uploads_report=True)
    assert json.loads(said["counts"]) == {"passed": 2, "failed": 2, "error": 1}
    assert (said["passed"], said["failed"]) == ('["support", "legal"]', '["billing", "summaries"]')
    assert said["headline"] == f"merge-gate {run_result.verdict_line(FAIL)}"
    assert said["text"] == FORMATS["summary.md"](FAIL)
    assert said["report-path"] == str(tmp_path)
    names = ("report-json", "summary", "report-html", "sarif")
    assert [Path(said[name]).name for name in names] == ["report.json", "summary.md", "report.html", "report.sarif"]
    assert sorted(said["upload-path"].splitlines()) == sorted(str(tmp_path / name) for name in FORMATS)


def test_an_adapter_has_passed_if_it_has_in_every_dtype(tmp_path: Path) -> None:
    said = shown(tmp_path, report(PASSED, replace(FAILED, name="legal"), WARNED), exit_code=1)
    assert (said["passed"], said["failed"]) == ('["support"]', '["legal"]')


@pytest.mark.parametrize(
    ("entries", "fail_on", "not_judged", "fails"),
    [
        ([PASSED], "failed", True, False),
        ([PASSED, FAILED], "failed", True, True),
        ([PASSED, FAILED], "never", True, False),
        ([FAILED, CRASHED], "never", True, True),
        ([FAILED, CRASHED], "never", False, False),
        ([FAILED, CRASHED], "failed", False, True),
        ([PASSED, CRASHED], "failed", True, True),
        ([PASSED, CRASHED], "failed", False, False),
        ([WARNED], "failed", True, False),
        ([WARNED], "never", True, False),
        ([WARNED], "warning", True, True),
        ([PASSED], "warning", True, False),
        ([replace(FAILED, accepted=ACCEPTED)], "warning", True, False),
    ],
)
def test_what_fails_the_job(
    tmp_path: Path, entries: list[AdapterReport], fail_on: str, not_judged: bool, fails: bool, wording: Wording
) -> None:
    found = report(*entries)
    code = {"pass": 0, "fail": 1, "error": 3}[found.result.value]
    said = shown(tmp_path, found, exit_code=code, fail_on=fail_on, fail_on_not_judged=not_judged)
    assert said["result"] == found.result.value
    assert said["conclusion"] == ("failure" if fails else "success")
    wording(said["reason"])


def published(tmp_path: Path, *directories: str, verdict: Verdict = Verdict.PASSED) -> list[dict[str, str]]:
    files = (FileRecord(path="merge-gate.json", size_bytes=2, sha256="0" * 64),)
    entries = [
        make_adapter(f"a{index}", verdict, published=PublishedModel(directory=name, dtype="preserve", files=files))
        for index, name in enumerate(directories)
    ]
    return github.published(report(*entries), tmp_path)


def test_a_published_model_is_listed_with_the_digest_of_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "merge-gate.json").write_bytes(b"{}")
    assert published(tmp_path, str(folder)) == [
        {"name": "a0", "directory": str(folder), "dtype": "preserve", "sha256": hashlib.sha256(b"{}").hexdigest()}
    ]
    assert published(tmp_path.parent, str(folder)) == []
    assert published(tmp_path, str(folder), verdict=Verdict.ERROR) == []


def test_a_report_cannot_name_another_directory_as_published(tmp_path: Path) -> None:
    assert published(tmp_path, "/etc", "a\0b", "absent", f"{tmp_path}/absent", f"{tmp_path}/..") == []


def test_a_link_in_the_place_of_a_published_model_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "merge-gate.json").write_bytes(b"{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "merge-gate.json").symlink_to(tmp_path / "real" / "merge-gate.json")
    assert published(tmp_path, str(tmp_path / "link"), str(tmp_path / "b")) == []


@pytest.mark.parametrize(("found", "explains"), [(UNDECIDED, True), (PASS, False)])
def test_a_fork_without_a_token_is_told_why_nothing_was_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wording: Wording, found: Report, explains: bool
) -> None:
    said = shown(tmp_path, found, exit_code=3 if explains else 0, lacks_token=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::warning")]
    assert bool(warnings) is explains
    assert ("\n> This run is a pull request from a fork." in said["text"]) is explains
    if explains:
        wording(decode(warnings[0])[2])


# --- annotations -----------------------------------------------------------------------------------------------------


def entry(name: str, verdict: Verdict = Verdict.FAILED, *more: Finding, **changed: object) -> AdapterReport:
    finding = Finding(
        check="adapter-nonfinite", severity=Severity.ERROR, message="1 NaN", hint="release another", tensor="t.lora_B",
        origin=Origin.ADAPTER,
    )  # fmt: skip
    finding = replace(finding, **changed)
    cause = None if verdict is Verdict.PASSED else finding.check
    return make_adapter(name, verdict, cause=cause, findings=(*more, finding), line=7, column=5)


def test_an_annotation_points_at_the_entry(wording: Wording) -> None:
    (line,) = github.annotate(report(PASSED, entry("a:b,c", message="x: y, 100%")), "gate/config.yml")
    name, properties, data = decode(line)
    assert name == "error"
    wording(properties.pop("title"), data)
    assert properties == {"file": "gate/config.yml", "line": "7", "col": "5"}


def test_many_annotations_are_nine_and_a_count_failed_ones_first(wording: Wording) -> None:
    lines = github.annotate(report(CRASHED, *(entry(f"a{index}") for index in range(20))), "")
    assert len(lines) == 10
    assert [decode(line)[1]["title"].split()[0] for line in lines[:2]] == ["a0", "a1"]
    rest = decode(lines[9])[2]
    assert "12" in rest.split()
    wording(rest)
    assert "file" not in decode(lines[0])[1]


def test_what_is_so_in_several_dtypes_is_annotated_once() -> None:
    one, other = entry("x"), entry("x", check="merged-nonfinite")
    lines = github.annotate(report(one, other, replace(one)), "config.yml")
    titles = [decode(line)[1]["title"] for line in lines]
    assert [title.rpartition(" ")[2] for title in titles] == ["adapter-nonfinite", "merged-nonfinite"]


def test_a_failure_that_is_accepted_is_a_warning_after_the_errors() -> None:
    lines = github.annotate(report(replace(entry("known"), accepted=ACCEPTED), entry("new")), "")
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::warning"]
    assert "known" in decode(lines[1])[1]["title"].split()


def test_the_finding_that_decided_is_the_one_that_is_told() -> None:
    other = replace(NAN, check="no-effect", message="nothing changes")
    judged = entry("x", Verdict.FAILED, ROUNDING, other)
    assert decode(github.annotate(report(judged), "")[0])[2].startswith("1 NaN")


def test_a_place_that_the_message_names_is_not_repeated() -> None:
    assert github.annotate(report(entry("x", message="t.lora_B holds 1 NaN")), "")[0].count("t.lora_B") == 1


def test_an_adapter_without_a_finding_still_is_an_error(wording: Wording) -> None:
    bare = make_adapter("x", Verdict.ERROR, cause=None, findings=())
    level, properties, data = decode(github.annotate(report(bare), "")[0])
    assert level == "error"
    wording(properties["title"], data)


def test_a_warning_is_annotated_only_if_it_fails_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fail_on, count in (("warning", 1), ("failed", 0)):
        shown(tmp_path, PASS, exit_code=0, fail_on=fail_on, file="gate.yml")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
        assert len(lines) == count
        for name, properties, _ in map(decode, lines):
            assert (name, properties["title"]) == ("warning", f"legal passed: {ROUNDING.check}")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", ["{", "[]", '{"x": 1}', '{"exit_code": "0"}', '{"output_file": "/nowhere/output"}'])
def test_a_wrong_call_of_the_command_is_a_sentence(
    tmp_path: Path, facts: str, capsys: pytest.CaptureFixture[str], wording: Wording
) -> None:
    assert dispatch.main(["ci", "github", str(tmp_path), facts]) == 2
    wording(capsys.readouterr().err)


def test_a_report_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "other").write_text(FORMATS["report.json"](PASS), encoding="utf-8")
    (tmp_path / "report.json").symlink_to(tmp_path / "other")
    report, problem = github.read(tmp_path, JobFacts(exit_code=0))
    assert report is None
    assert "symbolic link" in problem


# --- hostile text ----------------------------------------------------------------------------------------------------


@given(hostile_reports(), st.sampled_from(("failed", "warning")))
def test_no_text_of_a_report_is_a_command_or_an_output(
    tmp_path_factory: pytest.TempPathFactory, found: Report, fail_on: str
) -> None:
    lines = github.annotate(found, "gate.yml", warnings=fail_on == "warning")
    for line in lines:
        assert "\n" not in line
        assert "\r" not in line
        name, properties, _ = decode(line)
        assert name in {"error", "warning"}
        assert set(properties) <= {"file", "line", "col", "title"}
    folder = tmp_path_factory.mktemp("hostile")
    said = shown(folder, found, exit_code=0, fail_on=fail_on)
    assert re.fullmatch(r"[A-Za-z0-9 ,.:;()/_+%-]*", said["headline"])
    assert not is_command(said["headline"])
    assert not [line for line in said["reason"].splitlines() if is_command(line)]
    assert set(said) == {
        "result", "failed", "passed", "counts", "headline", "published", "report-path", "report-json", "report-html",
        "sarif", "summary", "upload", "upload-path", "conclusion", "reason", "upload-sarif", "text",
    }  # fmt: skip
