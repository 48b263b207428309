"""report.html: one page that loads nothing, in which no name is anything but text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.terms import Verdict
from merge_gate.report.formats.html_report import render
from merge_gate.report.wording import run_result, words
from tests.support.reports import (
    ATTACKS,
    EMPTY,
    FAIL,
    FAILED,
    NAN,
    OVERFLOW,
    PASS,
    adapter,
    config_file,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    names_for_shared_words,
    report,
    runner_obeys,
    tensors,
)

GOLDEN = Path(__file__).parent / "goldens" / "report.html"
MEBIBYTE = 1024 * 1024


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
    html = render(in_two_dtypes())
    assert html.count('<details class="again">') == 1
    assert re.findall("<code>keys-missing</code>: .* bfloat16</summary>", html)


def test_golden() -> None:
    with names_for_shared_words() as run:
        html = render(run)
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text(html, encoding="utf-8")
    assert html == GOLDEN.read_text(encoding="utf-8"), "look at the difference, then run with UPDATE_GOLDENS=1"


def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else() -> None:
    page = Page(render(FAIL))
    (policy,) = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for kind, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = [text for found, text in page.raw if found == kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


def test_nothing_is_loaded_and_nothing_leads_away() -> None:
    page = Page(render(FAIL))
    assert not {"link", "img", "iframe", "object", "a", "form", "svg"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]


def test_the_page_says_what_is_wrong_where_and_what_to_do() -> None:
    text = " ".join(Page(render(FAIL)).text.split())
    for said in (
        run_result.verdict_line(FAIL),
        NAN.message,
        NAN.hint,
        words.ORIGINS[NAN.origin],
        OVERFLOW.hint.replace("`", ""),
        "1 NaN, 15 finite",
        "1,100,048,384 of 1,100,048,384 parameters checked",
        "line 8 of merge-gate.yml",
        "9f2c5d1e9f2c5d1e",
        "torch 2.13.0",
    ):
        assert said in text, said


def test_what_was_named_on_the_command_line_has_no_line_there() -> None:
    assert "<dd>line 8" not in render(report(FAILED, config=config_file(COMMAND_LINE)))
    assert "<dd>line 8 of <code>merge-gate.yml</code></dd>" in render(report(FAILED))


def test_the_worst_comes_first() -> None:
    html = render(FAIL)
    order = [
        html.index(f'<span class="name">{name}</span>')
        for name in ("billing", "summaries", "translate-de", "support", "legal")
    ]
    assert order == sorted(order)


def test_the_map_s_data_are_the_tensors() -> None:
    layouts, *_ = [data for data in Page(render(report(PASS.adapters[0]))).data() if isinstance(data, list)]
    (drawn,) = [data for data in Page(render(report(PASS.adapters[0]))).data() if isinstance(data, dict)]
    (block,) = layouts[drawn["layout"]]["blocks"]
    assert (block["stack"], block["layers"], block["modules"]) == (
        "model.layers", ["0", "1"], ["self_attn.q_proj", "mlp.up_proj"],
    )  # fmt: skip
    assert block["places"] == [0, 0, 0, 1, 1, 0, 2, 0, 1, 3, 1, 1]
    assert drawn["state"] == "FFFU"
    assert (drawn["low"], drawn["ratio"][0], drawn["loss"][0]) == ([-0.5, -0.5, -1.5, -1.5], 0.00781, 0.125)
    assert drawn["bounded"] == drawn["estimated"] == [0, 1]


def test_adapters_on_the_same_tensors_share_a_layout() -> None:
    run = report(*(adapter(f"a{n}", tensors=tensors(4)) for n in range(9)), adapter("b", tensors=tensors(5)))
    (layouts,) = [data for data in Page(render(run)).data() if isinstance(data, list)]
    assert len(layouts) == 2


def test_500_adapters_of_32_layers_stay_below_10_mb() -> None:
    merges = tensors(32, nan="5.self_attn.q_proj")
    figures = tuple(
        dataclasses.replace(
            merge, module=f"{merge.module}.{part}", delta_norm=0.123456 / (index + 1), lost_norm=1e-5 / 3
        )
        for part in ("a", "b", "c", "d")
        for index, merge in enumerate(merges)
    )
    assert len(figures) == 256
    run = report(
        *(adapter(f"a{n}", Verdict.FAILED, cause=NAN.check, findings=(NAN,), tensors=figures) for n in range(500))
    )
    assert len(render(run).encode()) < 10 * MEBIBYTE


def test_an_empty_run_has_a_page() -> None:
    assert run_result.headline(EMPTY) in render(EMPTY)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_name_is_only_text(attack: str) -> None:
    def played(text: str) -> Page:
        finding = dataclasses.replace(NAN, message=text, hint=f"x{text}", tensor=text, module=text, check=text)
        merges = tuple(
            dataclasses.replace(
                merge, module=f"{text}.{n}.q", stats=dataclasses.replace(merge.stats, name=f"{text}.{n}.q.weight")
            )
            for n, merge in enumerate(tensors(1))
        )
        evil = adapter(
            text,
            Verdict.FAILED,
            cause=f"x{text}",
            findings=(finding,),
            source=text,
            revision=f"x{text}",
            tensors=merges,
        )
        html = render(report(evil, config=config_file(text)))
        assert not any(map(runner_obeys, lines_of(html)))
        return Page(html)

    seen, tame = played(attack.replace("`", "'") or "-"), played("tame")
    assert seen.tags == tame.tags
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
