"""junit.xml: valid for every report, never green for what is not, and no name is anything but text."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from hypothesis import given

from merge_gate.records.report import Shard
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import junit
from merge_gate.report.formats.junit import render
from merge_gate.report.wording import run_result
from tests.support.reports import (
    ATTACKS,
    EMPTY,
    HALF,
    NAN,
    PASSED,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
)
from tests.support.wording import Wording

HERE = Path(__file__).parent
SCHEMA = xmlschema.XMLSchema(HERE / "junit.xsd")


def parse(run: Any) -> ET.Element:
    text = render(run)
    SCHEMA.validate(ET.ElementTree(ET.fromstring(text)))
    return ET.fromstring(text.encode("utf-8"))


def test_a_case_refers_to_the_one_before_for_what_is_the_same(wording: Wording) -> None:
    first, second = parse(in_two_dtypes()).iter("failure")
    assert NAN.hint in (first.text or "")
    assert second.get("message") == first.get("message")
    assert NAN.hint not in (second.text or "")
    wording(second.text)


def test_a_suite_per_base_and_a_case_per_dtype() -> None:
    other = adapter("other", base=HALF)
    root = parse(report(PASSED, adapter("support", base=HALF), other))
    (suite,) = root
    assert suite.get("name") == "base ./models/base"
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names == ["support (bfloat16)", "support (float16)", "other (float16)"]


@pytest.mark.parametrize("run", [EMPTY, report(), report(PASSED, complete=False)])
def test_what_did_not_finish_is_not_green(run: Any) -> None:
    root = parse(run)
    assert root.get("errors") == "1"
    assert len(list(root.iter("error"))) == 1


def test_a_shard_without_adapters_is_green_when_it_is_done() -> None:
    shard = Shard(index=2, count=2, plan_sha256="p", versions_sha256="v", entries=1, positions=())
    root = parse(report(shard=shard))
    assert (root.get("tests"), root.get("errors")) == ("1", "0")
    assert run_result.headline(report(shard=shard)) in str(root.findtext(".//system-out"))
    assert parse(report(shard=shard, complete=False)).get("errors") == "1"


def test_kinds_of_findings_without_end_are_counted(wording: Wording) -> None:
    found = tuple(replace(NAN, check=f"check-{number}") for number in range(junit._MAX_GROUPS + 3))
    (failure,) = parse(report(adapter("a", Verdict.FAILED, cause="check-0", findings=found))).iter("failure")
    assert str(failure.text).count("check-") == junit._MAX_GROUPS
    wording(str(failure.text).splitlines()[-1])


@pytest.mark.parametrize("attack", [*ATTACKS, "]]>", "<![CDATA[x]]>", "&xxe;", "\ufffe"])
def test_a_hostile_name_is_only_text(attack: str) -> None:
    def shape(text: str) -> list[tuple[str, list[str]]]:
        evil = adapter(f"x{text}", Verdict.FAILED, cause=f"x{text}", findings=(NAN,), source=text)
        return [(element.tag, list(element.attrib)) for element in parse(report(evil, config=config_file(text))).iter()]

    assert shape(attack) == shape("tame")


@given(hostile_reports())
def test_any_report(run: Any) -> None:
    root = parse(run)
    cases = list(root.iter("testcase"))
    assert root.get("tests") == str(len(cases))
    assert root.get("failures") == str(sum(case.find("failure") is not None for case in cases))
    assert root.get("errors") == str(sum(case.find("error") is not None for case in cases))
    assert not any(runner_obeys(line) for line in lines_of(render(run)))
