"""summary.md: it says what is wrong at once, fits GitHub's limit, and no name can form markup in it."""

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from cmarkgfm import github_flavored_markdown_to_html
from cmarkgfm.cmark import Options
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from merge_gate._internal.output_files import GENERATOR_COMMENT
from merge_gate.records.measured import TensorMerge
from merge_gate.records.report import Report
from merge_gate.records.terms import Origin, Verdict
from merge_gate.report.formats.summary import render, text_map
from merge_gate.report.stored.stored_report import compare, render_markdown
from merge_gate.report.wording import run_result
from merge_gate.report.wording.markdown import code, plain, prose
from merge_gate.report.wording.untrusted import one_line
from tests.support.reports import (
    ATTACKS,
    BASE,
    EMPTY,
    FAIL,
    HALF,
    MISSING,
    NAN,
    PASS,
    RAN,
    ROUNDING,
    TEXTS,
    UNDECIDED,
    WARNED,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
    tensors,
)
from tests.support.tried import tried
from tests.support.wording import Wording

LIMIT_BYTES = 64 * 1024
TAGS = {
    "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong", "code", "details", "summary",
    "pre",
}  # fmt: skip


def commonmark(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def github(markdown: str) -> str:
    """By GitHub's own library, with tables, autolinks and its filter of tags; HTML comes through, as on GitHub."""
    return github_flavored_markdown_to_html(markdown, options=Options.CMARK_OPT_UNSAFE)


RENDERERS = (commonmark, github)
PARTS_OF_ADDRESSES = (
    "http", "ftp", ":", "//", "www", "WWW", ".", "evil", "example", "@", "me", "mailto:", "xmpp:", "`", "``", " ", "_",
    "-", "<", ">", "(", ")", "[", "]", "\\", "&", "&#58;", "#", "~", "*", "x", "/", "名", "+",
)  # fmt: skip


class Seen(HTMLParser):
    """The tags with their attributes and the text that a reader of the HTML meets."""

    def __init__(self, markdown: str, render: Callable[[str], str] = commonmark) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.plain = ""
        self.text = ""
        self._code = 0
        self.cells: list[list[str]] = []
        self._in_cell = False
        self.feed(render(markdown))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._code += tag == "code"
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag == "code"
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.cells[-1][-1] += data
        self.plain += "" if self._code else data


@pytest.mark.parametrize(("run", "mark"), [(PASS, "✅"), (FAIL, "❌"), (UNDECIDED, "⚠️"), (EMPTY, "⚠️")])
def test_the_headline_has_the_result(run: Report, mark: str) -> None:
    assert render(run).startswith(f"{GENERATOR_COMMENT}\n\n## {mark} merge-gate {run_result.verdict_line(run)}\n")


def test_quiet_adapters_of_a_fleet_are_folded_below_the_others(wording: Wording) -> None:
    good = [adapter(f"good-{index}") for index in range(200)]
    text = render(report(*good, adapter("broken", Verdict.FAILED, cause="no-effect"), WARNED))
    seen = Seen(text, github)
    assert [row[0] for row in seen.cells[1:3]] == ["broken", WARNED.name]
    assert text.index("### ❌ `broken`") < text.index("<details>", text.index("<details>") + 1)
    assert text.index("<summary>200 ") < text.index("| `good-0` |") < text.index("| `good-199` |")
    (quiet,) = re.findall("<summary>200 .*</summary>", text)
    wording(quiet)
    assert "<details>" not in render(report(*good[:40]))


def test_names_are_code_and_backticks_make_code() -> None:
    assert code("model.layers.0") == "`model.layers.0`"
    assert code("a|b") == "<code>a&#124;b</code>"
    assert prose("set `dtype` to *x*") == "set `dtype` to &#42;x&#42;"
    assert prose("one ` alone") == "one &#96; alone"
    assert prose("lora_B and __init__") == "lora_B and &#95;&#95;init&#95;&#95;"
    assert Seen(prose("a&b <c> [d](e) f_g `h|i`")).text.strip() == "a&b <c> [d](e) f_g h|i"


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if 0 < len(attack) < 100])
def test_a_hostile_name_is_only_text(attack: str, renderer: Callable[[str], str]) -> None:
    finding = replace(NAN, message=attack, hint=attack, tensor=attack, module=attack, check=attack)
    evil = adapter(
        f"a{attack}b", Verdict.FAILED, cause=attack, findings=(finding, ROUNDING), source=attack, revision=attack
    )
    unknown = replace(NAN, check="x")
    tame = adapter("ab", Verdict.FAILED, cause="x", findings=(unknown, ROUNDING), revision="x")
    seen = Seen(render(report(evil)), renderer)
    assert set(seen.tags) <= TAGS
    assert seen.attributes == []
    assert [seen.tags.count(tag) for tag in ("table", "tr", "td", "details", "h2", "h3", "ul", "li")] == [
        Seen(render(report(tame)), renderer).tags.count(tag)
        for tag in ("table", "tr", "td", "details", "h2", "h3", "ul", "li")
    ]


