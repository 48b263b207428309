"""When the step says pass: exit code and finished report agree, and the report agrees with itself."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_gate.action import outcome
from tests.support.action.step_files import changed, entry_of, report
from tests.support.wording import Wording


def accepted(**changed: object) -> dict:
    """One that failed, and that the baseline accepts."""
    entry = entry_of("failed") | {"accepted": {"reason": "known", "owner": "team-a", "until": "2026-12-31"}}
    return report("fail") | {"result": "pass", "adapters": [entry], "accepted": 1} | changed


def decided(place: Path, code: int, found: object, **more: Any) -> outcome.StepOutcome:
    path = place / "report.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    return outcome.decide(code, path, **more)


@pytest.mark.parametrize(
    ("code", "found", "result"),
    [
        (0, report("pass"), "pass"),
        (1, report("fail"), "fail"),
        (3, report("error"), "error"),
        (0, accepted(), "pass"),
        (0, accepted(accepted=0), "error"),
        (0, accepted(accepted=2), "error"),
        (1, accepted(result="fail"), "error"),
        (0, report("fail", accepted=1) | {"result": "pass"}, "error"),
        (0, report("fail"), "error"),
        (1, report("pass"), "error"),
        (0, report("pass", complete=False), "error"),
        (1, report("fail", complete=False), "error"),
        (3, report("pass"), "error"),
        (2, report("pass"), "error"),
        (-9, report("pass"), "error"),
        (0, report("pass", adapters=0), "error"),
        (0, report("pass", schema_version="2.0"), "error"),
        (0, report("pass") | {"result": "ok"}, "error"),
        (0, report("pass", complete="yes"), "error"),
        (0, report("pass", adapters=1) | {"adapters": [{}]}, "error"),
        (0, [], "error"),
        (0, "{", "error"),
    ],
)
def test_pass_and_fail_need_exit_code_and_finished_report(tmp_path, code, found, result, wording) -> None:
    said = decided(tmp_path, code, found)
    assert said.result == result
    assert bool(said.problem) is (said.result == "error" and (code, found) != (3, report("error")))
    assert said.report is None or code != 2, "next to a usage error, it is of another run"
    if said.problem:
        wording(said.problem)


@pytest.mark.parametrize(
    ("shard", "result"),
    [
        ({"entries": 3, "positions": []}, "pass"),
        ({"entries": 0, "positions": []}, "error"),
        ({"entries": 3, "positions": [1]}, "error"),
        ({"entries": "3", "positions": []}, "error"),
        ("1/2", "error"),
    ],
)
def test_a_shard_without_adapters_passes_and_a_run_does_not(tmp_path: Path, shard, result: str) -> None:
    assert decided(tmp_path, 0, report("pass", adapters=0, shard=shard)).result == result


def test_without_a_report_the_gates_last_words_are_repeated(tmp_path: Path, wording: Wording) -> None:
    said = outcome.decide(2, tmp_path / "report.json", ["gate.yml:3:1: unknown key"])
    assert (said.result, said.problem.splitlines()[1:]) == ("error", ["gate.yml:3:1: unknown key"])
    lost = outcome.decide(0, tmp_path / "report.json")
    assert lost.result == "error"
    wording(lost.problem)


COUNTS = {"passed": 1, "failed": 0, "error": 0}
ODD: dict[str, Callable[[dict], object]] = {
    "another result": lambda made: made.update(result="pass"),
    "other counts": lambda made: made.update(counts=COUNTS),
    "other counts and another result": lambda made: made.update(counts=COUNTS, result="pass"),
    "no counts": lambda made: made.update(counts={}),
    "an adapter more": lambda made: made["adapters"].append(made["adapters"][0] | {"verdict": "error"}),
    "a text as a finding": lambda made: made["adapters"][0].update(findings=["x"]),
    "an empty finding": lambda made: made["adapters"][0].update(findings=[{}]),
    "no severity": lambda made: made["adapters"][0]["findings"][0].update(severity=None),
    "a list as a message": lambda made: made["adapters"][0]["findings"][0].update(message=["x"]),
    "no tensor": lambda made: made["adapters"][0]["findings"][0].pop("tensor"),
    "a number as the cause": lambda made: made["adapters"][0].update(cause=3),
    "another verdict": lambda made: made["adapters"][0].update(verdict="good"),
    "a pass with an error": lambda made: (
        made["adapters"][0].update(verdict="passed", cause=None),
        made.update(counts=COUNTS, result="pass"),
    ),
    "a cause that is no error": lambda made: made["adapters"][0].update(cause="headroom"),
    "a failure without a cause": lambda made: made["adapters"][0].update(cause=None),
    "an error without a cause": lambda made: (
        made["adapters"][0].update(verdict="error", cause=None, findings=[]),
        made.update(counts={"passed": 0, "failed": 0, "error": 1}, result="error"),
    ),
    "an accepted pass": lambda made: (
        made["adapters"][0].update(verdict="passed", cause=None, findings=[], accepted={"reason": "r"}),
        made.update(counts=COUNTS, result="pass"),
    ),
}


@pytest.mark.parametrize("change", ODD)
def test_a_report_that_contradicts_itself_is_no_verdict(tmp_path: Path, change: str, wording: Wording) -> None:
    for code in (0, 1):
        said = decided(tmp_path, code, changed(ODD[change]))
        assert (said.result, said.report) == ("error", None)
        wording(said.problem)


def test_a_report_nested_without_end_is_a_sentence(tmp_path: Path, wording: Wording) -> None:
    wording(decided(tmp_path, 0, "[" * 100_000).problem)


def test_a_report_beside_a_planted_file_is_no_verdict(tmp_path: Path, wording: Wording) -> None:
    said = decided(tmp_path, 0, report("pass"), refused=["summary.md was not taken: it is a symbolic link"])
    assert said.result == "error"
    wording(said.problem)


def entries(*verdicts: str, warns: bool = False, **more: object) -> dict:
    finding = {"check": "headroom", "severity": "warning", "message": "m", "hint": None, "tensor": None}
    listed = [
        {"name": f"a{index}", "verdict": verdict, "cause": None, "findings": [finding] if warns else []}
        for index, verdict in enumerate(verdicts)
    ]
    return {"complete": True, "adapters": listed, **more}


@pytest.mark.parametrize(
    ("verdicts", "fail_on", "not_judged", "fails"),
    [
        (["passed"], "failed", True, False),
        (["passed", "failed"], "failed", True, True),
        (["passed", "failed"], "never", True, False),
        (["failed", "error"], "never", True, True),
        (["failed", "error"], "never", False, False),
        (["failed", "error"], "failed", False, True),
        (["passed", "error"], "failed", True, True),
        (["passed", "error"], "failed", False, False),
        ([], "failed", True, False),
    ],
)
def test_what_fails_the_job(verdicts: list[str], fail_on: str, not_judged: bool, fails: bool, wording: Wording) -> None:
    result = "fail" if "failed" in verdicts else "error" if "error" in verdicts else "pass"
    found = outcome.StepOutcome(result, entries(*verdicts))
    decided, reason = outcome.conclude(found, fail_on, fail_on_not_judged=not_judged)
    assert decided is fails
    assert reason or result == "pass"
    wording(reason)


@pytest.mark.parametrize(("fail_on", "fails"), [("failed", False), ("warning", True), ("never", False)])
def test_a_warning_fails_the_job_if_it_is_asked_to(fail_on: str, fails: bool) -> None:
    found = outcome.StepOutcome("pass", entries("passed", warns=True))
    assert outcome.conclude(found, fail_on, fail_on_not_judged=True)[0] is fails
    assert not outcome.conclude(outcome.StepOutcome("pass", entries("passed")), fail_on, fail_on_not_judged=True)[0]
    known = entries("failed", warns=True)
    known["adapters"][0]["accepted"] = {"reason": "known"}
    assert not outcome.conclude(outcome.StepOutcome("pass", known), fail_on, fail_on_not_judged=True)[0]


@pytest.mark.parametrize("found", [None, entries("passed")])
def test_a_run_without_a_complete_report_fails_the_job(found: dict | None) -> None:
    lost = outcome.StepOutcome("error", found, "it was lost")
    assert outcome.conclude(lost, "never", fail_on_not_judged=False)[0]


def test_an_adapter_has_passed_if_it_has_in_every_dtype() -> None:
    found = entries("passed", "passed", "failed", "error")
    found["adapters"][1]["name"] = "a2"
    assert outcome.passed_names(found) == ["a0"]
    assert outcome.failed_names(found) == ["a2"]


@pytest.mark.parametrize(
    ("result", "problem", "summary", "line"),
    [
        (
            "fail",
            "",
            "<!-- generator: merge-gate -->\n\n## ❌ merge-gate FAIL&#58; 2 of 6 adapters failed\n\nmore",
            "merge-gate FAIL: 2 of 6 adapters failed",
        ),
        (
            "pass",
            "",
            "## ✅ merge-gate PASS, but 1 adapter has warnings",
            "merge-gate PASS, but 1 adapter has warnings",
        ),
        ("pass", "", "## ❌ merge-gate FAIL: 2 of 6 adapters failed", "merge-gate PASS"),
        ("error", "", "no heading", "merge-gate ERROR"),
        ("error", "no engine at 'x'\nWhat to do: y", "## ✅ merge-gate PASS: a", "merge-gate ERROR: no engine at x"),
        ("fail", "", "## ❌ merge-gate FAIL: $(id)`id`\"';&|<>::a\x1b名", "merge-gate FAIL: (id)id;:a"),
    ],
)
def test_the_headline_is_a_line_that_nothing_interprets(result: str, problem: str, summary: str, line: str) -> None:
    assert outcome.headline(outcome.StepOutcome(result, entries(), problem), summary) == line


def test_a_published_model_is_listed_with_its_manifests_digest(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "merge-gate.json").write_bytes(b"{}")
    found = report("pass")
    found["adapters"][0]["published"] = {"directory": str(folder), "dtype": "preserve", "files": []}
    assert outcome.published(found, tmp_path) == [
        {"name": "a", "directory": str(folder), "dtype": "preserve", "sha256": hashlib.sha256(b"{}").hexdigest()}
    ]
    assert outcome.published(found, None) == []
    assert outcome.published(found, tmp_path.parent) == []
    found["adapters"][0]["verdict"] = "failed"
    assert outcome.published(found, tmp_path) == []


@pytest.mark.parametrize(
    "model", [None, 3, {}, {"directory": 3}, {"directory": "/etc"}, {"directory": "a\0b"}, {"directory": "absent"}]
)
def test_a_report_cannot_name_another_directory_as_published(tmp_path: Path, model: object) -> None:
    found = report("pass")
    found["adapters"][0]["published"] = model
    assert outcome.published(found, tmp_path) == []


def test_a_link_in_the_place_of_a_published_model_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "merge-gate.json").write_bytes(b"{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "merge-gate.json").symlink_to(tmp_path / "real" / "merge-gate.json")
    found = report("pass")
    for name in ("link", "b"):
        found["adapters"][0]["published"] = {"directory": str(tmp_path / name)}
        assert outcome.published(found, tmp_path) == []
