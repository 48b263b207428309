"""The sentences and figures that all formats share, the result of a run in a sentence, and foreign text in them."""

import html
from dataclasses import replace

import pytest
from hypothesis import given

from merge_gate.judging.bounds import bounded
from merge_gate.judging.checks.check import FOLLOWS
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.measured import Forward, TensorMerge
from merge_gate.records.report import Accepted, AdapterReport, Judged, Report, Shard
from merge_gate.records.terms import FailureKind, Finding, Origin, Quantization, Severity, Verdict
from merge_gate.report.formats import html_report, junit, sarif, summary, terminal_text
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import more_findings
from merge_gate.report.wording.grid import State, blocks, count_states, states
from merge_gate.report.wording.run_result import HARDLY_CHANGED, AdapterState
from merge_gate.report.wording.untrusted import inert, one_line, safe_text, shorten
from tests.support.reports import (
    BASE,
    CRASHED,
    EMPTY,
    FAIL,
    FAILED,
    HALF,
    HALF_FAILED,
    MERGED_NAN,
    NAN,
    OVERFLOW,
    PASS,
    PASSED,
    RAN,
    ROUNDING,
    TEXTS,
    UNDECIDED,
    WARNED,
    adapter,
    report,
    runner_obeys,
    tensors,
)
from tests.support.wording import Wording

KNOWN = Accepted(owner="ml", until="2027-01-01", reason="known")


def test_what_stands_beside_a_verdict(wording: Wording) -> None:
    wording(words.cached(PASS), *words.marks(WARNED), *words.marks(replace(FAILED, accepted=KNOWN)))
    wording(words.title(FAILED), words.title(CRASHED), words.title(PASSED))


def at(time: str, place: str = "acme/adapters run 7") -> Judged:
    return Judged(key="0" * 64, at=time, place=place, seconds=0.84)


def test_a_report_says_when_and_where_its_verdicts_were_reached(wording: Wording) -> None:
    """For whoever reads it in two years; what earlier runs reached is said beside it."""
    late, early = adapter("a", judged=at("2026-03-01T12:00:09Z")), adapter("b", judged=at("2026-03-01T12:00:00Z"))
    elsewhere = adapter("c", judged=at("2026-03-01T12:00:00Z", "vm"))
    assert words.judged(report(PASSED, WARNED)) == ""
    run = report(late, early, elsewhere, PASSED)
    said = words.judged(run)
    wording(words.judged(report(early, WARNED)), said)
    assert f"| judged | {said} |" in html.unescape(summary.render(run))
    assert f"<dt>judged</dt><dd>{said}</dd>" in html_report.render(run)
    assert f'<property name="judged" value="{said}" />' in junit.render(run)


def test_a_run_of_the_model_is_shown_in_one_line(wording: Wording) -> None:
    """In each format for people. A share of bfloat16's largest value would tell nothing."""
    half = adapter("half", base=HALF, forward=RAN)
    wide = adapter("wide", forward=replace(RAN, largest_allowed=3.4e38))
    broken = adapter(
        "broken",
        forward=Forward(
            ran=True,
            modules=8,
            modules_run=5,
            not_run=("vision.q_proj",),
            nonfinite_module="model.norm",
            nonfinite_origin=Origin.BASE,
        ),
    )
    failed = adapter("failed", Verdict.FAILED, cause="no-effect", findings=(NAN,), forward=RAN)
    quiet = adapter("quiet", forward=Forward(why_not="the base is streamed"))
    run = report(half, wide, broken, quiet, failed, adapter("old"))
    wording(*(words.forward(one) for one in (half, wide, broken, quiet, adapter("bare", forward=Forward(ran=True)))))
    itself = adapter("itself", forward=Forward(ran=True, nonfinite_module="", largest=390.0, largest_module=""))
    assert words.forward(itself).count("the model itself") == 2
    assert words.forward(adapter("old")) == ""
    page = html.unescape(html_report.render(run).replace("<wbr>", ""))
    text, markdown = terminal_text.render(run, "", width=400), summary.render(run)
    for one in (half, wide, broken):
        assert words.forward(one) in page
    assert page.count("models, on made-up inputs") == 5, "one that failed or did not run is on the page alone"
    assert "the base is streamed" not in text + markdown
    assert (text.count("ran on made-up inputs"), markdown.count("ran on made-up inputs")) == (1, 3)
    rest = "(2 other runs stayed further from the limit)"
    assert f"broken ({words.precision(broken.base)}) {words.forward(broken)} {rest}\n" in text