def test_on_github_the_tables_are_tables_and_every_name_is_whole() -> None:
    names = [f"{number}{attack}" for number, attack in enumerate(ATTACKS) if 0 < len(attack) < 100]
    seen = Seen(render(report(*(adapter(name, findings=(ROUNDING,)) for name in names))), github)
    assert {len(row) for row in seen.cells[1 : len(names) + 1]} == {4}
    assert [row[0] for row in seen.cells[1 : len(names) + 1]] == [one_line(name, 80) for name in names]
    assert seen.tags.count("details") == 1
    assert "a" not in seen.tags


def test_on_github_the_map_is_as_it_was_drawn() -> None:
    assert "  self_attn.q_proj  .....N..\n" in Seen(render(FAIL), github).text


def test_on_github_a_comparison_is_a_table() -> None:
    seen = Seen(render_markdown(compare(report(), report(*(adapter(attack) for attack in ATTACKS)))), github)
    assert [row[0] for row in seen.cells] == ["change", *["new"] * (len(seen.cells) - 1)]
    assert seen.attributes == []


@given(TEXTS)
def test_github_finds_nothing_to_link_in_prose(text: str) -> None:
    markdown = prose(text)
    seen = Seen("**x** " + markdown)
    assert set(seen.tags) <= {"p", "strong", "code"}
    assert set(Seen("**x** " + markdown, github).tags) <= {"p", "strong", "code"}
    # GitHub links in two passes: over the Markdown (schemes, www.), then over the text outside code (@, #).
    outside_code = re.sub(r"`[^`]*`", "", markdown)
    assert not re.search(r"://|www\.|mailto:", outside_code, re.IGNORECASE)
    assert not re.search(r"@[\w./-]|#\w|\bGH-\d|\b[0-9a-f]{7,40}\b", seen.plain, re.ASCII | re.IGNORECASE)


ADDRESSES = (
    "a!b@octocat.example", "::error::owned@www.evil.example", "!http://x@evil.example", "W@.evil.example",
    "x<+@-.evil.example", "名a@me@.evil.example", "https://evil.example/x", "WWW.evil.example", "ftp://evil.example",
    "mailto:me@evil.example", "xmpp:me@evil.example/x", "@octocat", "@acme/team", "#12", "acme/x#12", "GH-12",
    "0123abc", "www``.evil.example", "acme/x@8f14e45fceea167a5a36dedd4bea2543a0b1c2d3",
)  # fmt: skip


