"""report.sarif: as the standard has it, the same fingerprint for the same finding, and no name is anything but text.

Its official schema is in no package that `make test` needs: tests/e2e/test_report.py validates against it.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import WITHOUT_SETTING
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.report import TOOL, BaseReport, Tool
from merge_gate.records.terms import Quantization, Verdict
from merge_gate.report.formats.sarif import MAX_RESULTS, render
from tests.support.reports import (
    ATTACKS,
    EMPTY,
    FAIL,
    FAILED,
    NAN,
    PASS,
    ROUNDING,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
)
from tests.support.wording import Wording


def parse(run: Any) -> dict[str, Any]:
    text = render(run)
    assert text.isascii()
    assert not any(map(runner_obeys, lines_of(text)))
    document = json.loads(text)
    assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
    rules = document["runs"][0]["tool"]["driver"]["rules"]
    for result in document["runs"][0]["results"]:
        assert result["level"] in {"error", "warning"}
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] >= 1
        assert location["physicalLocation"]["artifactLocation"]["uri"].isprintable()
        assert "ruleIndex" not in result or rules[result["ruleIndex"]]["id"] == result["ruleId"]
    return document["runs"][0]


def test_what_is_so_in_several_dtypes_is_one_result() -> None:
    missing, rounding = parse(in_two_dtypes())["results"]
    assert (missing["ruleId"], missing["properties"]["dtype"]) == ("keys-missing", "bfloat16; float16")
    assert missing["message"]["text"].startswith("a (bfloat16; float16): ")
    assert (rounding["ruleId"], rounding["properties"]["dtype"]) == ("rounding-loss", "bfloat16")


@pytest.mark.parametrize(("version", "shown"), [("1.0.0", "1.0.0"), ("1.0.0.dev0", "1.0.0-dev.0")])
def test_the_version_is_semantic(version: str, shown: str) -> None:
    driver = parse(replace(PASS, tool=Tool(name=TOOL, version=version)))["tool"]["driver"]
    assert driver["semanticVersion"] == shown


def test_the_rules_are_the_table_of_checks() -> None:
    rules = parse(PASS)["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [*CHECKS, *WITHOUT_SETTING]
    for rule in rules:
        default = (CHECKS | WITHOUT_SETTING)[rule["id"]]
        assert rule["shortDescription"]["text"] == default.summary
        assert rule["defaultConfiguration"]["level"] == default.severity.value
        assert f"merge-gate explain {rule['id']}" in rule["help"]["text"]


@pytest.mark.parametrize(
    ("source", "revision", "address"),
    [
        ("./adapters/billing", None, {"uri": "adapters/billing/adapter_config.json", "uriBaseId": "%SRCROOT%"}),
        ("/srv/billing/", None, {"uri": "file:///srv/billing/adapter_config.json"}),
        ("acme/billing", "5" * 40, {"uri": "acme/billing/adapter_config.json"}),
    ],
)
def test_without_a_configuration_a_result_points_at_the_adapter(
    source: str, revision: str | None, address: dict[str, str]
) -> None:
    named = adapter(findings=(ROUNDING,), source=source, revision=revision)
    base = BaseReport(model="./base", dtype="bfloat16", quantization=Quantization.NONE, findings=(NAN,))
    (run,) = json.loads(render(report(named, config=config_file(COMMAND_LINE), bases=(base,))))["runs"]
    of_base, of_adapter = (result["locations"][0]["physicalLocation"] for result in run["results"])
    assert of_adapter == {"artifactLocation": address}
    assert of_base == {"artifactLocation": {"uri": "base/config.json", "uriBaseId": "%SRCROOT%"}}


def test_hundreds_of_findings_of_one_kind_are_one_result(wording: Wording) -> None:
    (result,) = parse(report(replace(FAILED, findings=(NAN,) * 96)))["results"]
    message = result["message"]["text"].partition(NAN.message)[2]
    assert "95" in message
    wording(message)


def test_a_fingerprint_stays_when_the_file_is_edited() -> None:
    def prints(judged: Any) -> list[str]:
        return [one["partialFingerprints"]["mergeGate/v1"] for one in parse(report(judged))["results"]]

    before = prints(FAILED)
    assert prints(replace(FAILED, line=80, column=2, seconds=9.0)) == before
    assert len(set(before)) == len(before)
    assert not set(prints(replace(FAILED, name="other"))) & set(before)


def test_the_run_says_whether_it_came_to_a_verdict() -> None:
    def told(run: Any) -> tuple[bool, int]:
        invocation = parse(run)["invocations"][0]
        return invocation["executionSuccessful"], invocation["exitCode"]

    assert [told(run) for run in (PASS, FAIL, EMPTY)] == [(True, 0), (True, 1), (False, 3)]
    assert parse(EMPTY)["invocations"][0]["toolExecutionNotifications"][0]["level"] == "error"


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("./a/../merge-gate.yml", "merge-gate.yml"),
        ("/srv/x y.yml", "file:///srv/x%20y.yml"),
        ("a:b#c?.yml", "a%3Ab%23c%3F.yml"),
        ("caf\udce9.yml", "caf%5Cudce9.yml"),
    ],
)
def test_the_address_of_the_file(path: str, uri: str) -> None:
    (result,) = parse(report(adapter(findings=(ROUNDING,)), config=config_file(path)))["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_a_name_makes_no_link() -> None:
    evil = adapter("[x](http://evil.example)", findings=(ROUNDING,))
    assert parse(report(evil))["results"][0]["message"]["text"].startswith("\\[x\\](http://evil.example) (bfloat16)")


def test_no_more_results_than_github_keeps_errors_among_them(wording: Wording) -> None:
    findings = tuple(replace(ROUNDING, check=f"c{n}") for n in range(100))
    broken = adapter("last", Verdict.PASSED, findings=(*findings, NAN))
    run = parse(report(*(adapter(f"a{n}", findings=findings) for n in range(300)), broken))
    assert len(run["results"]) == MAX_RESULTS
    assert [result["level"] for result in run["results"][:2]] == ["error", "warning"]
    (told,) = run["invocations"][0]["toolExecutionNotifications"]
    wording(told["message"]["text"])


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_name_is_only_text(attack: str) -> None:
    finding = replace(NAN, message=f"x{attack}", hint=attack, tensor=attack, module=attack, check=f"x{attack}")
    run = report(adapter(attack, Verdict.FAILED, cause=attack, findings=(finding,)), config=config_file(f"x{attack}"))
    (result,) = parse(run)["results"]
    assert result["message"]["text"].isprintable()
    assert result["ruleId"].isprintable()


@given(hostile_reports())
def test_any_report(run: Any) -> None:
    parse(run)
