"""The mistakes of users, one by one: whatever goes wrong, no file of theirs and no verdict is lost.

Each runs the command in this process, on one adapter whose file is damaged, so that a run reaches a verdict without
torch. The table in docs/evidence/reliability.md counts them.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from merge_gate._internal import whole_file
from merge_gate._internal.earlier_reports import is_own
from merge_gate.cli.dispatch import main
from merge_gate.records.report import Report, Shard
from merge_gate.report.stored.output_directory import begun_run
from merge_gate.report.stored.report_files import FORMATS, write_report
from merge_gate.run import flow
from tests.support.reports import FAIL, PASS, adapter, report

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence/reliability.md"
OUTPUT = "merge-gate-report"
PREVIOUS = f"{OUTPUT}/previous"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": "./base"}

Arrange = Callable[[Path], object]


# --- what is there before ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cwd: Path) -> Path:
    """A directory with a damaged adapter, a base, and a config; the commands run in it."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"damaged")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "gate.yml").write_text("version: 1\nadapters: [./one]\n")
    return tmp_path


def earlier(place: Path) -> None:
    """The report of a run that came to its end, next to a file of the user."""
    write_report(FAIL, place / OUTPUT)
    (place / OUTPUT / "notes.txt").write_text("mine")


def nothing(_: Path) -> None:
    """No run has been there."""


def both(*arrangements: Arrange) -> Arrange:
    return lambda place: [one(place) for one in arrangements]


def text(name: str, content: str = "mine") -> Arrange:
    def arrange(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)

    return arrange