@pytest.mark.parametrize("text", tried("A02", "in a name or a message", "no link", ADDRESSES))
def test_an_address_is_no_link(text: str) -> None:
    """In a name as code, and outside of code, where GitHub also links users, issues, and commits."""
    for renderer in RENDERERS:
        assert "a" not in Seen(code(text), renderer).tags
        seen = Seen(f"x {prose(text)} and {plain(text)}", renderer)
        assert "a" not in seen.tags
        assert not re.search(r"@[\w./-]|#\w|\bGH-\d|\b[0-9a-f]{7,40}\b", seen.plain, re.ASCII | re.IGNORECASE)


@given(st.lists(st.sampled_from(PARTS_OF_ADDRESSES), min_size=2, max_size=12).map("".join))
def test_no_address_of_any_form_is_a_link(text: str) -> None:
    for shown in (code(text), plain(text), prose(text)):
        assert "a" not in Seen(f"x {shown} y", github).tags


@given(hostile_reports())
def test_any_report(run: Report) -> None:
    text = render(run)
    assert not any(runner_obeys(line) for line in lines_of(text))
    assert all(line.isprintable() for line in lines_of(text))
    assert len(text.encode()) <= LIMIT_BYTES
    for renderer in RENDERERS:
        assert set(Seen(text, renderer).tags) <= TAGS


@pytest.mark.parametrize("text", ["x", "#" * 700, "@" * 700, "名" * 700])
def test_a_thousand_broken_adapters_fit(text: str) -> None:
    finding = replace(NAN, message=text, hint=text, tensor=text, module=text)
    each = [replace(finding, message=f"{n} {text}") for n in range(1000)]
    others = tuple(replace(ROUNDING, check=f"{text}{n}"[-50:], message=text, hint=text) for n in range(50))
    names = {"source": text, "revision": text, "forward": replace(RAN, inputs=text, largest_module=text)}
    broken = [
        adapter(f"{text}{n}", Verdict.FAILED, cause=NAN.check, findings=(own, *others), **names)
        for n, own in enumerate(each)
    ]
    bases = tuple(replace(FAIL.bases[0], model=text, findings=(finding, *others), revision=text) for _ in range(50))
    markdown = render(report(*broken, adapter("fine", findings=others), bases=bases, config=config_file(text)))
    assert len(markdown.encode()) <= LIMIT_BYTES
    assert len(re.findall("^.*`report.json`.*$", markdown, re.MULTILINE)) >= 2
    assert markdown.count("<details>") == markdown.count("</details>")
    assert f"### ❌ {code(f'{text}0')}" in markdown


def test_what_the_files_show_is_said_once_and_not_once_per_dtype() -> None:
    lfs = replace(NAN, check="file-lfs-pointer", message="a pointer", origin=Origin.FILE)
    both = [adapter("a", Verdict.FAILED, cause=lfs.check, findings=(lfs,), base=base) for base in (BASE, HALF)]
    text = render(report(*both))
    assert text.count(lfs.message) == 1
    assert "`./models/base` (bfloat16; float16)" in text
    other = replace(both[1], findings=(replace(lfs, message="another"),))
    text = render(report(both[0], other))
    assert (text.count(lfs.message), text.count("another")) == (1, 1)
    warned = [adapter("b", findings=(ROUNDING,), base=base) for base in (BASE, HALF)]
    assert render(report(*warned)).count(ROUNDING.message) == 1


def test_what_breaks_many_alike_is_said_once() -> None:
    broken = [
        adapter(
            f"team-{n}", Verdict.FAILED, cause=NAN.check, findings=(NAN,), source=f"./{n}", base=HALF if n else BASE
        )
        for n in range(7)
    ]
    other = adapter("z", Verdict.FAILED, cause=NAN.check, findings=(replace(NAN, message="another"),))
    text = render(report(*broken, other))
    assert re.findall("### .*", text) == [
        "### ❌ `team-0` failed: `adapter-nonfinite`",
        "### ❌ `team-1`, `team-2`, `team-3`, `team-4`, `team-5` and 1 more failed: `adapter-nonfinite`",
        "### ❌ `z` failed: `adapter-nonfinite`",
    ]
    assert "- **Adapters:** `./1`, `./2`, `./3`, `./4`, `./5` and 1 more on `./models/base` (float16)" in text
    assert all(f"| `team-{n}` |" in text for n in range(7))