def test_a_terminal_shows_the_run_closest_to_its_limit() -> None:
    low, high = (adapter(name, forward=replace(RAN, largest=at)) for name, at in (("a", 9.0), ("b", 99.0)))
    wide = adapter("c", forward=replace(RAN, largest=9e9, largest_allowed=3.4e38))
    assert f"b ({words.precision(high.base)}) ran on" in terminal_text.render(report(low, high, wide), "", width=400)
    assert "other run" not in terminal_text.render(report(low), "", width=400)
    assert "ran on" not in terminal_text.render(report(adapter("quiet")), "", width=400)


def test_the_cause_decides_not_the_first_symptom() -> None:
    assert FAILED.findings[0] == MERGED_NAN
    assert words.deciding(FAILED) == NAN
    assert words.others(FAILED) == [MERGED_NAN, FAILED.findings[2]]
    assert words.deciding(WARNED) is None
    assert words.cause(CRASHED) == "not-judged"
    assert words.deciding(adapter(verdict=Verdict.ERROR)) is None


def test_equal_findings_are_not_lost() -> None:
    twice = adapter(verdict=Verdict.FAILED, cause=NAN.check, findings=(NAN, replace(NAN)))
    assert len(words.others(twice)) == 1


def test_worst_first_else_in_order() -> None:
    assert words.worst_first(FAIL.adapters) == [FAILED, HALF_FAILED, CRASHED, PASSED, WARNED]


def test_values_and_place(wording: Wording) -> None:
    counted = replace(OVERFLOW, message="broken")
    wording(words.values(counted))
    said = replace(OVERFLOW, message=f"holds {words.values(counted)}")
    assert words.values(said) == "", "the message says it already"
    bare = Finding(check="c", severity=Severity.ERROR, message="in m", origin=Origin.FILE, module="m", tensor="t")
    assert words.values(bare) == ""
    wording(words.place(bare))
    assert words.place(NAN) == NAN.tensor
    assert words.place(bare, unless_in="in m") == words.place(bare)
    assert words.place(bare, unless_in="t is bad") == ""


def test_an_activation_is_not_in_the_adapters_tensors() -> None:
    """The message names the module already; in the terminal, `where` names it again."""
    louder = Finding(
        check="activation-nonfinite", severity=Severity.ERROR, message="lm_head returns NaN", origin=Origin.ADAPTER,
        module="lm_head",
    )  # fmt: skip
    assert words.origin(louder) == "in what this module returns"
    assert words.origin(replace(louder, module="")) == "in what the model itself returns"
    assert words.origin(replace(louder, origin=Origin.BASE)) == words.ORIGINS[Origin.BASE]
    shown = terminal_text.render(report(adapter("loud", Verdict.FAILED, cause=louder.check, findings=(louder,))), "")
    assert "  where   lm_head\n          in what this module returns\n" in shown


