"""The view of a run: which view for which streams, what each shows, and that no name or encoding can break it."""

import contextlib
import dataclasses
import io
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from merge_gate.cli.output import make_view
from merge_gate.judging.not_judged import NOT_JUDGED, accident
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.measured import TensorStats
from merge_gate.records.report import Report
from merge_gate.records.terms import Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.run.rich_view import RichView
from merge_gate.run.view import EVERY_S, HourlyLog, PlainView, View
from tests.support.played_run import FACTS, play
from tests.support.reports import (
    CRASHED,
    FAIL,
    FAILED,
    HALF_FAILED,
    PASSED,
    TEXTS,
    WARNED,
    adapter,
    hostile_reports,
    lines_of,
    runner_obeys,
)


class Stream(io.TextIOWrapper):
    """A text stream in memory of any encoding that may claim to be a terminal."""

    def __init__(self, *, tty: bool = False, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="", write_through=True)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    @property
    def text(self) -> str:
        raw = self.buffer
        assert isinstance(raw, io.BytesIO)
        return raw.getvalue().decode(self.encoding)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# --- which view ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tty", "env", "kind"),
    [
        (True, {"TERM": "xterm"}, RichView),
        (True, {"TERM": "xterm", "CI": "false"}, RichView),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, RichView),
        (False, {"TERM": "xterm"}, PlainView),
        (True, {"TERM": "dumb"}, PlainView),
        (True, {"TERM": "xterm", "CI": "true"}, PlainView),
        (True, {"TERM": "xterm", "GITHUB_ACTIONS": "true"}, PlainView),
    ],
)
def test_the_view_suits_streams_and_environment(tty: bool, env: dict[str, str], kind: type) -> None:
    assert type(make_view(Stream(tty=tty), Stream(tty=tty), env=env)) is kind


@pytest.mark.parametrize(
    ("tty", "env", "asked", "colored"),
    [
        (True, {}, "auto", True),
        (False, {}, "auto", False),
        (False, {"FORCE_COLOR": "1"}, "auto", True),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, "auto", False),
        (True, {"NO_COLOR": "1"}, "always", True),
        (False, {"CI": "true"}, "always", True),
        (True, {"FORCE_COLOR": "1"}, "never", False),
        (True, {"TERM": "dumb"}, "auto", False),
    ],
)
def test_the_result_is_colored_as_asked(tty: bool, env: dict[str, str], asked: str, colored: bool) -> None:
    out, err = Stream(tty=tty), Stream(tty=tty)
    play(make_view(out, err, env={"TERM": "xterm"} | env, color=asked))
    assert ("\x1b[" in out.text) == colored
    plain = Stream()
    play(PlainView(plain, Stream()))
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.text).split() == plain.text.split() or tty


def test_a_quiet_run_shows_notes_and_the_result() -> None:
    out, err = Stream(tty=True), Stream(tty=True)
    view = make_view(out, err, env={"TERM": "xterm"}, quiet=True)
    play(view)
    view.note("the base changed")
    assert err.text == "a note\nthe base changed\n"
    assert "FAIL: 2 of 5 adapters failed" in out.text


def test_a_verbose_run_names_each_merge_that_starts() -> None:
    err = Stream(tty=True)
    play(make_view(Stream(tty=True), err, env={"TERM": "xterm"}, verbose=True))
    usual = Stream()
    play(PlainView(Stream(), usual))
    more = [line for line in err.text.splitlines() if line not in usual.text.splitlines()]
    assert more
    assert all(line.endswith(": merging") for line in more)


@pytest.mark.parametrize(
    ("verbose", "env", "is_shown"), [(True, {}, True), (False, {"MERGE_GATE_DEBUG": "1"}, True), (False, {}, False)]
)
def test_what_the_report_of_a_bug_needs_is_shown(verbose: bool, env: dict[str, str], is_shown: bool) -> None:
    err = Stream()
    with pytest.raises(ValueError, match="line") as raised:
        int("::error::the second line")
    findings = (accident("it broke", raised.value),)
    view = make_view(Stream(), err, env=env, verbose=verbose)
    view.adapter_done(adapter("odd", Verdict.ERROR, cause=NOT_JUDGED, findings=findings))
    shown = err.text.partition("odd: log, also in report.json:\nTraceback (most recent call last):\n")
    assert bool(shown[1]) == is_shown
    assert ("in test_what_the_report_of_a_bug_needs_is_shown" in shown[2]) == is_shown
    assert not any(map(runner_obeys, err.text.splitlines()))