def link(name: str, target: str) -> Arrange:
    def arrange(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(target)

    return arrange


def folder(name: str) -> Arrange:
    return lambda place: (place / name).mkdir(parents=True)


def written(where: str, what: Report = PASS, *names: str) -> Arrange:
    return lambda place: write_report(what, place / where, formats=names or tuple(FORMATS))


def shards(place: Path) -> None:
    marks = {"count": 2, "plan_sha256": "p" * 64, "versions_sha256": "v" * 64, "entries": 2, "bases_from": (0,)}
    for index in (1, 2):
        mark = Shard(index=index, positions=(index - 1,), **marks)
        write_report(report(adapter(f"shard-{index}"), shard=mark), place / "shards" / str(index))


def cache_of_a_checkout(place: Path) -> None:
    """Directories with the names that a cache uses, and files that are older than a day."""
    for name in ("bases/.gitkeep", "bases/notes.txt", "verdicts/.report.json.tmp"):
        text(name)(place)
        os.utime(place / name, (0, time.time() - 2 * 86_400))


def clock(year: int) -> Arrange:
    def arrange(place: Path) -> None:
        earlier(place)
        at = (year - 1970) * 365 * 86_400
        for path in (place / OUTPUT).iterdir():
            os.utime(path, (at, at))

    return arrange


# --- the accidents that come from outside ----------------------------------------------------------------------------

Accident = Callable[[pytest.MonkeyPatch, Path], AbstractContextManager[object]]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def none(*_: object) -> AbstractContextManager[object]:
    return nullcontext()


@contextmanager
def disk_full(monkeypatch: pytest.MonkeyPatch, _: Path) -> Iterator[None]:
    def fail(_: int) -> None:
        raise FULL

    monkeypatch.setattr(whole_file.os, "fsync", fail)
    yield


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch, _: Path) -> Iterator[None]:
    real = os.mkdir

    def fail(path: str, *more: object, **named: object) -> None:
        if Path(path).name == "previous":
            raise FULL
        real(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", fail)
    yield


@contextmanager
def another_run(_: pytest.MonkeyPatch, place: Path) -> Iterator[None]:
    with begun_run(str(place / OUTPUT)):
        write_report(FAIL, place / OUTPUT)
        yield


@contextmanager
def interrupt(monkeypatch: pytest.MonkeyPatch, _: Path) -> Iterator[None]:
    monkeypatch.setattr(flow, "inputs_of", lambda _: os.kill(os.getpid(), signal.SIGINT) or iter(()))
    yield


# --- the mistakes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """One mistake: the command lines, the exit code of the last one, and where the earlier report is afterwards."""

    mistake: str
    left: str
    steps: tuple[tuple[str, ...], ...]
    arrange: Arrange = earlier
    code: int = 2
    now_in: str = ""
    says: str = ""
    accident: Accident = none


MOVED = "the earlier report, in `previous/`"
UNTOUCHED = "everything as it was"


def typo(mistake: str, *words: str, left: str = UNTOUCHED, **more: object) -> Mistake:
    return Mistake(mistake, left, (words,), **more)  # type: ignore[arg-type]


def output(mistake: str, arrange: Arrange, *words: str, **more: object) -> Mistake:
    return Mistake(mistake, UNTOUCHED, (words,), arrange, **more)  # type: ignore[arg-type]


RUN, ABSENT = ("run", "gate.yml"), ("run", "absent.yml")
MISTAKES = (
    # the command line is wrong
    typo("a mistyped option: `--devise cpu`", *RUN, "--devise", "cpu", says="--devise"),
    typo("a mistyped option after the right output", *RUN, "--output", OUTPUT, "--devise"),
    typo("an option without its value: `--device`", *RUN, "--device"),
    typo("a value that the option does not have: `--device tpu`", *RUN, "--device", "tpu", says="'tpu'"),
    typo('a variable that is not set: `--base "$BASE"`', "run", "./one", "--base", "", says="--base"),
    typo("no adapter named: `merge-gate run`", "run"),
    typo("the command left out: `merge-gate ./one`", "./one"),
    typo("the command mistyped: `rnu` in place of `run`", "rnu", "gate.yml"),
    typo("a wrong path of the config", "run", "absent.yml"),
    typo("a wrong path of an adapter", "run", "./my-adaptr", "--base", "./base"),
    typo("a wrong path of a base", "run", "./one", "--base", "./bse", says="./bse"),
    typo("a config that is not YAML", *RUN, arrange=both(earlier, text("gate.yml", "adapters: ["))),
    typo("a config with an unknown key", *RUN, arrange=both(earlier, text("gate.yml", "version: 1\nadaptors: []\n"))),
    typo("a config that lists nothing", *RUN, arrange=both(earlier, text("gate.yml", "version: 1\nadapters: []\n"))),
    typo("`--only` with a name that the config does not list", *RUN, "--only", "tow", says="--only tow"),
    typo("an option that is gone: `--resume`", *RUN, "--resume", says="--cache"),
    typo("an option that needs another one: `--gpus 0`", *RUN, "--gpus", "0"),
    typo("a shard that does not exist: `--shard 3/2`", *RUN, "--shard", "3/2"),
    typo("`--cache` names a file", *RUN, "--cache", "gate.yml", says="gate.yml"),
    typo("`--container` with adapters in place of a config", "run", "./one", "--container", says="--container"),
    Mistake("the same mistake twice", UNTOUCHED, (ABSENT, ABSENT)),
    Mistake("the mistake, a good run, the mistake again", "the earlier report, in `previous/`; the new one",
            (ABSENT, RUN, ABSENT), now_in=PREVIOUS),
    # --output is wrong
    output("`--output` mistyped: `--ouptut notes`", earlier, *RUN, "--ouptut", "notes"),
    output("`--output` as another tool calls it: `--outdir notes`", earlier, *RUN, "--outdir", "notes"),
    output("`--output` without a directory", earlier, *RUN, "--output"),
    output('`--output "$DIR"` with a variable that is not set', earlier, *RUN, "--output", "", says="--output"),
    output("`--output` names a file", text("out"), *RUN, "--output", "out"),
    output("`--output` is a link", both(folder("real"), link("out", "real")), *RUN, "--output", "out"),
    output("`--output` is a link, with `--container`", both(folder("real"), link("out", "real")),
           *RUN, "--container", "--image", "x:y", "--output", "out", says="link"),
    output("`--output` is an adapter's directory", nothing, *RUN, "--output", "one", says="one"),
    output("`--output` is a base's directory", nothing, "run", "./one", "--base", "base", "--output", "base",
           says='"base"'),
    output("`--output` is the base that the adapter names", nothing, *RUN, "--output", "base", says="base"),
    output("`--cache` is an adapter's directory", nothing, *RUN, "--cache", "one", says="one"),
    output("`--cache` is inside of a base's directory", nothing, "run", "./one", "--base", "base", "--cache", "base/c"),
    output("`--output` does not exist, and the config does not either", nothing, *ABSENT, "--output", "o"),
    output("`--output` holds `summary.md` and `report.html` of the user, and the adapter is mistyped",
           both(text("notes/summary.md"), text("notes/report.html")),
           "run", "./my-adaptr", "--base", "./base", "--output", "notes", says="my-adaptr"),
    output("`--output` holds the `junit.xml` of a test runner", text("reports/junit.xml", "<testsuites/>"),
           *RUN, "--output", "reports", says="reports/junit.xml"),
    output("one of the five files is another tool's, four are the gate's",
           both(earlier, text(f"{OUTPUT}/junit.xml", "<testsuites/>")), *RUN),
    output("`--output` holds a `report.json` of another tool", text("reports/report.json", '{"tool": {"name": "x"}}'),
           *RUN, "--output", "reports"),
    output("a link has the name of a report",
           both(written("own", PASS), link(f"{OUTPUT}/report.json", "../own/report.json")), *RUN),
    output("a directory has the name of a report", text(f"{OUTPUT}/report.html/mine.html"), *RUN, says="report.html"),
    output("a report is named as the config", earlier, "run", f"{OUTPUT}/report.json"),
    output("the output directory is named as an adapter", earlier, "run", OUTPUT),
    Mistake("a directory that other tools use too", "their files; the new report next to them",
            ((*RUN, "--output", "reports"),),
            both(text("reports/coverage.xml"), text("reports/.report.json.backup.tmp")), code=1),
    Mistake("`--output .`", "all files; the report next to them", ((*RUN, "--output", "."),), nothing, 1),
    Mistake("`--output` is the directory of another project's reports", "its reports, in `previous/`",
            ((*RUN, "--output", "theirs"),), written("theirs", FAIL), code=1, now_in="theirs/previous"),
    Mistake("`previous/` is a directory of the user", "their files; the earlier report next to them, in `previous/`",
            (RUN,), both(earlier, text(f"{PREVIOUS}/thesis.tex")), code=1, now_in=PREVIOUS),
    output("`previous` is a file of the user", both(earlier, text(PREVIOUS)), *RUN, says=PREVIOUS),
    output("`previous/` holds a `junit.xml` of the user", both(earlier, text(f"{PREVIOUS}/junit.xml")), *RUN),
    output("`previous` is a link", both(earlier, folder("real"), link(PREVIOUS, "../real")), *RUN),
    Mistake("a second run with the same output", "the earlier report, in `previous/`; the new one", (RUN,), code=1,
            now_in=PREVIOUS),
    Mistake("two shards, one after the other, into the same directory", "the first shard's report, in `previous/`",
            ((*RUN, "--shard", "1/2"),), written(OUTPUT, FAIL), code=1, now_in=PREVIOUS),
    # other commands
    output("`init` with a config that is there", text("merge-gate.yml"), "init", "one", says="merge-gate.yml"),
    output("`demo` in a directory with other files", text("mine/thesis.tex"), "demo", "mine", says="mine"),
    output("`report combine --output` is a shard's directory", shards,
           "report", "combine", "shards/1", "shards/2", "--output", "shards/1", says="shards/1"),
    output("`report combine --output` holds a `junit.xml` of another tool", both(shards, text("all/junit.xml")),
           "report", "combine", "shards", "--output", "all", says="all/junit.xml"),
    typo("`report combine` with a mistyped option", "report", "combine", "shards", "--refresh"),
    typo("`report combine` with a wrong directory", "report", "combine", "shrads", code=3),
    Mistake("`report combine` of directories with earlier reports in them",
            "all of them; only the newest reports count", (("report", "combine", "shards/1", "shards/2"),),
            both(shards, written("shards/1/previous", FAIL)), code=0, now_in="shards/1/previous"),
    Mistake("`--cache` is a directory with files of the user, hidden and old ones too", "all of them",
            ((*RUN, "--cache", "."),), cache_of_a_checkout, code=1),
    # not the user's mistake
    output("two runs at once", nothing, *RUN, says=OUTPUT, accident=another_run),
    typo("the disk is full when the report is written", *RUN, left=MOVED, code=3, now_in=PREVIOUS,
         says="No space left", accident=disk_full),
    typo("the disk has no room for `previous/`", *RUN, code=3, says="No space left", accident=no_room),
    typo("Ctrl-C before anything is judged", *RUN, code=3, says="SIGINT", accident=interrupt),
    Mistake("a clock that went back: the earlier report is of 2100", MOVED, (RUN,), clock(2100), 1, PREVIOUS),
)  # fmt: skip


WORDED_ELSEWHERE = {
    "`--container` with adapters in place of a config",
    "`init` with a config that is there",
    "`--cache` names a file",
    "a wrong path of a base",
    "Ctrl-C before anything is judged",
    "a directory has the name of a report",
    "the disk is full when the report is written",
    "the disk has no room for `previous/`",
    "two runs at once",
}
"""Their sentences are in the goldens of the commands, the cache, configurations, and report files."""


# --- and what is left ------------------------------------------------------------------------------------------------


def state(place: Path) -> dict[str, bytes]:
    """The content of every file, and the target of every link."""
    return {
        str(path.relative_to(place)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in place.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def run(words: tuple[str, ...]) -> int:
    try:
        return main(list(words))
    except SystemExit as left:
        return int(str(left.code))


ATTEMPTS = {
    "`--output` is an adapter's directory": ("X06", "exit 2, and inputs stay"),
    "`--cache` is an adapter's directory": ("X07a", "exit 2"),
    "`--cache` is inside of a base's directory": ("X07b", "exit 2"),
    "the same mistake twice": ("D8a", "the report stays as it is"),
    "the mistake, a good run, the mistake again": ("D8b", "no report is lost"),
    "`previous/` is a directory of the user": ("C10a", "nothing is lost"),
    "`previous` is a file of the user": ("C10b", "exit 2"),
    "`--output` is a link": ("C10c", "exit 2"),
    "a link has the name of a report": ("C10d", "exit 2"),
    "a directory has the name of a report": ("C10e", "exit 2"),
    "`--output` holds a `report.json` of another tool": ("C10f", "exit 2"),
}


def parameter(one: Mistake) -> ParameterSet:
    tried = ATTEMPTS.get(one.mistake)
    marks = [pytest.mark.attempt(tried[0], one.mistake, tried[1])] if tried else []
    return pytest.param(one, id=one.mistake, marks=marks)


@pytest.mark.parametrize("mistake", [parameter(one) for one in MISTAKES])
def test_a_mistake_loses_nothing(mistake, place, monkeypatch, capfd, wording) -> None:
    mistake.arrange(place)
    with mistake.accident(monkeypatch, place):
        before = state(place)
        own = {name for name in before if is_own(place / name)}
        codes = [run(words) for words in mistake.steps]
        after = state(place)
    said = capfd.readouterr().err
    assert codes[-1] == mistake.code, said
    assert "Traceback" not in said
    assert "MERGE_GATE_DEBUG" not in said, "it is taken for a bug"
    assert mistake.says in said
    if mistake.says and mistake.mistake not in WORDED_ELSEWHERE:
        lines = [line for line in said.splitlines() if mistake.says in line]
        wording(lines[0].partition(", expected")[0])
    for name, content in before.items():
        if name in own:
            assert content in after.values(), f"{name} is lost"
        else:
            assert after.get(name, b"") == content, f"{name} is not as it was"
    if mistake.left == UNTOUCHED:
        assert after == before
    if mistake.now_in:
        assert after[f"{mistake.now_in}/report.json"] in {before[name] for name in own if name.endswith(".json")}


EXAMPLES = 3
"""Mistakes that a row of the table names."""


def test_the_table_counts_the_mistakes() -> None:
    assert len({one.mistake for one in MISTAKES}) == len(MISTAKES) >= 40
    before, _, rest = DOCS.read_text(encoding="utf-8").partition("<!-- mistakes -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    alike: dict[tuple[str, int], list[str]] = {}
    for one in MISTAKES:
        alike.setdefault((one.left, one.code), []).append(one.mistake)
    rows = [
        f"| {left} | {code} | {len(mistakes)} | {'; '.join(mistakes[:EXAMPLES])} |"
        for (left, code), mistakes in alike.items()
    ]
    head = ["| what is left | exit code | mistakes | such as |", "|---|---|---:|---|"]
    table = "\n".join(["<!-- mistakes -->", "", *head, *rows, "", "<!-- end -->", ""])
    if os.environ.get("UPDATE_GOLDENS"):
        DOCS.write_text(before + table + after, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == before + table + after


# --- what must not be repeated ---------------------------------------------------------------------------------------

SECRET_URL = "https://user:S3CRET@host/acme/base?token=S3CRET"


@pytest.mark.parametrize("named_by", ["--base", "the configuration", "the adapter"])
def test_credentials_of_a_url_are_not_repeated(named_by: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": SECRET_URL, "adapters": ["one"]}))
    config = {**CONFIG, "base_model_name_or_path": SECRET_URL}
    (place / "one" / "adapter_config.json").write_text(json.dumps(config))
    words = {"--base": ["one", "--base", SECRET_URL], "the configuration": ["gate.yml"], "the adapter": ["one"]}
    assert main(["run", *words[named_by]]) == (1 if named_by == "the adapter" else 2)
    output = "".join(capsys.readouterr())
    written = [path.read_text() for path in (place / OUTPUT).rglob("*.*")]
    assert bool(written) is (named_by == "the adapter")
    assert "https://…@host/acme/base?…" in output
    assert "S3CRET" not in output + "".join(written)