def test_every_origin_has_its_words(wording: Wording) -> None:
    assert set(words.ORIGINS) == set(Origin)
    wording(*(f"{origin}: {said}" for origin, said in words.ORIGINS.items()))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.842, "0.84 s"),
        (12.34, "12.3 s"),
        (12, "12 s"),
        (245, "4 min 05 s"),
        (3720, "1 h 02 min"),
        (float("nan"), "unknown time"),
        (-1, "unknown time"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_precision() -> None:
    assert words.precision(BASE) == "bfloat16"
    assert words.precision(replace(BASE, quantization=Quantization.BNB_4BIT)) == "bfloat16, bnb-4bit"


def test_hundreds_of_findings_become_one_line_per_check() -> None:
    many = [replace(NAN, tensor=f"t{n}") for n in range(96)]
    assert words.grouped([*many, MERGED_NAN]) == [(many[0], tuple(many[1:])), (MERGED_NAN, ())]


@pytest.mark.parametrize(
    ("origin", "hint", "told"),
    [
        (Origin.MERGE, f"{FOLLOWS} the adapter's own tensors", ("in the merged model", "because")),
        (Origin.ADAPTER, f"{FOLLOWS} the same names", (words.ORIGINS[Origin.ADAPTER], "because")),
        (Origin.MERGE, "lower lora_alpha", (words.ORIGINS[Origin.MERGE], "to do")),
    ],
)
def test_what_follows_from_another_finding_is_no_cause(origin: Origin, hint: str, told: tuple[str, str]) -> None:
    finding = replace(NAN, origin=origin, hint=hint)
    assert (words.origin(finding), words.hint_label(finding)) == told


def placed(finding: Finding, layer: int | None, module: str) -> Finding:
    name = module if layer is None else f"model.layers.{layer}.{module}"
    return replace(finding, module=name, tensor=f"{name}.weight")


EXPECTED = replace(ROUNDING, module=None, tensor=None, message="expect.r is 16, but the config has 4")
GROUPS: dict[str, list[Finding]] = {
    "none": [],
    "one": [placed(NAN, 3, "mlp.up_proj")],
    "ranges": [
        *(placed(NAN, layer, "mlp.down_proj") for layer in range(10, 20)),
        placed(replace(OVERFLOW, neginf=0), 20, "self_attn.o_proj"),
    ],
    "gaps": [placed(NAN, layer, "mlp.down_proj") for layer in (1, 2, 3, 7, 9, 10)],
    "both-infinities": [placed(OVERFLOW, 1, "a"), placed(OVERFLOW, 2, "b"), placed(NAN, None, "lm_head")],
    "many-modules": [placed(NAN, 1, f"expert.part{chr(97 + number)}") for number in range(9)],
    "without-values": [placed(ROUNDING, 4, "mlp.up_proj"), placed(ROUNDING, 5, "mlp.up_proj")],
    "no-place": [EXPECTED, replace(EXPECTED, message="expect.lora_alpha is 8, but the config has 32")],
    "hidden": [placed(NAN, None, "a\x1b[31m\u202eb")],
    "counted": list(bounded(placed(NAN, layer, "q_proj") for layer in range(150)))[1:],
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_rest_in_a_sentence(name: str, wording: Wording) -> None:
    wording(more_findings(GROUPS[name]) or "(nothing)")


def test_a_forged_count_is_no_count() -> None:
    for more in (float("nan"), float("inf"), -3.0, 1e300):
        forged = replace(MERGED_NAN, message="and many", measured=(("more", more),))
        assert more_findings([forged]).startswith("1 more")


ONE = tensors(1)[0]


def merge_of(module: str, own: str = "weight", **counts: int) -> TensorMerge:
    name = f"{module}.{own}" if module else own
    return replace(ONE, module=module, stats=replace(ONE.stats, name=name, **counts))


@pytest.mark.parametrize(
    ("module", "own", "stack", "layer", "row"),
    [
        ("model.layers.5.mlp.up_proj", "weight", "model.layers", "5", "mlp.up_proj"),
        ("model.layers.5.mlp.up_proj", "bias", "model.layers", "5", "mlp.up_proj.bias"),
        ("transformer.h.11.attn.c_attn", "weight", "transformer.h", "11", "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.w1", "weight", "model.layers", "3", "mlp.experts.7.w1"),
        ("layers.0", "weight", "layers", "0", "weight"),
        ("0.q", "weight", "", "0", "q"),
        ("lm_head", "weight", "", "", "lm_head"),
        ("classifier", "bias", "", "", "classifier.bias"),
        ("model.layer5.q", "weight", "", "", "model.layer5.q"),
    ],
)
def test_where_a_tensor_stands(module: str, own: str, stack: str, layer: str, row: str) -> None:
    (block,) = blocks((merge_of(module, own),))
    assert (block.stack, block.layers, block.modules, block.places) == (stack, (layer,), (row,), ((0, 0, 0),))


def test_layers_are_in_the_order_of_numbers_and_stacks_apart() -> None:
    names = ["enc.layers.10.q", "enc.layers.9.q", "dec.layers.0.q", "enc.layers.9.v"]
    first, second = blocks(tuple(merge_of(name) for name in names))
    assert (first.stack, first.layers, first.modules) == ("enc.layers", ("9", "10"), ("q", "v"))
    assert first.places == ((0, 0, 1), (1, 0, 0), (3, 1, 0))
    assert (second.stack, second.places) == ("dec.layers", ((2, 0, 0),))


def test_the_worst_state_counts() -> None:
    merges = (
        merge_of("a", nan=1, posinf=2),
        merge_of("b", neginf=1),
        replace(merge_of("c"), changed=False),
        merge_of("d"),
        merge_of("e"),
    )
    assert states(merges) == [State.NAN, State.INF, State.NO_EFFECT, State.FINITE, State.FINITE]
    assert count_states(merges) == [(State.NAN, 1), (State.INF, 1), (State.NO_EFFECT, 1), (State.FINITE, 2)]


def test_a_bias_that_is_not_trained_is_not_without_effect() -> None:
    bias = replace(merge_of("a", "bias"), changed=False)
    assert states((merge_of("a"), bias)) == [State.FINITE, State.UNTOUCHED]
    assert states((replace(merge_of("a"), changed=False), bias)) == [State.NO_EFFECT, State.NO_EFFECT]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Größe 名前", "Größe 名前"),
        ("a\nb\tc  d", "a b c d"),
        ("a\u2028b", "a b"),
        ("\x1b[31mred", "\ufffd[31mred"),
        ("\u202efdp.exe", "\ufffdfdp.exe"),
        ("zero\u200bwidth\ufeff", "zero\ufffdwidth\ufffd"),
        ("\ud800", "\ufffd"),
        ("e" + "\u0301" * 50, "e" + "\u0301" * 4),
        ("\u3164", "\ufffd"),
    ],
)
def test_hidden_characters_are_shown_on_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_a_long_name_keeps_head_and_tail() -> None:
    assert shorten("model.layers.31.mlp.up_proj", 13) == "model.…p_proj"
    assert len(one_line("x" * 999, 200)) == 200


