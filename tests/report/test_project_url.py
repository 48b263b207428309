"""Where a report links: nowhere while the project has no address, and to the page of each check once it has one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import merge_gate
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS, WITHOUT_SETTING
from merge_gate.records.project import PROJECT_URL, check_url, documentation_url
from merge_gate.report.wording.explanations import explanations

PACKAGE = Path(merge_gate.__file__).parent
ADDRESS = "https://github.com/Acme/merge-gate"
DOCUMENTATION = f"https://acme.github.io/merge-gate/{merge_gate.__version__}/"
PAGE = f"{DOCUMENTATION}checks/adapter-nonfinite/"

RENDERED = """
import dataclasses, json
from merge_gate.action.workflow import annotate
from merge_gate.judging.kinds import finding
from merge_gate.report.wording.explanations import explanations, linked, page_of
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import html_report, json_report, junit, sarif, summary, terminal_text
from tests.support.reports import FAILED, NAN, adapter, report
failed, base = linked(FAILED), linked(dataclasses.replace(report().bases[0], findings=(NAN,)))
twice = adapter(verdict=Verdict.FAILED, cause="applied-twice", findings=(finding("applied-twice", "twice"),))
run, compared = report(failed), report(linked(twice), is_comparison=True)
print(json.dumps({
    "html": html_report.render(run), "sarif": sarif.render(run), "summary": summary.render(run),
    "junit": junit.render(run), "annotations": "\\n".join(annotate(json.loads(json_report.render(run)), "")),
    "terminal": terminal_text.render(run, "", width=40),
    "base": html_report.render(report(bases=(base,))),
    "comparison": terminal_text.render(compared, ""), "compared": sarif.render(compared),
    "urls": [each.url for judged in (failed, base) for each in judged.findings],
    "explained": "".join(explanations().values()),
    "answer": linked(twice).findings[0].url, "unknown": page_of("no-such-check"),
}))
"""


def rendered_with(address: str, source: Path) -> dict[str, Any]:
    """A failed report in every format, by a copy of the package with this address."""
    shutil.copytree(PACKAGE, source / "merge_gate", ignore=shutil.ignore_patterns("__pycache__"))
    setting = source / "merge_gate" / "records" / "project.py"
    text = setting.read_text(encoding="utf-8")
    changed = re.sub(r'^PROJECT_URL = ".*"$', f'PROJECT_URL = "{address}"', text, flags=re.MULTILINE)
    setting.write_text(changed, encoding="utf-8")
    code = f"import sys; sys.path[:0] = [{str(source)!r}, {str(Path(__file__).parents[2])!r}]\n{RENDERED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_address_is_empty_or_a_repository_on_github() -> None:
    assert re.fullmatch(r"|https://github\.com/[\w-]+/[\w.-]+", PROJECT_URL)
    assert (check_url("no-effect", "1.0.0") is None) == (documentation_url("1.0.0") is None) == (not PROJECT_URL)


def test_every_format_links_a_check_to_its_page(tmp_path: Path) -> None:
    linked = rendered_with(ADDRESS, tmp_path)
    assert f"  more    {PAGE}\n" in linked["terminal"], "an address is never wrapped"
    assert f"- **More:** [adapter-nonfinite]({PAGE})\n" in linked["summary"]
    assert f"\nmore: {PAGE}\n" in linked["junit"]
    assert linked["annotations"].endswith(f"%0AMore: {PAGE}")
    assert f'href="{PAGE}"' in linked["html"]
    assert f'href="{PAGE}"' in linked["base"]
    assert f"[rounding-loss]({DOCUMENTATION}checks/rounding-loss/)" in linked["explained"]
    assert f"({DOCUMENTATION}project/decisions/#merging)" in linked["explained"]
    assert PAGE in linked["urls"]
    assert None not in linked["urls"]
    driver = json.loads(linked["sarif"])["runs"][0]["tool"]["driver"]
    assert driver["informationUri"] == ADDRESS
    assert {rule["id"]: rule["helpUri"] for rule in driver["rules"]}["adapter-nonfinite"] == PAGE
    assert not any("merge-gate explain" in linked[kind] for kind in ("terminal", "summary", "junit"))
    answer = f"{DOCUMENTATION}guides/verify/#applied-twice"
    assert linked["answer"] == answer, "an answer of verify is a section of one page"
    assert f"  more    {answer}\n" in linked["comparison"]
    rules = json.loads(linked["compared"])["runs"][0]["tool"]["driver"]["rules"]
    assert {rule["id"]: rule["helpUri"] for rule in rules}["applied-twice"] == answer
    assert linked["unknown"] is None


def test_without_an_address_nothing_is_linked(tmp_path: Path) -> None:
    without = rendered_with("", tmp_path)
    assert {*without["urls"], without["answer"]} == {None}
    named = "merge-gate explain adapter-nonfinite"
    for kind in ("html", "sarif", "summary", "terminal", "junit", "annotations", "base"):
        assert "github.io" not in without[kind]
        assert "helpUri" not in without[kind]
    for kind in ("summary", "junit", "annotations"):
        assert without[kind].count(named) == 1
    assert " ".join(without["terminal"].split()).count(named) == 1
    assert without["comparison"].count("merge-gate explain applied-twice") == 1


def test_what_has_a_page_has_an_explanation() -> None:
    assert explanations().keys() == CHECKS.keys() | WITHOUT_SETTING.keys() | ANSWERS.keys()
