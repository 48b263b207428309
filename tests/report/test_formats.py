"""What all formats of a report have in common: goldens, notes, a baseline, published models, and readers' limits."""

import datetime as dt
import gzip
import html
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from merge_gate._internal.errors import ConfigError, UsageError
from merge_gate.config.load_config import build_baseline
from merge_gate.config.yaml_document import read_yaml
from merge_gate.judging.baseline import accept, digests_of
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.files import HashedFile
from merge_gate.records.report import BaseReport, PublishedModel, Report
from merge_gate.records.terms import Acceptance, Finding, Origin, Quantization, Result, Severity, Verdict
from merge_gate.report.formats import html_report, json_report, junit, sarif, summary, terminal_text
from merge_gate.report.formats.json_report import read
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.report.stored.stored_report import compare, first_baseline
from merge_gate.report.wording import run_result, words
from tests.support.large_report import fleet, merged
from tests.support.reports import ATTACKS, FAIL, FAILED, NAN, PASS, PASSED, adapter, report
from tests.support.wording import Wording, hold

GOLDENS = Path(__file__).parent / "goldens"
RENDERERS: dict[str, Callable[[Report], str]] = {
    "report.html": html_report.render,
    "summary.md": summary.render,
    "report.sarif": sarif.render,
    "junit.xml": junit.render,
    "text-64.txt": partial(terminal_text.render, output_dir="merge-gate-report", width=64),
    "text-80.txt": partial(terminal_text.render, output_dir="merge-gate-report", width=80),
}


@contextmanager
def names_for_shared_words() -> Iterator[Report]:
    """For the golden of a format: FAIL, with a name in place of each sentence that all formats share.

    The sentences are in the golden of test_words.py. The adapters are copies, because the page remembers the text of
    an adapter that it has rendered.
    """

    def named(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any) -> Any:
            text = original(*arguments)
            return [f"the {name}"] * len(text) if isinstance(text, list) else text and f"the {name}"

        return stand_in

    with pytest.MonkeyPatch.context() as patch:
        for name in ("verdict_line", "after_result", "headline", "advice"):
            patch.setattr(run_result, name, named(name.replace("_", " "), getattr(run_result, name)))
        for name in ("cached", "judged", "title", "values", "marks", "forward"):
            patch.setattr(words, name, named(name, getattr(words, name)))
        patch.setattr(words, "ORIGINS", {origin: f"origin {origin}" for origin in Origin})
        yield replace(FAIL, adapters=tuple(replace(one) for one in FAIL.adapters))


@pytest.mark.parametrize("name", RENDERERS)
def test_golden(name: str) -> None:
    with names_for_shared_words() as run:
        hold(GOLDENS / name, RENDERERS[name](run))


def test_golden_of_all_fields() -> None:
    hold(GOLDENS / "report.json", json_report.render(FAIL))


# --- notes -----------------------------------------------------------------------------------------------------------

NOTE = Finding(
    check="base-inconsistent",
    severity=Severity.NOTE,
    message="4 stored tensors are not loaded: mtp.layers.0.proj.weight and 3 more",
    hint="they are not part of the merge",
    origin=Origin.BASE,
)
NOTED = replace(PASSED, findings=(NOTE,))
OF_NOTE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, findings=(NOTE,))


def test_a_note_changes_neither_headline_nor_exit() -> None:
    noted, plain = report(NOTED, bases=(OF_NOTE,)), report(PASSED)
    assert (run_result.headline(noted), noted.result) == (run_result.headline(plain), plain.result)
    assert words.warnings(NOTED) == []
    assert html_report.chain(NOTED) == html_report.chain(PASSED)
    assert compare(plain, noted).changes == ()


def test_an_adapter_with_a_note_alone_has_no_paragraph() -> None:
    shown = terminal_text.render(report(NOTED), "")
    assert NOTE.message not in shown
    of_base = terminal_text.render(report(NOTED, bases=(OF_NOTE,)), "")
    assert "note" in of_base
    assert NOTE.message[:20] in of_base
    failed = replace(FAILED, findings=(*FAILED.findings, NOTE))
    assert f"note    {NOTE.check}" in terminal_text.render(report(failed), "")


@pytest.mark.parametrize(
    ("render", "said"),
    [
        (summary.render, f"- note `./models/base` (bfloat16) `{NOTE.check}`"),
        (html_report.render, '<article class="finding note">'),
        (junit.render, f"note {NOTE.check}: "),
        (sarif.render, '"level": "note"'),
    ],
)
def test_every_format_calls_it_a_note(render: Callable[[Report], str], said: str) -> None:
    assert said in render(report(NOTED, bases=(OF_NOTE,)))


