"""The end of a run as text: golden, at every width, and for hostile names."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import BaseKey, Quantization, Verdict
from merge_gate.report.formats.terminal_text import render
from merge_gate.report.wording import run_result, words
from tests.support.reports import (
    EMPTY,
    FAIL,
    HALF,
    MISSING,
    NAN,
    PASS,
    ROUNDING,
    WARNED,
    adapter,
    hostile_reports,
    in_two_dtypes,
    lines_of,
    report,
    runner_obeys,
)
from tests.support.wording import Wording


def test_what_is_so_in_several_dtypes_is_said_once() -> None:
    text = render(in_two_dtypes(), "out")
    assert text.count(MISSING.message) == 1
    assert "keys-missing (bfloat16; float16)" in text
    assert "(bfloat16) rounding-loss: " in text


def test_what_is_so_of_many_that_passed_is_said_once() -> None:
    many = [adapter(f"team-{number}", findings=(ROUNDING,)) for number in range(9)]
    other = replace(ROUNDING, message="another share")
    text = render(report(*many, adapter("legal", findings=(other,)), adapter("quiet")), "")
    assert [line for line in text.splitlines() if " passed (" in line] == [
        "✓ team-0, team-1, team-2, team-3, team-4 and 4 more passed (bfloat16)",
        "✓ legal passed (bfloat16)",
    ]
    assert text.count("rounding-loss: ") == 2
    assert all(one.name in text.split("✓ team-0, ")[0] for one in many), "the table has every name"


def test_what_was_reached_at_several_times_has_the_oldest() -> None:
    many = [cached_at(f"2026-03-01T12:00:0{second}Z", f"team-{place}") for place, second in enumerate((3, 2, 3))]
    elsewhere = cached_at("2026-03-01T12:00:02Z", "elsewhere", place="laptop")
    text = render(report(*many, elsewhere), "", width=100)
    assert [line for line in text.splitlines() if " passed (" in line or line.startswith("  mark")] == [
        "✓ team-0, team-1, team-2 passed (bfloat16)",
        "  mark    cached, judged 2026-03-01T12:00:02Z (the oldest) at acme/adapters run 7",
        "✓ elsewhere passed (bfloat16)",
        "  mark    cached, judged 2026-03-01T12:00:02Z at laptop",
    ]


def cached_at(time: str, name: str, **more: str) -> AdapterReport:
    assert WARNED.judged is not None
    return replace(WARNED, name=name, source=name, judged=replace(WARNED.judged, at=time, **more))


def test_the_table_of_a_fleet_has_what_somebody_must_look_at(wording: Wording) -> None:
    broken = [failed(f"broken-{number}") for number in range(3)]
    warned = [adapter(f"warned-{number}", findings=(ROUNDING,)) for number in range(2)]
    text = render(
        report(*(adapter(f"team-{number}") for number in range(995)), *warned, *broken), "out", table_width=120
    )
    table = text.split("\n\n")[0].splitlines()
    assert [line.split()[1] for line in table[2:7]] == [*(one.name for one in broken), *(one.name for one in warned)]
    wording(" ".join(table[7:]))
    assert "team-" not in text


def test_a_name_is_never_cut() -> None:
    name = "customer-support-" * 8 + "v12"
    table = render(report(adapter(name), adapter("other")), "").split("\n\n")[0]
    assert "".join(line[3:].split("  ")[0] for line in table.splitlines()[2:-1]).strip() == name
    assert table.splitlines()[-1].split() == ["✓", "other", "bfloat16", "passed"]


def test_a_tensor_that_the_message_names_is_not_named_again() -> None:
    told = replace(NAN, message=f"{NAN.tensor} is broken")
    text = render(report(adapter("x", Verdict.FAILED, cause=NAN.check, findings=(told,))), "")
    assert text.count(str(NAN.tensor)) == 1
    assert f"\n  where   {words.values(NAN)}\n          {words.ORIGINS[NAN.origin]}\n" in text


def test_a_fleet_that_passed_has_no_table() -> None:
    text = render(report(*(adapter(f"team-{number}") for number in range(41))), "out")
    assert text.startswith("\nPASS: ")
    assert "team-40" in render(report(*(adapter(f"team-{number}") for number in range(1, 41))), "out")


def test_what_is_wrong_with_a_broken_fleet_fits_on_few_screens(wording: Wording) -> None:
    fleet = [failed(f"broken-{number}", f"no. {number}") for number in range(300)]
    fleet += [adapter(f"warned-{n}", findings=(replace(ROUNDING, message=f"no. {n}"),)) for n in range(100)]
    text = render(report(*fleet), "out")
    assert len(text.splitlines()) < 330
    assert text.count(" failed: adapter-nonfinite (") == 20
    assert "\n40 of 400 rows " in text
    after = text.rpartition("no. ")[2].partition("\n\n")[2]
    assert after.index("370") < after.index("\n\nFAIL: ")
    wording(after.partition("\n\nFAIL: ")[0].rpartition("\n\n")[2], re.findall("^Causes: .*", after, re.MULTILINE)[0])


def test_what_breaks_many_alike_is_said_once() -> None:
    text = render(report(*(failed(f"team-{number}") for number in range(7)), failed("other", "another")), "", width=100)
    assert [line for line in text.splitlines() if " failed: " in line] == [
        "✗ team-0, team-1, team-2, team-3, team-4 and 2 more failed: adapter-nonfinite (bfloat16)",
        "✗ other failed: adapter-nonfinite (bfloat16)",
    ]


def failed(name: str, message: str = "") -> AdapterReport:
    finding = replace(NAN, message=message or NAN.message)
    return adapter(name, Verdict.FAILED, cause=NAN.check, findings=(finding,))


def test_causes_count_adapters_and_not_their_dtypes() -> None:
    fleet = [failed(f"broken-{number}") for number in range(30)]
    text = render(report(*fleet, *(replace(one, base=HALF) for one in fleet)), "out")
    assert "\nCauses: adapter-nonfinite 30.\n" in text


def test_the_result_is_the_last_thing_on_the_screen() -> None:
    for run in (PASS, FAIL, EMPTY):
        result = render(run, "out").split("\n\n")[-1].lstrip("\n")
        assert result.startswith(run_result.verdict_line(run)[:20])
        assert len(result.splitlines()) <= 6


def test_without_files_no_report_is_named() -> None:
    assert "Report:" in render(PASS, "out")
    assert "Report:" not in render(PASS, "")


def test_several_bases_are_named() -> None:
    base = BaseKey(model="acme/base", revision=None, dtype="float32", quantization=Quantization.NONE)
    other = adapter("other", base=base)
    assert "acme/base (float32)" in render(report(PASS.adapters[0], other), "out")
    assert "./models/base" not in render(PASS, "out").split("legal passed")[0]


def test_verdicts_have_their_colors() -> None:
    text = render(FAIL, "out", color=True)
    for mark, color in (("✓", 32), ("✗", 31), ("!", 33)):
        assert f"\n\x1b[1;{color}m{mark}" in text
    assert re.sub(r"\x1b\[[0-9;]*m", "", text).split() == render(FAIL, "out").split()


@pytest.mark.parametrize("color", [True, False])
def test_markup_in_a_name_is_shown_as_it_is(color: bool) -> None:
    text = render(report(adapter("[bold]:boom:[link=http://e]x[/]"), adapter("y")), "[red]out", color=color)
    assert "[bold]:boom:[link=http://e]x[/]" in text
    assert "Report: [red]out/report.html" in text


def test_what_a_terminal_opens_is_never_wrapped() -> None:
    assert f"\nReport: {'long/' * 50}out/report.html\n" in render(PASS, "long/" * 50 + "out", width=60)


def test_ascii_marks() -> None:
    text = render(FAIL, "out", ascii_only=True)
    assert not set("✓✗") & set(text)
    assert "x billing failed: adapter-nonfinite" in text


@given(hostile_reports(), st.integers(1, 120))
def test_any_report_at_any_width(run: Report, width: int) -> None:
    text = render(run, "out", width=width)
    for line in lines_of(text):
        assert line.isprintable()
        assert not runner_obeys(line)
        assert cell_len(line) <= max(width, 24) + line.count("# ") + line.count(": ")


def test_what_keeps_shards_from_being_one_run_follows_the_result() -> None:
    text = render(report(adapter(), problems=("shard 2 of 3 is missing", "shard 1 was given twice")), "")
    result = text[text.index("ERROR: ") :]
    assert "- shard 2 of 3 is missing\n- shard 1 was given twice\n" in result


def test_a_check_of_files_alone_gives_no_verdict() -> None:
    text = render(report(adapter("support"), files_only=True), "")
    assert text.splitlines()[1].split() == ["ADAPTER", "DTYPE", "FILES", "CAUSE", "AND", "PLACE"]
    assert "VERDICT" in render(report(adapter("support")), "")
    many = [failed(f"broken-{number}", f"no. {number}") for number in range(50)]
    assert render(report(*many, files_only=True), "").count("`--report html=FILE` writes all.") == 2


@pytest.mark.parametrize(("table_width", "lines"), [(80, 2), (120, 1)])
def test_the_table_is_as_wide_as_the_terminal_and_cuts_no_place(table_width: int, lines: int) -> None:
    module = "base_model.model.layers.0.self_attn.q_proj"
    broken = adapter("a", Verdict.FAILED, cause=NAN.check, findings=(replace(NAN, module=module, message="x " * 99),))
    text = render(report(broken), "out", width=80, table_width=table_width)
    table, _, prose = text.partition("\n\n")
    (row, *more) = table.splitlines()[2:]
    assert 1 + len(more) == lines
    assert "".join([row, *more]).replace(" ", "").endswith(f"adapter-nonfinitein{module}")
    assert 60 < max(map(len, prose.splitlines())) <= 80
