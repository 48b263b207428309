"""Reports of shards → one: what belongs together, what does not, and that nothing incomplete ever passes."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate.features.shards.combined import MOST_DIRECTORIES, PlacedReport, combined, refuse_overwriting, reports_in
from merge_gate.records.report import TOOL, BaseReport, ConfigFile, Report, Sandbox, Shard, Tool
from merge_gate.records.terms import Acceptance, BaselineEntry, Quantization, Result, Verdict
from merge_gate.report.formats import junit, sarif, summary, terminal_text
from merge_gate.report.formats.html_report import render as render_html
from merge_gate.report.formats.json_report import read, render
from tests.support.reports import ENVIRONMENT, SHA256, adapter, report
from tests.support.tried import tried
from tests.support.wording import Wording

BASE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, sha256=SHA256)
OTHER = replace(BASE, model="./models/other")


def shard(index: int, *positions: int, entries: int = 5, count: int = 3, **fields: Any) -> Report:
    defaults = {"plan_sha256": "p" * 64, "versions_sha256": "v" * 64, "bases_from": positions[:1]}
    mark = Shard(index=index, count=count, entries=entries, positions=positions, **defaults)
    return report(*(adapter(f"a{position}") for position in positions), **{
        "shard": mark, "bases": (BASE,) if positions else ()} | fields)  # fmt: skip


SHARDS = (shard(1, 0, 3), shard(2, 1, 2, 4), shard(3))


def mark(one: Report, **changes: Any) -> Report:
    assert one.shard is not None
    return replace(one, shard=replace(one.shard, **changes))


def found(*reports: Report) -> list[PlacedReport]:
    return [(f"shards/{number}", one) for number, one in enumerate(reports, 1)]


def test_shards_of_a_run_are_one_report_in_any_order() -> None:
    for order in permutations(SHARDS):
        whole = combined(found(*order))
        assert [one.name for one in whole.adapters] == ["a0", "a1", "a2", "a3", "a4"]
        assert (whole.result, whole.complete, whole.problems, whole.shard) == (Result.PASS, True, (), None)
        assert whole.bases == (BASE,)
        assert read(render(whole).encode(), "it") == whole


def test_a_shard_with_nothing_to_do_is_green_and_no_verdict(wording: Wording) -> None:
    empty = SHARDS[2]
    assert (empty.adapters, empty.result) == ((), Result.PASS)
    wording(*(line for line in terminal_text.render(empty, "").splitlines() if "shard 3 of 3" in line))
    assert "<error" not in junit.render(empty)
    with_none = [mark(one, entries=5, positions=(), index=index) for index, one in enumerate([empty] * 3, 1)]
    whole = combined(found(*with_none))
    assert whole.result is Result.ERROR
    wording(*whole.problems)
    assert replace(empty, complete=False).result is Result.ERROR
    assert mark(empty, entries=0).result is Result.ERROR
    assert replace(empty, shard=None).result is Result.ERROR


WRONG: dict[str, Callable[[], list[Report]]] = {
    "missing": lambda: [SHARDS[0], SHARDS[2]],
    "an empty one missing": lambda: [SHARDS[0], SHARDS[1]],
    "doubled": lambda: [*SHARDS, SHARDS[0]],
    "unfinished": lambda: [replace(SHARDS[0], complete=False, adapters=SHARDS[0].adapters[:1]), *SHARDS[1:]],
    "another config": lambda: [
        replace(mark(SHARDS[0], plan_sha256="q"), config=ConfigFile(path="c", sha256="c")),
        *SHARDS[1:],
    ],
    "another version of the gate": lambda: [
        replace(mark(SHARDS[0], plan_sha256="q"), tool=Tool(name=TOOL, version="9.9")),
        *SHARDS[1:],
    ],
    "another torch": lambda: [
        replace(mark(SHARDS[0], versions_sha256="w"), environment=replace(ENVIRONMENT, torch="9.9")),
        *SHARDS[1:],
    ],
    "another library": lambda: [SHARDS[0], mark(SHARDS[1], versions_sha256="w"), SHARDS[2]],
    "another set": lambda: [mark(SHARDS[0], plan_sha256="q"), *SHARDS[1:]],
    "another number": lambda: [mark(SHARDS[0], plan_sha256="q", count=4), *SHARDS[1:]],
    "the same entry": lambda: [mark(SHARDS[0], positions=(0, 4)), *SHARDS[1:]],
    "another base": lambda: [SHARDS[0], replace(SHARDS[1], bases=(replace(BASE, sha256="0" * 64),)), SHARDS[2]],
    "a whole run": lambda: [report(adapter("a0")), *SHARDS],
    "a combination": lambda: [replace(SHARDS[0], problems=("x",)), *SHARDS[1:]],
    "a number too high": lambda: [mark(SHARDS[0], index=4), *SHARDS[1:]],
    "a place too far": lambda: [mark(SHARDS[0], positions=(0, 5)), *SHARDS[1:]],
    "places in disorder": lambda: [mark(SHARDS[0], positions=(3, 0)), *SHARDS[1:]],
    "less than it announced": lambda: [replace(SHARDS[0], adapters=()), *SHARDS[1:]],
    "more than it announced": lambda: [mark(SHARDS[0], positions=(0,)), *SHARDS[1:]],
    "bases from nowhere": lambda: [mark(SHARDS[0], bases_from=()), *SHARDS[1:]],
}


@pytest.mark.parametrize("name", tried("C12", "report combine", "result error", {name: name for name in WRONG}))
def test_what_is_not_one_whole_run_is_said_and_never_passes(name: str, wording: Wording) -> None:
    whole = combined(found(*WRONG[name]()))
    assert whole.result is Result.ERROR
    wording(*whole.problems)
    assert read(render(whole).encode(), "it") == whole


def test_a_broken_adapter_outranks_a_missing_shard() -> None:
    broken = replace(SHARDS[0], adapters=(adapter("a0", Verdict.FAILED, cause="no-effect"), adapter("a3")))
    whole = combined(found(broken, SHARDS[2]))
    assert whole.result is Result.FAIL
    assert not whole.complete
    twice = combined(found(*SHARDS, broken))
    assert twice.result is Result.FAIL, "what one of two proved is not lost"


def test_the_problem_stands_in_every_format() -> None:
    whole = combined(found(SHARDS[0], SHARDS[2]))
    for form in (summary.render, render_html, junit.render, sarif.render, lambda one: terminal_text.render(one, "")):
        assert whole.problems[0] in form(whole).replace("\n", " ")
    assert 'errors="1"' in junit.render(whole)
    assert whole.result is Result.ERROR


def test_many_problems_are_cut_for_people() -> None:
    whole = replace(combined(found(*SHARDS)), problems=tuple(f"problem {number}" for number in range(30)))
    assert "problem 19" in summary.render(whole)
    assert "problem 20" not in summary.render(whole)
    assert "problem 29" in render(whole)


def test_bases_stand_once_in_the_order_of_their_entries() -> None:
    classifier = replace(BASE, loaded_as="Classifier")
    first = mark(replace(SHARDS[1], bases=(BASE, OTHER)), bases_from=(2, 1))
    second = mark(replace(SHARDS[0], bases=(classifier, BASE)), bases_from=(3, 0))
    assert combined(found(first, second, SHARDS[2])).bases == (BASE, classifier, OTHER)


def test_a_base_names_the_first_adapter_of_all_shards() -> None:
    late, early = (replace(BASE, first_adapter=name) for name in ("late", "early"))
    first = mark(replace(SHARDS[1], bases=(late,)), bases_from=(1,))
    second = mark(replace(SHARDS[0], bases=(early,)), bases_from=(0,))
    assert combined(found(first, second, SHARDS[2])).bases[0].first_adapter == "early"


def test_devices_may_differ_and_are_all_named() -> None:
    other = replace(ENVIRONMENT, device_name="another CPU", sandbox=Sandbox(held=("network",), missing=("files: why",)))
    idle = replace(ENVIRONMENT, device="auto", device_name="", sandbox=Sandbox())
    whole = combined(
        found(SHARDS[0], replace(SHARDS[1], environment=other), replace(SHARDS[2], environment=idle))
    ).environment
    assert (whole.device, whole.device_name) == ("cpu", "a CPU, another CPU")
    assert whole.sandbox == Sandbox(held=("network",), missing=("processes: the kernel has no filter", "files: why"))


def test_a_baseline_entry_is_that_of_the_shard_that_uses_it() -> None:
    def entry(outcome: Acceptance, adapter: str = SHA256) -> BaselineEntry:
        return BaselineEntry(
            adapter=adapter,
            cause="no-effect",
            reason="known",
            owner="team-a",
            until="2027-01-01",
            outcome=outcome,
            line=3,
        )

    gone = entry(Acceptance.UNMATCHED, "0" * 64)
    parts = [
        replace(one, baseline=(entry(outcome), gone))
        for one, outcome in zip(SHARDS, (Acceptance.UNMATCHED, Acceptance.USED, Acceptance.UNMATCHED), strict=True)
    ]
    for order in permutations(parts):
        assert combined(found(*order)).baseline == (entry(Acceptance.USED), gone)


def test_no_report_of_a_shard_at_all_is_an_error(wording: Wording) -> None:
    with pytest.raises(GateError, match="shards/1") as raised:
        combined(found(report(adapter("a0"))))
    wording(raised.value)
    assert raised.value.exit_code == 3


def test_an_unreadable_place_is_a_problem() -> None:
    whole = combined([*found(*SHARDS), ("shards/x\x1b[31m", "holds no report.json")])
    assert whole.result is Result.ERROR
    assert whole.problems == ("shards/x\ufffd[31m holds no report.json",)


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    for number, one in enumerate(SHARDS, 1):
        (tmp_path / f"shard-{number}").mkdir()
        (tmp_path / f"shard-{number}" / "report.json").write_text(render(one), encoding="utf-8")
        (tmp_path / f"shard-{number}" / "summary.md").write_text("", encoding="utf-8")
    return tmp_path


def problems(*directories: Path) -> list[str]:
    return [one for _, one in reports_in([str(directory) for directory in directories]) if isinstance(one, str)]


def test_a_directory_of_artifacts_and_each_by_name_are_the_same(downloads: Path) -> None:
    below = reports_in([str(downloads)])
    assert [one for _, one in below] == list(SHARDS)
    assert reports_in([str(downloads / f"shard-{number}") for number in (1, 2, 3)]) == below
    assert reports_in([str(downloads), str(downloads / "shard-2")]) == below, "named twice is not there twice"


def test_what_is_not_there_is_named(downloads: Path, wording: Wording) -> None:
    (downloads / "empty").mkdir()
    for place in (downloads, downloads / "empty", downloads / "none"):
        wording(*problems(place))


def test_hostile_content_is_neither_followed_nor_waited_for(downloads: Path, wording: Wording) -> None:
    evil = [downloads / name for name in ("big", "dir", "json", "link", "pipe")]
    for one in evil:
        one.mkdir()
    (downloads / "zlink").symlink_to(downloads / "shard-1")
    (downloads / "dir" / "report.json").mkdir()
    (downloads / "json" / "report.json").write_text('{"a": 1, "a": 2}')
    (downloads / "link" / "report.json").symlink_to(downloads / "shard-1" / "report.json")
    os.mkfifo(downloads / "pipe" / "report.json")
    (downloads / "big" / "report.json").touch()
    os.truncate(downloads / "big" / "report.json", OUTPUT_FILES[0].max_bytes + 1)
    for place, problem in zip([downloads / "zlink", *evil], problems(downloads), strict=True):
        wording(f"{place.name} {problem}")
    assert problems(downloads / "zlink")
    for number in range(MOST_DIRECTORIES):
        (downloads / f"more-{number}").mkdir()
    wording(*problems(downloads)[1:2])


def test_a_shard_is_not_written_over(downloads: Path, wording: Wording) -> None:
    files = reports_in([str(downloads)])
    refuse_overwriting(files, str(downloads / "combined"))
    with pytest.raises(UsageError) as raised:
        refuse_overwriting(files, str(downloads / "shard-1"))
    wording(raised.value)