@pytest.mark.attempt("M3", "a base that one adapter of the run loads as another class", "its note names both, once")
@pytest.mark.parametrize("render", [partial(terminal_text.render, output_dir=""), summary.render, html_report.render])
def test_a_note_on_a_base_comes_once_and_names_class_and_adapter(render: Callable[[Report], str]) -> None:
    encoder = replace(OF_NOTE, loaded_as="BertModel", first_adapter="encoder")
    half = replace(encoder, dtype="float16")
    other = replace(OF_NOTE, loaded_as="BertForMaskedLM", first_adapter="filler", findings=())
    text = " ".join(render(report(PASSED, bases=(encoder, half, other))).split())
    assert "(bfloat16; float16) as encoder loads it (BertModel)" in text
    assert text.count(NOTE.hint) == 1
    assert "filler" not in text


# --- a baseline ------------------------------------------------------------------------------------------------------

DAY = dt.date(2026, 3, 1)
DIGESTS = digests_of(report(FAILED).bases)


def filled_in(text: str) -> str:
    return text.replace('reason: ""', 'reason: "known"').replace('owner: ""', 'owner: "team-a"')


def test_a_first_baseline_accepts_what_failed_once_filled_in(wording: Wording) -> None:
    text = first_baseline(report(FAILED, PASSED), DAY)
    with pytest.raises(ConfigError) as caught:
        build_baseline(read_yaml(text, "known.yml"))
    wording(caught.value)
    known = build_baseline(read_yaml(filled_in(text), "known.yml"))
    lines, _ = accept(report(FAILED, PASSED).adapters, known, DAY, DIGESTS)
    assert report(*lines).result is Result.PASS
    assert known[0].until == "2026-05-30"


def test_an_entry_is_written_without_an_edit() -> None:
    given = {"until": "2027-03-31", "owner": "me", "reason": 'known, "#12"'}
    text = first_baseline(report(FAILED, PASSED), DAY, only=("billing",), **given)
    (known,) = build_baseline(read_yaml(text, "known.yml"))
    assert (known.until, known.owner, known.reason) == tuple(given.values())
    assert (known.base, known.dtype, known.quantization) == (*DIGESTS.values(), "bfloat16", "none")
    assert build_baseline(read_yaml(first_baseline(report(FAILED, PASSED), DAY, only=("support",)), "known.yml")) == ()
    for wrong in ({"only": ("biling",)}, {"until": "tomorrow"}):
        with pytest.raises(UsageError):
            first_baseline(report(FAILED), DAY, **wrong)


def test_an_entry_has_all_of_a_base_or_nothing(wording: Wording) -> None:
    lines = filled_in(first_baseline(report(FAILED), DAY)).splitlines(keepends=True)
    with pytest.raises(ConfigError) as caught:
        build_baseline(read_yaml("".join(line for line in lines if "dtype:" not in line), "known.yml"))
    wording(caught.value)


def test_without_a_digest_of_the_base_no_entry_is_written(wording: Wording) -> None:
    text = first_baseline(report(FAILED, bases=()), DAY)
    assert build_baseline(read_yaml(text, "known.yml")) == ()
    wording(text.partition("accept: []")[2])


def test_one_adapter_in_two_dtypes_is_one_entry_for_each_cause() -> None:
    bases = (*FAIL.bases, replace(FAIL.bases[0], dtype="float16"))
    text = first_baseline(replace(FAIL, bases=bases), DAY)
    assert text.count("- adapter:") == 2
    assert "not-judged" not in text


def test_nothing_failed() -> None:
    assert build_baseline(read_yaml(first_baseline(PASS, DAY), "known.yml")) == ()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_name_stays_in_its_comment(attack: str) -> None:
    text = filled_in(first_baseline(report(replace(FAILED, name=attack)), DAY))
    (known,) = build_baseline(read_yaml(text, "known.yml"))
    assert known.cause == "adapter-nonfinite"


SHOWN = {**FORMATS, "terminal": partial(terminal_text.render, output_dir="")}


def accepted(*, today: dt.date = DAY) -> Report:
    """A report whose only failure is in the baseline, and a baseline with one entry that matches nothing."""
    (known,) = build_baseline(read_yaml(filled_in(first_baseline(report(FAILED), DAY)), "known.yml"))
    stranger = replace(known, adapter="0" * 64, cause="no-effect")
    lines, entries = accept([FAILED, PASSED], [known, stranger], today, DIGESTS)
    return report(*lines, baseline=entries)


def ending(found: Report) -> str:
    """What is said of the first entry that is off, behind its owner."""
    return words.baseline(found)[0].rpartition(" by team-a ")[2]


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_accepted_is_in_every_output_and_never_passes(name: str) -> None:
    found = accepted()
    assert found.result is Result.PASS
    text = html.unescape(SHOWN[name](found))
    assert "team-a" in text
    assert "2026-05-30" in text
    assert "known" in text
    assert Acceptance.UNMATCHED in text or ending(found) in " ".join(text.split())
    assert "adapter-nonfinite" in text
    assert run_result.headline(report(PASSED, replace(PASSED, name="other"))) not in text
    back = read(FORMATS["report.json"](found).encode(), "report.json")
    assert back.adapters[0].verdict == "failed"
    assert back.accepted == 1