def test_the_map_of_several_says_whose_it_is() -> None:
    worst = next(one for one in FAIL.adapters if one.tensors and one.verdict is Verdict.FAILED)
    both = [replace(worst, name=name) for name in ("first", "second")]
    (said,) = re.findall("^.*N NaN.*$", render(report(*both)), re.MULTILINE)
    assert "`first`" in said
    (said,) = re.findall("^.*N NaN.*$", render(report(both[0])), re.MULTILINE)
    assert "`first`" not in said


def test_what_one_dtype_has_besides_is_said_of_that_one() -> None:
    text = render(in_two_dtypes())
    assert text.count(MISSING.message) == 1
    assert "- warning (bfloat16) `rounding-loss`" in text
    changed = replace(ROUNDING, check="meaning-changed", message="another meaning")
    passed = [adapter("b", findings=(changed,)), adapter("b", findings=(changed, ROUNDING), base=HALF)]
    text = render(report(*passed))
    assert text.count("another meaning") == 1
    assert "`b` (bfloat16; float16) `meaning-changed`" in text
    assert "`b` (float16) `rounding-loss`" in text


def test_the_map_is_of_the_first_stack_that_is_broken() -> None:
    def moved(one: TensorMerge) -> TensorMerge:
        module = one.module.replace("model.", "decoder.")
        return replace(one, module=module, stats=replace(one.stats, name=f"{module}.weight"))

    sound, other = tensors(2), map(moved, tensors(2, nan="up_proj"))
    head, *rows = text_map(adapter("a", Verdict.FAILED, tensors=(*sound, *other)))
    assert head.split() == ["decoder.layers", "0"]
    assert rows == ["  self_attn.q_proj  ..", "  mlp.up_proj       NN"]


def test_the_map_of_many_modules_shows_the_broken_ones() -> None:
    def named(number: int) -> TensorMerge:
        one = tensors(1, nan="up_proj" if number == 19 else "")[1]
        return replace(one, module=f"model.layers.0.m{number}", stats=replace(one.stats, name="w"))

    _, first, *_, last = text_map(adapter("a", Verdict.FAILED, tensors=tuple(map(named, range(20)))))
    assert first.split() == ["m19.w", "N"]
    assert last == "  … and 4 more modules"


def test_the_map_is_of_an_adapter_that_it_shows_the_failure_of() -> None:
    sound = adapter("first", Verdict.FAILED, cause="no-effect", tensors=tensors(3, no_effect="up_proj"))
    broken = adapter(
        "second", Verdict.FAILED, cause=NAN.check, findings=(NAN,), tensors=tensors(3, nan="1.mlp.up_proj")
    )
    text = render(report(sound, broken))
    assert text.index("`first` failed") < text.index("`second` failed") < text.index("````text")
    assert text.count("````text") == 1
    assert "````text" not in render(report(sound)) + render(PASS)


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if 0 < len(attack) < 100])
def test_a_hostile_name_cannot_leave_the_map(attack: str) -> None:
    merges = tuple(
        replace(one, module=f"{attack}.{n}.{attack}", stats=replace(one.stats, name="w", nan=1))
        for n, one in enumerate(tensors(2))
    )
    text = render(report(adapter("x", Verdict.FAILED, cause=NAN.check, findings=(NAN,), tensors=merges)))
    seen = Seen(text)
    assert set(seen.tags) <= TAGS
    assert seen.tags.count("pre") == 1
    assert not any(runner_obeys(line) for line in lines_of(text))


def test_an_adapter_without_findings_still_says_what_to_do(wording: Wording) -> None:
    (said,) = re.findall(r"^- \*\*.*$", render(report(adapter(verdict=Verdict.ERROR))), re.MULTILINE)[-2:-1]
    wording(said)