def test_commands_are_broken_and_stay_readable() -> None:
    assert inert("  ::error::x") == "  : :error::x"
    assert inert("log ##[error]x") == "log # #[error]x"
    assert inert("a::b #[x]") == "a::b #[x]"
    assert safe_text("one\r::error::two\nthree") == "one\n: :error::two\nthree"


@given(TEXTS)
def test_no_line_of_any_text_is_obeyed(text: str) -> None:
    assert not any(runner_obeys(line) for line in safe_text(text).split("\n"))
    assert not runner_obeys(inert(one_line(text)))
    assert one_line(text).isprintable()


def failed(name: str, check: str, **fields: object) -> AdapterReport:
    finding = replace(NAN, check=check)
    return adapter(name, Verdict.FAILED, cause=check, findings=(finding,), **fields)


def undecided(name: str, check: str) -> AdapterReport:
    return adapter(name, Verdict.ERROR, cause=check, findings=(replace(NAN, check=check),))


@pytest.mark.attempt("M5", "an adapter that failed in one dtype and was not judged in the other", "1 not judged")
def test_what_was_not_judged_in_another_dtype_is_counted() -> None:
    run = report(failed("a", "delta-norm"), replace(undecided("a", "not-judged"), base=HALF), adapter("b"))
    assert "(1 of 3 merges, 1 not judged)" in run_result.headline(run)
    first, second = run_result.adapters_of(run)
    assert (first.state, first.is_undecided, second.is_undecided) == (AdapterState.FAILED, True, False)


