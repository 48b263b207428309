"""report.html: one page that loads nothing, in which no name is anything but text."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.files import HashedFile
from merge_gate.records.report import Accepted, AdapterReport, Coverage
from merge_gate.records.terms import Origin, Severity, Verdict
from merge_gate.report.formats.html_report import chain, render
from merge_gate.report.wording.alike import paragraphs
from merge_gate.report.wording.explanations import explanations
from tests.support.reports import (
    ATTACKS,
    BASE,
    CRASHED,
    FAIL,
    FAILED,
    HALF,
    NAN,
    OVERFLOW,
    PASS,
    ROUNDING,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
    tensors,
)


class Page(HTMLParser):
    """What a browser's parser meets: tags, attributes, text, and the contents of style and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.raw: list[tuple[str, str]] = []
        self._raw: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in {"script", "style"}:
            self._raw = tag if not attrs else "data"
            self.raw.append((self._raw, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            self._raw = None

    def handle_data(self, data: str) -> None:
        if self._raw:
            self.raw[-1] = (self._raw, self.raw[-1][1] + data)
        else:
            self.text += data

    def data(self) -> list[Any]:
        return [json.loads(text) for kind, text in self.raw if kind == "data"]


def test_what_another_dtype_s_row_says_already_is_folded() -> None:
    page = render(in_two_dtypes())
    assert page.count('<details class="again">') == 1
    assert re.findall("<code>keys-missing</code>: .* bfloat16</summary>", page)


def test_the_policy_allows_the_page_s_own_style_and_script() -> None:
    page = Page(render(FAIL))
    (policy,) = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for kind, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = [text for found, text in page.raw if found == kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


def test_nothing_is_loaded_and_links_are_those_of_the_explanations() -> None:
    page = Page(render(FAIL))
    assert not {"link", "img", "iframe", "object", "form", "svg", "template"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "srcset", "action", "style"} & names
    links = {value for tag, name, value in page.attributes if name == "href" and tag == "a"}
    assert {"https://github.com/huggingface/diffusers/issues/5313"} <= links
    assert all(link in "".join(explanations().values()) for link in links)
    assert {value for _, name, value in page.attributes if name == "rel"} == {"noopener noreferrer"}
    assert not [tag for tag, name, _ in page.attributes if name == "href" and tag != "a"]
    assert not [name for name in names if name.startswith("on")]


def test_what_was_named_on_the_command_line_has_no_line_there() -> None:
    assert "<dd>line 8" not in render(report(FAILED, config=config_file(COMMAND_LINE)))
    assert "<dd>line 8 of <code>merge-gate.yml</code></dd>" in render(report(FAILED))


def test_the_head_names_the_run() -> None:
    config = replace(config_file("merge-gate.yml"), read_at="2026-11-27T21:00:00Z", commit="c0ffee" * 6)
    head = render(report(FAILED, config=config)).partition("</header>")[0]
    assert "2026-11-27T21:00:00Z" in head
    assert "commit <code>c0ffeec0ffee</code>" in head


@pytest.mark.attempt("M9", "a run in two dtypes", "the page has a row for each adapter, as the quickstart says")
def test_an_adapter_has_one_row_with_a_chip_for_each_dtype() -> None:
    run = report(replace(FAILED, base=HALF), adapter("billing"), adapter("billing-2", findings=(ROUNDING,)))
    html = render(run)
    assert html.count('<tbody class="adapter"') == 2
    (row,) = re.findall(r'<tbody class="adapter" id="adapter-billing".*?</tbody>', html, re.DOTALL)
    assert row.startswith('<tbody class="adapter" id="adapter-billing" data-verdict="failed" data-causes="adapter-nonf')
    line = row.partition('<tr class="detail">')[0]
    assert re.findall('class="chip ([a-z]+)"[^>]*>([a-z0-9]+)', line) == [("failed", "float16"), ("passed", "bfloat16")]
    assert row.count('<section class="entry"') == 2


def test_an_adapter_that_failed_unjudged_is_counted_as_both() -> None:
    html = render(report(FAILED, replace(CRASHED, name=FAILED.name, base=HALF)))
    for pick in ("failed", "error"):
        assert re.search(rf'data-pick="{pick}"[^>]*><b>1</b>', html), pick
    assert re.search(r'<tbody class="adapter"[^>]* data-verdict="failed"[^>]* data-also="error', html)


@pytest.mark.attempt("M4", "an adapter that fails in two dtypes for two reasons", "its row has both causes")
def test_a_row_has_each_cause_of_its_dtypes() -> None:
    overflow = adapter(
        "billing", Verdict.FAILED, base=HALF, cause=OVERFLOW.check, findings=(OVERFLOW,), decided_by=0, line=FAILED.line
    )
    row = render(report(FAILED, overflow)).partition('id="adapter-billing"')[2].partition('<tr class="detail">')[0]
    causes = re.findall(r'<code class="cause">([^<]+)</code> <span class="kind">\(([^)]+)\)', row)
    assert causes == [("adapter-nonfinite", "bfloat16"), (OVERFLOW.check, "float16")]
    same = replace(FAILED, base=HALF)
    row = render(report(FAILED, same)).partition('id="adapter-billing"')[2].partition('<tr class="detail">')[0]
    assert re.findall(r'<code class="cause">([^<]+)</code> <span class="([^"]+)', row) == [
        ("adapter-nonfinite", "place")
    ]


def test_a_row_has_an_address_of_its_name() -> None:
    names = ("a b", "a/b", "Straße", "", "-", "x" * 300)
    ids = re.findall(r'<tbody class="adapter" id="([^"]*)"', render(report(*map(adapter, names))))
    assert ids[:3] == ["adapter-a-b", "adapter-a-b--2", "adapter-Stra-e"]
    assert len(set(ids)) == len(names)
    assert all(re.fullmatch(r"adapter-[A-Za-z0-9._-]+", address) and len(address) < 100 for address in ids)


def test_a_command_repeats_the_adapter_alone() -> None:
    assert "<code>merge-gate run merge-gate.yml --only billing</code>" in render(report(FAILED))
    direct = render(report(FAILED, replace(FAILED, base=HALF), config=config_file(COMMAND_LINE)))
    command = "merge-gate run ./adapters/billing --base ./models/base --dtype bfloat16,float16"
    assert f"<code>{command}</code>" in direct
    assert "--only &#39;a;rm -rf&#39;" in render(report(adapter("a;rm -rf")))
    for name in ("a\u202eb", "--container", "a" * 1970 + "'; touch x; #" + "b" * 600):
        assert "a name has characters that cannot be typed" in render(report(adapter(name)))


def test_each_check_of_the_report_is_explained_once() -> None:
    every = tuple(replace(NAN, check=check) for check in (*CHECKS, "no-such-check"))
    page = render(report(adapter("a", Verdict.FAILED, cause=NAN.check, findings=every)))
    assert re.findall(r'<details class="meaning" id="check-([a-z-]+)">', page) == list(CHECKS)
    (text,) = re.findall(r'<section aria-labelledby="checks">.*?</section>', page, re.DOTALL)
    assert "**" not in text
    assert "](" not in text
    inside = {"p", "b", "code", "pre", "ul", "li", "a"}
    assert set(Page(text).tags) == inside | {"section", "h2", "details", "summary"}


@pytest.mark.parametrize(
    ("check", "kind"),
    [("rounding-loss", "loss"), ("delta-norm", "ratio"), ("headroom", "headroom"), ("other", "state")],
)
def test_the_map_opens_on_what_was_found(check: str, kind: str) -> None:
    finding = replace(ROUNDING, check=check, measured=(("limit", 0.25),))
    for verdict, severity in ((Verdict.FAILED, Severity.ERROR), (Verdict.PASSED, Severity.WARNING)):
        one = replace(finding, severity=severity)
        cause = check if verdict is Verdict.FAILED else None
        run = report(adapter("a", verdict, cause=cause, findings=(one,), tensors=tensors(2)))
        (drawn,) = [data for data in Page(render(run)).data() if isinstance(data, dict)]
        assert drawn["kind"] == kind
        assert drawn["limits"] == {"loss": 0.5, "ratio": 10.0, "headroom": 0.5} | (
            {kind: 0.25} if kind != "state" else {}
        )


def test_who_accepted_a_failure_comes_first_in_its_row() -> None:
    accepted = Accepted(owner="ml team", until="2027-01-01", reason="retrained in March")
    line = render(report(replace(FAILED, accepted=accepted))).partition('<td class="why">')[2]
    assert line.startswith('<span class="mark">accepted until 2027-01-01 by ml team: retrained in March</span>')


def test_a_failure_that_no_one_accepts_has_its_own_paragraph() -> None:
    """The same adapter fails in two dtypes, and one failure is accepted."""
    known = replace(FAILED, accepted=Accepted(owner="ml team", until="2027-01-01", reason="known"))
    run = report(known, replace(FAILED, base=HALF))
    assert [[len(same) for same in group] for group in paragraphs(run)] == [[1], [1]]
    assert '<span class="mark">' not in render(run).partition('<td class="why">')[2].partition("</td>")[0]


def test_the_coverage_counts_tensors_that_are_absent() -> None:
    missing = replace(NAN, check="keys-missing", measured=(("missing", 14.0),))
    run = report(replace(PASS.adapters[0], findings=(missing,)))
    assert "96 of 110 expected adapter tensors used" in render(run)
    forged = replace(missing, measured=(("missing", float("nan")),))
    assert "96 of 96 adapter tensors used" in render(report(replace(PASS.adapters[0], findings=(forged,))))
    assert "nothing was merged" in render(report(adapter("a", Verdict.FAILED, coverage=Coverage())))


def test_a_long_path_breaks_between_its_parts() -> None:
    base = replace(BASE, model="/srv/models/llama_3-8b/2.5")
    page = render(report(adapter("a", base=base, source="/srv/adapters/support")))
    assert page.count("/srv/<wbr>models/<wbr>llama_3-8b/<wbr>2.5</code>") == 2, "in the table, and in the row's facts"
    assert "/srv/<wbr>adapters/<wbr>support</code>" in page


def test_a_base_in_two_dtypes_is_listed_once() -> None:
    file = HashedFile(path="model.safetensors", size_bytes=7, sha256="ab" * 32)
    one, other = (replace(PASS.bases[0], dtype=dtype, files=(file,)) for dtype in ("bfloat16", "float16"))
    html = render(report(adapter("a"), bases=(one, other))).partition('<h2 id="bases">')[2]
    assert html.count("ab" * 32) == 1
    assert "bfloat16; float16</dd>" in html


def told(judged: AdapterReport) -> list[tuple[str, str]]:
    return [(outcome, summary) for _, outcome, summary in chain(judged)]


def test_it_breaks_where_the_cause_lies() -> None:
    base = replace(NAN, origin=Origin.BASE, check="base-nonfinite")
    of_base = told(adapter(verdict=Verdict.FAILED, cause=base.check, findings=(base,)))
    assert of_base[0] == ("broken", "base-nonfinite")
    assert [outcome for outcome, _ in of_base[1:]] == ["sound", "unknown", "unknown"], "no merge with it is sound"


def test_what_was_not_judged_is_not_said_to_be_sound() -> None:
    crashed = replace(CRASHED, coverage=Coverage())
    assert {outcome for outcome, _ in told(crashed)} == {"unknown"}


def test_adapters_on_the_same_tensors_share_a_layout() -> None:
    run = report(*(adapter(f"a{n}", tensors=tensors(4)) for n in range(9)), adapter("b", tensors=tensors(5)))
    (layouts,) = [data for data in Page(render(run)).data() if isinstance(data, list)]
    assert len(layouts) == 2


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_name_is_only_text(attack: str) -> None:
    def played(text: str) -> Page:
        finding = replace(NAN, message=text, hint=f"x{text}", tensor=text, module=text, check=text)
        merges = tuple(
            replace(merge, module=f"{text}.{n}.q", stats=replace(merge.stats, name=f"{text}.{n}"))
            for n, merge in enumerate(tensors(1))
        )
        names = {"source": text, "revision": f"x{text}", "tensors": merges}
        evil = adapter(text, Verdict.FAILED, cause=f"x{text}", findings=(finding,), **names)
        html = render(report(evil, config=config_file(text)))
        assert not any(map(runner_obeys, lines_of(html)))
        return Page(html)

    seen, tame = played(attack.replace("`", "'") or "-"), played("tame")
    assert [tag for tag in seen.tags if tag != "wbr"] == [tag for tag in tame.tags if tag != "wbr"]
    assert [(tag, name) for tag, name, _ in seen.attributes] == [(tag, name) for tag, name, _ in tame.attributes]
    assert len(seen.data()) == 2


@given(hostile_reports())
def test_any_report(run: Any) -> None:
    html = render(run)
    html.encode("utf-8")
    assert not any(map(runner_obeys, lines_of(html)))
    page = Page(html)
    page.data()
    assert [kind for kind, _ in page.raw if kind != "data"] == ["style", "script"]
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)
    assert all(character.isprintable() or character == "\n" for character in shown)