@pytest.mark.parametrize("name", SHOWN)
def test_past_its_day_the_run_is_red_and_every_output_says_why(name: str) -> None:
    found = accepted(today=dt.date(2027, 1, 1))
    assert found.result is Result.FAIL
    text = html.unescape(SHOWN[name](found))
    assert Acceptance.EXPIRED in text or ending(found) in " ".join(text.split())


def test_what_is_said_of_a_baseline(wording: Wording) -> None:
    for found in (accepted(), accepted(today=dt.date(2027, 1, 1))):
        wording(*words.baseline(found))


# --- published models ------------------------------------------------------------------------------------------------

MANIFEST = HashedFile(path="merge-gate.json", size_bytes=5_000, sha256="ab" * 32)
WEIGHTS = HashedFile(path="model.safetensors", size_bytes=2_200_000_000, sha256="cd" * 32)


def model(directory: str, *files: HashedFile, dtype: str = "preserve") -> PublishedModel:
    return PublishedModel(directory=directory, dtype=dtype, files=files)


PUBLISHED = report(
    adapter("support", published=model("merged/support", MANIFEST, WEIGHTS)),
    adapter("small", published=model("merged/small-bfloat16", MANIFEST, dtype="bfloat16")),
    adapter("<b>|`", published=model("merged/<img src=x>|`\u202e", WEIGHTS)),
    adapter("judged"),
)


def section(text: str, start: str, end: str) -> str:
    return start + text.partition(start)[2].partition(end)[0] + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("published.md", section(summary.render(PUBLISHED), "| published model |", "\n\n")),
        ("published.html", section(html_report.render(PUBLISHED), '<section aria-labelledby="published', "</section>")),
    ],
)
def test_published_models_are_shown_escaped(name: str, text: str) -> None:
    hold(GOLDENS / name, text)
    assert "judged" not in text
    assert "<img" not in text.replace("`", "") or name.endswith(".md")
    assert "\u202e" not in text


def test_a_run_that_publishes_nothing_shows_nothing() -> None:
    run = report(adapter(), adapter("other", Verdict.ERROR))
    assert "published model" not in summary.render(run)
    assert "Published models" not in html_report.render(run)


def test_many_models_fit_into_the_summary() -> None:
    long = "merged/" + "x" * 140
    text = summary.render(report(*(adapter(f"a{n}", published=model(long, MANIFEST)) for n in range(200))))
    assert "more model" in text
    assert len(text.encode()) < 64 * 1024


# --- 500 adapters, and 500 that are all broken in many ways ----------------------------------------------------------

SUMMARY_BYTES = 1024 * 1024  # GitHub drops a longer one
SARIF_RESULTS = 5_000  # GitHub keeps no more of a run
SARIF_GZIP_BYTES = 10 * 1000 * 1000  # nor does it take a larger file, as uploaded
JUNIT_BYTES = 30 * 1000 * 1000  # GitLab's, for one file
JUNIT_NODE_BYTES = 10 * 1000 * 1000  # libxml2's, for one text, which GitLab's parser does not lift
HTML_BYTES = 10 * 1000 * 1000  # ours: what a browser opens at once


def all_broken() -> Report:
    """Each adapter with a dozen kinds of finding."""
    found = tuple(replace(NAN, check=check) for check in list(CHECKS)[:12])
    common = {"cause": found[0].check, "findings": found, "tensors": merged(nan="5.self_attn.q_proj")}
    return report(*(adapter(f"team-{n:03d}", Verdict.FAILED, **common) for n in range(500)))


@pytest.fixture(scope="module", params=["mixed", "all broken"])
def large_run(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every format of a large run."""
    large = fleet(500) if request.param == "mixed" else all_broken()
    assert len(large.adapters) == 500
    return {name: render(large) for name, render in FORMATS.items() if name != "report.json"}


def test_the_summary_is_not_dropped(large_run: dict[str, str]) -> None:
    assert len(large_run["summary.md"].encode()) < SUMMARY_BYTES


def test_code_scanning_takes_all_of_it(large_run: dict[str, str]) -> None:
    assert len(json.loads(large_run["report.sarif"])["runs"][0]["results"]) <= SARIF_RESULTS
    assert len(gzip.compress(large_run["report.sarif"].encode())) < SARIF_GZIP_BYTES


def test_gitlab_parses_all_cases(large_run: dict[str, str]) -> None:
    assert len(large_run["junit.xml"].encode()) < JUNIT_BYTES
    root = ET.fromstring(large_run["junit.xml"])
    assert max(len(text) for text in root.itertext()) < JUNIT_NODE_BYTES
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(cases)) == 500, "GitLab ignores the second case of a name"


def test_a_browser_opens_the_page(large_run: dict[str, str]) -> None:
    assert len(large_run["report.html"].encode()) < HTML_BYTES