def warned(name: str, check: str, *, lost: float = 0.0, **fields: object) -> AdapterReport:
    finding = replace(ROUNDING, check=check, measured=(("lost_share", lost),))
    return adapter(name, findings=(finding,), **fields)


SHARD = Shard(index=2, count=4, plan_sha256="p", versions_sha256="v", entries=1, positions=())
RUNS: dict[str, Report] = {
    "passed": PASS,
    "one-passed": report(PASSED),
    "one-warned": report(WARNED),
    "fleet-passed": report(*(adapter(f"a{n}") for n in range(1200))),
    "failed": FAIL,
    "one-failed": report(FAILED),
    "one-undecided": report(CRASHED),
    "both-failed": report(FAILED, HALF_FAILED),
    "unfinished-failed": report(FAILED, complete=False),
    "unfinished-passed": report(PASSED, WARNED, complete=False),
    "undecided": UNDECIDED,
    "dtypes": report(PASSED, adapter(base=HALF), WARNED),
    "empty": EMPTY,
    "none": report(),
    "unfinished-one-failed": report(PASSED, FAILED, complete=False),
    "accepted": report(PASSED, replace(FAILED, accepted=KNOWN)),
    "one-accepted": report(replace(FAILED, accepted=KNOWN)),
    "empty-shard": report(shard=SHARD),
    "shards-passed": report(PASSED, problems=("shard 2 of 3 is missing",)),
    "known-and-failed": report(PASSED, replace(FAILED, accepted=KNOWN), HALF_FAILED),
    "known-and-undecided": report(PASSED, replace(FAILED, accepted=KNOWN), CRASHED),
    "known-twice": report(
        PASSED,
        WARNED,
        replace(FAILED, accepted=KNOWN),
        replace(HALF_FAILED, accepted=replace(KNOWN, until="2026-12-31")),
    ),
    "dtypes-failed": report(FAILED, replace(FAILED, base=HALF), PASSED, adapter(base=HALF), CRASHED),
    "one-dtype-failed": report(adapter("a"), failed("a", "merged-nonfinite", base=HALF)),
    "one-refused": report(failed("a", "pickle-refused")),
    "refused": report(PASSED, failed("a", "pickle-refused"), failed("b", "config-unsafe")),
    "not-mergeable": report(PASSED, failed("a", "not-mergeable")),
    "unexpected": report(failed("a", "expectation-failed"), failed("b", "base-mismatch")),
    "every-kind": report(
        PASSED,
        FAILED,
        HALF_FAILED,
        failed("c", "pickle-refused"),
        failed("d", "not-mergeable"),
        failed("e", "expectation-failed"),
    ),
    "broken-base": report(PASSED, failed("a", "base-nonfinite"), failed("b", "base-nonfinite")),
    "broken-base-and-adapter": report(failed("a", "base-nonfinite"), failed("b", "adapter-nonfinite")),
    "not-published": report(PASSED, undecided("a", "not-published")),
    "only-not-published": report(undecided("a", "not-published")),
    "not-judged-and-not-published": report(undecided("a", "not-judged"), undecided("b", "not-published")),
    "hardly-changed": report(warned("a", "rounding-loss", lost=0.98)),
    "one-hardly-changed": report(PASSED, warned("a", "rounding-loss", lost=0.98), warned("b", "headroom")),
    "hardly-changed-dtypes": report(
        warned("a", "rounding-loss", lost=0.98),
        warned("a", "rounding-loss", lost=0.98, base=HALF),
        warned("b", "rounding-loss", lost=0.98),
        warned("b", "rounding-loss", lost=0.6, base=HALF),
    ),
    "much-lost": report(warned("a", "rounding-loss", lost=0.6)),
    "replaced": report(PASSED, warned("a", "delta-norm"), warned("b", "delta-norm")),
    "other-warnings": report(PASSED, warned("a", "headroom"), warned("b", "base-mismatch")),
    "files-passed": report(PASSED, files_only=True),
    "shards-failed": report(FAILED, problems=("shard 2 of 3 is missing",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_headline_and_advice(name: str, wording: Wording) -> None:
    wording(f"{run_result.verdict_line(RUNS[name])}\n> {run_result.advice(RUNS[name])}")


def test_a_pass_with_warnings_says_so_in_every_format() -> None:
    run = report(warned("a", "rounding-loss", lost=0.98), PASSED)
    line = "PASS, but 1 adapter hardly differs from its base in bfloat16"
    assert run_result.verdict_line(run).startswith(line)
    for render in (summary.render, html_report.render, sarif.render, lambda run: terminal_text.render(run, "out")):
        assert line in " ".join(render(run).replace('<span class="result">PASS</span>', "PASS").split())
    assert "PASS, but" not in run_result.verdict_line(report(PASSED))


def test_a_share_at_the_limit_is_not_hardly_changed() -> None:
    at = run_result.verdict_line(report(warned("a", "rounding-loss", lost=HARDLY_CHANGED)))
    above = run_result.verdict_line(report(warned("a", "rounding-loss", lost=HARDLY_CHANGED + 0.01)))
    assert at != above


def test_the_effect_counts_and_not_the_norm() -> None:
    (norm,) = warned("a", "rounding-loss", lost=0.98).findings
    measured = replace(norm, measured=(("rounding_change", 0.6), *norm.measured))
    much_lost = run_result.verdict_line(RUNS["much-lost"])
    assert run_result.verdict_line(report(adapter("a", findings=(measured,)))) == much_lost


@pytest.mark.parametrize(
    ("entries", "state"),
    [
        ((PASSED,), AdapterState.PASSED),
        ((PASSED, FAILED), AdapterState.FAILED),
        ((CRASHED, FAILED), AdapterState.FAILED),
        ((PASSED, CRASHED), AdapterState.ERROR),
        ((PASSED, replace(FAILED, accepted=KNOWN)), AdapterState.ACCEPTED),
        ((FAILED, replace(FAILED, accepted=KNOWN)), AdapterState.FAILED),
    ],
)
def test_the_worst_entry_is_the_state_of_an_adapter(entries: tuple[AdapterReport, ...], state: AdapterState) -> None:
    (one,) = run_result.adapters_of(report(*(replace(entry, name="a") for entry in entries)))
    assert one.state is state


def test_each_kind_of_failure_has_its_checks() -> None:
    kinds = {kind: [check for check, row in CHECKS.items() if row.failure is kind] for kind in FailureKind}
    assert set(kinds[FailureKind.REFUSED]) == {"pickle-refused", "config-unsafe"}
    assert kinds[FailureKind.NOT_MERGEABLE] == ["not-mergeable", "merge-differs"]
    assert set(kinds[FailureKind.UNEXPECTED]) == {"base-mismatch", "expectation-failed"}


@pytest.mark.parametrize(("check", "kind"), [("pickle-refused", FailureKind.REFUSED), ("gone", FailureKind.BROKEN)])
def test_the_kind_follows_from_the_cause_in_older_reports(check: str, kind: FailureKind) -> None:
    old = failed("a", check)
    assert old.failure is None
    assert words.failure(old) is kind
    assert words.failure(replace(old, failure=FailureKind.UNEXPECTED)) is FailureKind.UNEXPECTED
    assert words.failure(PASSED) is words.failure(CRASHED) is None


@pytest.mark.parametrize("check", ["pickle-refused", "not-mergeable", "expectation-failed"])
def test_every_format_names_the_kind(check: str) -> None:
    run = report(failed("a", check), FAILED)
    kind = words.FAILURES[CHECKS[check].failure]
    for text in (summary.render(run), html_report.render(run), junit.render(run), sarif.render(run)):
        assert kind in text
    assert kind in terminal_text.render(run, "out")