def test_plain_does_without_rich() -> None:
    code = (
        "import sys; from merge_gate.cli.output import make_view;"
        "make_view(sys.stdout, sys.stderr, env={'CI': '1'}).start('c.yml', 1, 1);"
        "sys.exit(any(m.split('.')[0] in {'rich', 'torch'} for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("path", "merges", "said"),
    [
        ("c.yml", 1, "1 adapter in c.yml"),
        ("c.yml", 2, "1 adapter in c.yml, 2 merges"),
        (COMMAND_LINE, 1, "1 adapter on the command line"),
    ],
)
def test_adapters_are_told_from_merges(path: str, merges: int, said: str) -> None:
    err = Stream()
    PlainView(Stream(), err).start(path, 1, merges)
    assert err.text == f"merge-gate: {said}\n"


def test_silence_takes_every_event(capfd: pytest.CaptureFixture[str]) -> None:
    play(View())
    assert capfd.readouterr() == ("", "")


# --- plain ---------------------------------------------------------------------------------------------------------


(MARK,) = words.marks(WARNED)


def test_plain_says_one_line_per_event() -> None:
    out, err = Stream(), Stream()
    play(PlainView(out, err))
    assert err.text.splitlines() == [
        "merge-gate: 5 adapters in merge-gate.yml",
        "loading base ./models/base (bfloat16)",
        "base ./models/base (bfloat16): 1,100,048,384 parameters, all finite, 1.34 s",
        "[1/5] support (bfloat16): passed, 48 modules, 0.84 s",
        f"[2/5] legal (bfloat16): passed, 48 modules, {MARK}, warning: rounding-loss",
        "[3/5] billing (bfloat16): failed, adapter-nonfinite in model.layers.5.self_attn.q_proj, 0.84 s",
        "[4/5] summaries (float16): failed, merged-nonfinite in model.layers.17.mlp.up_proj, 0.84 s",
        "[5/5] translate-de (bfloat16): not judged, 0.84 s",
        "a note",
    ]
    assert f"{run_result.verdict_line(FAIL)}." in out.text
    assert "\x1b" not in out.text + err.text


def test_a_long_merge_is_not_silent() -> None:
    clock, err = Clock(), Stream()
    view = PlainView(Stream(), err, clock=clock)
    view.start("c.yml", 1, 1)
    view.adapter_started("big", 1, 1, "float16")
    for done in range(1, 9):
        clock.now += 10
        view.adapter_progress(done, 16, f"layers.{done}")
    clock.now += 60
    view.adapter_started("next", 1, 1, "float16")
    view.adapter_progress(1, 16, "layers.1")
    assert err.text.splitlines()[1:] == [
        "[1/1] big: 3 of 16 modules, about 2 min 10 s left, at layers.3",
        "[1/1] big: 6 of 16 modules, about 1 min 40 s left, at layers.6",
        "[1/1] next: 1 of 16 modules, at layers.1",
    ], "nothing is estimated in the first second"


def test_a_base_that_is_not_finite_or_not_measured_yet_says_so() -> None:
    err = Stream()
    bad = TensorStats(name="w", dtype="bfloat16", shape=(2,), numel=2, nan=1)
    PlainView(Stream(), err).base_loaded(dataclasses.replace(FACTS, model="b", nonfinite=(bad,), parameters=0), 2)
    assert err.text == "base b (bfloat16): 0 parameters, 1 tensor not finite, 2 s\n"
    PlainView(Stream(), err).base_loaded(FACTS, 2, measured=False)
    assert err.text.count("finite") == 1


