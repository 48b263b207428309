"""Where a report links: nowhere while the project has no address, and to the page of each check once it has one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import merge_gate
from merge_gate.records.project import PROJECT_URL, check_url, documentation_url

PACKAGE = Path(merge_gate.__file__).parent
ADDRESS = "https://github.com/Acme/merge-gate"
PAGE = f"https://acme.github.io/merge-gate/{merge_gate.__version__}/checks/adapter-nonfinite/"

RENDERED = """
import json, sys
from merge_gate.judging.limits import bounded
from merge_gate.report.formats import html_report, json_report, sarif, summary
from merge_gate.report.formats.terminal_text import file_lines
from tests.support.reports import FAILED, report
run = report(FAILED)
print(json.dumps({
    "html": html_report.render(run), "sarif": sarif.render(run), "summary": summary.render(run),
    "terminal": "\\n".join(file_lines(run.adapters[0])),
    "urls": [found.url for found in bounded(run.adapters[0].findings)],
}))
"""


def rendered(source: Path) -> dict[str, str]:
    """A failed report in every format, by the package in `source`."""
    code = f"import sys; sys.path[:0] = [{str(source)!r}, {str(Path(__file__).parents[2])!r}]\n{RENDERED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rendered_with(address: str, source: Path) -> dict[str, str]:
    """What a copy of the package with this address writes."""
    shutil.copytree(PACKAGE, source / "merge_gate", ignore=shutil.ignore_patterns("__pycache__"))
    setting = source / "merge_gate" / "records" / "project.py"
    text = setting.read_text(encoding="utf-8")
    changed = re.sub(r'^PROJECT_URL = ".*"$', f'PROJECT_URL = "{address}"', text, flags=re.MULTILINE)
    setting.write_text(changed, encoding="utf-8")
    return rendered(source)


def test_the_address_is_empty_or_a_repository_on_github() -> None:
    assert re.fullmatch(r"|https://github\.com/[\w-]+/[\w.-]+", PROJECT_URL)
    assert (check_url("no-effect", "1.0.0") is None) == (documentation_url("1.0.0") is None) == (not PROJECT_URL)


def test_every_format_links_a_check_to_its_page(tmp_path: Path) -> None:
    with_address = rendered_with(ADDRESS, tmp_path)
    assert PAGE in with_address["terminal"]
    assert f"]({PAGE})" in with_address["summary"]
    assert f'href="{PAGE}"' in with_address["html"]
    assert PAGE in with_address["urls"]
    driver = json.loads(with_address["sarif"])["runs"][0]["tool"]["driver"]
    assert driver["informationUri"] == ADDRESS
    assert {rule["id"]: rule["helpUri"] for rule in driver["rules"]}["adapter-nonfinite"] == PAGE


def test_without_an_address_nothing_is_linked(tmp_path: Path) -> None:
    without = rendered_with("", tmp_path)
    assert set(without["urls"]) == {None}
    for kind in ("html", "sarif", "summary", "terminal"):
        assert "github.io" not in without[kind]
        assert "helpUri" not in without[kind]
