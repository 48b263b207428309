"""`merge-gate verify` without a merge: what it refuses, where its report goes, and its own record."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate._internal.earlier_reports import refuse_run
from merge_gate._internal.errors import UsageError
from merge_gate.records.files import MANIFEST_NAME
from merge_gate.records.report import Report
from merge_gate.report.stored.report_files import FORMATS, write_report
from tests.support import published
from tests.support.command import code_of, entries, strict_json
from tests.support.reports import EMPTY, FAIL, PASS
from tests.support.tried import tried
from tests.support.wording import Wording


@pytest.fixture
def place(tmp_path: Path, cwd) -> Path:
    """The current directory, with a published model, a base, and two adapters."""
    published.publish(tmp_path / "model")
    for name, file in (("base", "config.json"), ("one", "adapter_config.json"), ("two", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verify(*words: str) -> int:
    return code_of("verify", *words)


# --- where the report goes -------------------------------------------------------------------------------------------


@pytest.mark.attempt("D2a", "a run, then two verifications without --output", "the run's report stays")
def test_verifications_leave_the_report_of_a_run(place: Path) -> None:
    write_report(PASS, place / "merge-gate-report")
    before = contents(place / "merge-gate-report")
    for _ in range(3):
        assert verify("model") == 0
    assert contents(place / "merge-gate-report") == before
    assert strict_json(place / "merge-gate-verify" / "report.json")["is_comparison"]
    assert (place / "merge-gate-verify" / "previous" / "report.json").is_file()


@pytest.mark.attempt("D2b", "verify with --output of a run's directory", "exit 2, and the run's report stays")
@pytest.mark.parametrize("where", ["", "previous"])
@pytest.mark.parametrize("report", [PASS, FAIL, EMPTY], ids=["pass", "fail", "provisional"])
def test_a_verification_never_displaces_the_report_of_a_run(
    place: Path, where: str, report: Report, wording: Wording
) -> None:
    write_report(report, place / "out" / where)
    before = contents(place)
    assert verify("model", "--output", "out") == 2
    assert contents(place) == before
    with pytest.raises(UsageError) as caught:
        refuse_run(place / "out")
    if (where, report) == ("", PASS):
        wording(caught.value)


def test_a_damaged_report_is_taken_for_one_of_a_run(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "report.json").write_text(FORMATS["report.json"](PASS)[:-9])
    assert verify("model", "--output", "out") == 2


INPUTS = {
    "the base": "base",
    "the adapter": "one",
    "the candidate": "two",
    "MERGED": "model",
    "a link to MERGED": "link",
    "another tool's report": "other",
}


@pytest.mark.parametrize("output", tried("W10", "verify --output", "exit 2, and nothing is written", INPUTS))
def test_a_report_is_not_written_among_the_files_of_an_input(place: Path, output: str) -> None:
    (place / "link").symlink_to("model")
    (place / "other").mkdir()
    (place / "other" / "junit.xml").write_text("<testsuites/>")
    before = contents(place)
    words = ("--base", "base", "--adapter", "one", "--candidate", "two") if output in {"base", "one", "two"} else ()
    assert verify("model", *words, "--output", output) == 2
    assert contents(place) == before


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = {
    "5,000 characters": "x" * 5000,
    "a path of 5,000 characters": "x/" * 2500,
    "a part of 300 characters": "a/" + "x" * 300,
    "300 letters of two bytes": "é" * 150,
    "NUL": "a\0b",
    "a lone surrogate": "a\ud800",
    "bytes that are no UTF-8": os.fsdecode(b"a\xff"),
    "blanks": "  ",
    "nothing": "",
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "MERGED": ("verify", "NAME"),
    "verify --base": ("verify", "model", "--base", "NAME", "--adapter", "one"),
    "verify --adapter": ("verify", "model", "--base", "base", "--adapter", "NAME"),
    "verify --candidate": ("verify", "model", "--base", "base", "--adapter", "one", "--candidate", "NAME"),
    "verify --output": ("verify", "model", "--output", "NAME"),
    "run ADAPTER": ("run", "NAME", "--base", "base"),
    "run --base": ("run", "one", "--base", "NAME"),
    "run --output": ("run", "one", "--base", "base", "--output", "NAME"),
}


@pytest.mark.parametrize("name", tried("X09", "a name in a place of the command line", "exit 2", NAMES))
def test_an_odd_name_is_a_usage_error(place: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for where, words in COMMANDS.items():
        code = code_of(*(name if word == "NAME" else word for word in words))
        said = capfd.readouterr().err
        assert code == 2, f"{where}: {said}"
        assert "bug of merge-gate" not in said
        assert len(said) < 3000, "the name is shortened"


@pytest.mark.attempt("W05", "MERGED: a link, a pipe, a device, a file, an empty directory, a dangling link", "exit 2")
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/proc", "file", "empty", "dangling", "absent"])
def test_an_odd_model_is_a_usage_error(place: Path, kind: str) -> None:
    os.mkfifo(place / "pipe")
    (place / "file").write_text("{}")
    (place / "empty").mkdir()
    (place / "dangling").symlink_to("absent")
    assert verify(kind) == 2


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=pytest.mark.attempt(f"Y59{row}", f"verify {' '.join(words)}", "nothing changes"))
        for row, words in zip(
            "fgh",
            (
                ("model", "--base", "model"),
                ("merge-gate-verify",),
                ("adapter", "--base", "model", "--adapter", "model"),
            ),
            strict=True,
        )
    ],
)
def test_a_mistake_is_refused_and_touches_nothing(place: Path, words: tuple[str, ...]) -> None:
    (place / "one").rename(place / "adapter")
    assert verify("model") == 0
    before = contents(place)
    assert verify(*words) == 2
    assert contents(place) == before


# --- its own record --------------------------------------------------------------------------------------------------


def twice(model: Path) -> None:
    text = (model / MANIFEST_NAME).read_text()
    (model / MANIFEST_NAME).write_text(text.replace('"name": "support",', '"name": "support", "name": "support",', 1))


CHANGED = published.CHANGES | {
    "a link to a folder": lambda model: (model / "link").symlink_to("additional_chat_templates")
}
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "merge-gate.json is a link": lambda model: published.link(model / MANIFEST_NAME),
    "merge-gate.json has a key twice": twice,
    "merge-gate.json has 17 MB": lambda model: (model / MANIFEST_NAME).write_bytes(b" " * (17 << 20)),
}


@pytest.mark.parametrize("change", tried("W03", "own record", "exit 1, file-changed", CHANGED))
def test_a_changed_directory_is_not_as_published(place: Path, change: Callable[[Path], object]) -> None:
    change(place / "model")
    assert verify("model") == 1
    (entry,) = entries(place / "merge-gate-verify")
    assert entry["cause"] == "file-changed"


@pytest.mark.parametrize("change", tried("W03x", "own record", "exit 2", UNREADABLE))
def test_a_record_that_is_none_is_a_usage_error(place: Path, change: Callable[[Path], object]) -> None:
    change(place / "model")
    assert verify("model") == 2


@pytest.mark.attempt("W02", "merge-gate.json, the card, and a file edited together", "exit 0: not signed")
def test_a_record_made_to_fit_is_not_noticed_without_a_signature(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published.FILES, "config.json", b'{"edited": true}')
    (place / "model" / MANIFEST_NAME).unlink()
    published.publish(place / "model")
    assert verify("model") == 0