def test_an_adapter_that_never_started_is_counted() -> None:
    err = Stream()
    view = PlainView(Stream(), err)
    view.start("c.yml", 2, 2)
    view.adapter_done(adapter("lfs", Verdict.FAILED, cause="file-lfs-pointer", seconds=0.01))
    view.adapter_started("good", 2, 2, "bfloat16")
    view.adapter_done(PASSED)
    assert [line[:11] for line in err.text.splitlines()[1:]] == ["[1/2] lfs (", "[2/2] suppo"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("tty", [True, False])
def test_no_encoding_breaks_it(encoding: str, tty: bool) -> None:
    out, err = Stream(tty=tty, encoding=encoding), Stream(tty=tty, encoding=encoding)
    view = RichView(out, err) if tty else PlainView(out, err)
    play(view, dataclasses.replace(FAIL, adapters=(adapter("名前-é"), FAILED, CRASHED)), name="名前")
    assert "FAIL" in out.text


@given(hostile_reports(), TEXTS, st.sampled_from(["utf-8", "ascii"]))
def test_plain_lets_no_name_become_a_command(report: Report, name: str, encoding: str) -> None:
    out, err = Stream(encoding=encoding), Stream(encoding=encoding)
    play(PlainView(out, err), report, name)
    for line in lines_of(out.text) + lines_of(err.text):
        assert not runner_obeys(line)
        assert line.isprintable()


# --- rich ----------------------------------------------------------------------------------------------------------


def frame(view: RichView, width: int, height: int = 24) -> list[str]:
    """The lines of the bars in a terminal of this size, each bar as a dash."""
    view._console.size = (width, height)  # type: ignore[assignment]
    shown = view._console.render_lines(view._bars.get_renderable(), pad=False)
    lines = ["".join(segment.text for segment in line) for line in shown]
    return [" ".join(re.sub("[━╸╺]+", "-", line).split()) for line in lines]


def test_the_live_view_shows_what_is_in_progress_and_how_long() -> None:
    clock, err = Clock(), Stream(tty=True)
    view = RichView(Stream(tty=True), err, color=False, clock=clock)
    view.total = 5
    view.base_loading("./models/base", "bfloat16")
    assert [line[2:] for line in frame(view, 80)] == ["loading base ./models/base (bfloat16) -"]
    clock.now += 3
    assert [line[2:] for line in frame(view, 80)] == ["loading base ./models/base (bfloat16) - 3 s"]
    view.base_loaded(FACTS, 3)
    view.adapter_started("support", 1, 5, "bfloat16")
    view.adapter_done(PASSED)
    assert "support" not in err.text
    view.adapter_started("billing", 2, 5, "bfloat16")
    assert [line[2:] for line in frame(view, 80)] == ["all - 1/5 adapters", "billing (bfloat16) -"]
    for module in (12, 24):
        clock.now += 4
        view.adapter_progress(module, 48, f"model.layers.{module}.self_attn.q_proj")
    assert [line[2:] for line in frame(view, 80)] == [
        "all - 1/5 adapters, about 56 s left",
        "billing (bfloat16) - 24/48 modules, about 8 s left",
    ]


@pytest.mark.parametrize(("merges", "unit"), [(2, "adapters"), (4, "merges")])
def test_the_bar_counts_what_it_says(merges: int, unit: str) -> None:
    view = RichView(Stream(tty=True), Stream(tty=True))
    view.start("c.yml", 2, merges)
    view.adapter_started("a", 1, merges, "float16")
    assert any(f"0/{merges} {unit}" in line for line in frame(view, 80))
    view.close()


def test_a_second_run_counts_from_the_start() -> None:
    out, err = Stream(tty=True), Stream(tty=True)
    for view in PlainView(out, err), RichView(out, err):
        for _ in range(2):
            view.start(COMMAND_LINE, 1, 1)
            view.adapter_started("one", 1, 1, "float32")
            assert view._label == "[1/1]"
            view.adapter_done(adapter("one"))
            assert view._label == "[1/1]"
        view.close()


def test_expected_reads_stay_when_a_file_is_refused_meanwhile() -> None:
    view = RichView(Stream(tty=True), Stream(tty=True), clock=Clock())
    view.base_loading("./models/base", "bfloat16")
    view.adapter_done(FAILED)
    assert [line[2:] for line in frame(view, 80)] == ["loading base ./models/base (bfloat16) -"]


def test_a_long_name_leaves_the_figures_to_be_read() -> None:
    view = RichView(Stream(tty=True), Stream(tty=True), clock=Clock())
    view.adapter_started("customer-support-" * 6 + "v12", 1, 1, "bfloat16")
    view.adapter_progress(2, 48, "layers.1")
    (line,) = frame(view, 60)
    assert re.fullmatch(r". customer-support-\S*… - 2/48 modules", line), line


def test_what_took_no_merge_is_not_in_the_estimate() -> None:
    """A thousand refused files in a moment say nothing of how long a merge takes."""
    clock = Clock()
    view = RichView(Stream(tty=True), Stream(tty=True), clock=clock)
    view.total = 1004
    for _ in range(1000):
        clock.now += 0.001
        view.adapter_done(FAILED)
    for index in range(1001, 1004):
        view.adapter_started("big", index, 1004, "bfloat16")
        clock.now += 60
        view.adapter_progress(1, 2, "layers.1")
        clock.now += 60
        view.adapter_done(PASSED)
    view.adapter_started("big", 1004, 1004, "bfloat16")
    assert frame(view, 80)[0].endswith(" 1,003/1,004 adapters, about 2 min 00 s left")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_frame_fits_the_terminal_whatever_its_size_is_by_now(encoding: str) -> None:
    clock = Clock()
    view = RichView(Stream(tty=True, encoding=encoding), Stream(tty=True, encoding=encoding), clock=clock)
    for judged in (PASSED, WARNED, FAILED, HALF_FAILED, CRASHED) * 9:
        view.adapter_done(judged)
    view.adapter_started("[red]名前" * 20, 46, 46, "bfloat16")
    for done in (23, 47):
        clock.now += 2
        view.adapter_progress(done, 48, "model." * 30)
    for width, height in ((200, 50), (80, 24), (120, 30), (40, 12), (20, 24), (80, 24)):
        whole, current = frame(view, width, height)
        assert max(cell_len(whole), cell_len(current)) <= width
        assert "45/46 adap" in whole or width < 40
        assert "[red]" in current or width <= 40


def test_color_goes_where_it_may() -> None:
    def played(*, color: bool, tty: bool) -> tuple[str, str]:
        out, err = Stream(tty=tty), Stream(tty=True)
        play(RichView(out, err, color=color))
        return out.text, err.text

    colored, _ = played(color=True, tty=True)
    assert "\x1b[1;31m" in colored
    grey, progress = played(color=False, tty=True)
    assert "\x1b" not in grey
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", progress)
    piped, progress = played(color=True, tty=False)
    assert "\x1b" not in piped
    assert "FAIL: 2 of 5 adapters failed" in progress, "the terminal hears the result although stdout went elsewhere"


def test_markup_in_a_name_is_shown_as_it_is() -> None:
    err = Stream(tty=True)
    view = RichView(Stream(tty=True), err, color=False)
    view.adapter_done(adapter("[bold]:boom:[/bold] [link=http://e]", Verdict.FAILED, cause="no-effect"))
    assert "[bold]:boom:[/bold] [link=http://e]" in err.text
    assert "\x1b]8" not in err.text


def test_the_terminal_is_put_back() -> None:
    err = Stream(tty=True)
    view = RichView(Stream(tty=True), err)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(view):
        view.start("c.yml", 1, 1)
        view.adapter_started("a", 1, 1, "float16")
        raise KeyboardInterrupt
    view.close()
    assert err.text.count("\x1b[?25l") == err.text.count("\x1b[?25h") == 1


@pytest.mark.parametrize("columns", [40, 120])
def test_on_a_real_terminal(columns: int) -> None:
    """The whole run in a pseudo-terminal: lines and bars, then the result instead of the bars."""
    code = (
        "import os, sys; from merge_gate.cli.output import make_view; from tests.support.played_run import play;"
        "play(make_view(sys.stdout, sys.stderr, env=os.environ))"
    )
    ours, theirs = pty.openpty()
    scrubbed = {key: value for key, value in os.environ.items() if key not in {"CI", "GITHUB_ACTIONS", "NO_COLOR"}}
    env = scrubbed | {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = _read(ours)
    os.close(ours)
    assert process.returncode == 0
    assert "FAIL: 2 of 5 adapters failed" in shown.replace("\r\n", " ")
    assert "\x1b[?25h" in shown


def _read(descriptor: int) -> str:
    chunks = []
    while select.select([descriptor], [], [], 60)[0]:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode("utf-8")


# --- each hour ------------------------------------------------------------------------------------------------------


def test_once_an_hour_with_an_estimate_of_the_rest() -> None:
    now_s = 0.0
    hourly = HourlyLog(lambda: now_s)
    assert "left" not in hourly.line(0, 10, 0), "where nothing was judged"
    now_s = 100.0
    hourly.merging_begins(500)  # taken over: that took no time
    assert not hourly.is_due
    now_s = EVERY_S + 100.0
    assert hourly.is_due
    assert (
        hourly.line(600, 1000, 3) == "after 1 h 00 min: 600 of 1,000 adapters judged, 3 failed; about 4 h 00 min left"
    )
    assert not hourly.is_due
    now_s += EVERY_S
    assert hourly.is_due
    assert "after 2 h 00 min: 900 of 1,000" in hourly.line(900, 1000, 3)


def test_a_terminal_leaves_lines_for_what_did_not_pass() -> None:
    """The bar counts what passed."""
    err = Stream(tty=True)
    view = RichView(Stream(tty=True), err, color=False)
    view.start("gate.yml", 2, 2)
    view.adapter_done(adapter("good"))
    view.adapter_done(adapter("bad", Verdict.FAILED, cause="no-effect"))
    view.close()
    assert "bad (bfloat16): failed, no-effect" in err.text
    assert "good" not in err.text
