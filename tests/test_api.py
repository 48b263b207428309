"""`merge_gate.gate`: typed reports, no torch and no traces in the process that calls it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import merge_gate
from merge_gate import ConfigError, GateError, Report, Result, UsageError, Verdict, gate, read_report
from merge_gate.records.features import FEATURES
from merge_gate.report.formats.json_report import render
from merge_gate.report.stored.report_files import write_report
from tests.support.reports import EMPTY, FAIL, FAILED, PASS
from tests.support.tried import tried
from tests.support.wording import Wording


@pytest.fixture(scope="module")
def run(demo: Path) -> tuple[Report, dict[str, object], dict[str, object]]:
    """A run of two adapters from their directory, with what it may have changed before and after it."""

    def state() -> dict[str, object]:
        return {
            "files": sorted(str(path) for path in demo.rglob("*")),
            "directory": Path.cwd(),
            "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            "environment": dict(os.environ),
        }

    here = Path.cwd()
    os.chdir(demo)
    try:
        before = state()
        report = gate(["adapters/good", demo / "adapters" / "nan"], base=demo / "base", dtypes=["float16"])
        return report, before, state()
    finally:
        os.chdir(here)


def test_a_report_has_typed_records(run: tuple[Report, dict[str, object], dict[str, object]]) -> None:
    report, _, _ = run
    assert isinstance(report, Report)
    assert (report.passed, report.result, report.complete) == (False, Result.FAIL, True)
    good, nan = report.adapters
    assert (good.name, good.verdict, good.base.dtype) == ("good", Verdict.PASSED, "float16")
    assert good.coverage.parameters_checked == good.coverage.parameters_total > 0
    assert (nan.verdict, nan.cause) == (Verdict.FAILED, "adapter-nonfinite")
    assert nan.findings[0].nan == 1


ODD = {"a surrogate": "\ud800", "a config": "\ud800.yml", "NUL": "a\0b", "5,000 characters": "x" * 5000, "no": ""}


@pytest.mark.parametrize("name", tried("Y01", "gate() with a name", "UsageError", ODD))
def test_an_odd_name_is_a_usage_error(name: str) -> None:
    for names in (name, ["./adapter", name]):
        with pytest.raises(UsageError):
            gate(names)
    with pytest.raises(UsageError):
        gate("./adapter", base=name or "./none")


def test_a_run_leaves_no_trace(run: tuple[Report, dict[str, object], dict[str, object]]) -> None:
    _, before, after = run
    assert after == before


def test_an_output_directory_gets_the_reports(demo, tmp_path, capfd, cwd) -> None:
    """The configuration of the demo, of which one adapter is judged by its file alone."""
    config = demo / "one.yml"
    config.write_text("version: 1\nbase: ./base\nadapters: [./adapters/lfs-pointer]\n")
    report = gate(str(config), output="out", device="cpu")
    assert report.adapters[0].cause == "file-lfs-pointer"
    assert {path.name for path in Path("out").iterdir()} == {
        "report.json", "summary.md", "report.html", "junit.xml", "report.sarif",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    gate(str(config), output="out", device="cpu")
    assert Path("out", "previous", "report.json").exists()
    assert capfd.readouterr() == ("", "")


def test_wrong_arguments_raise(demo: Path, wording: Wording, cwd) -> None:
    os.chdir(demo)
    for names, options in (
        ([], {}),
        ("merge-gate.yml", {"base": "base"}),
        ("adapters/good", {"dtypes": ["fp16"]}),
        ("adapters/good", {"checks": {"no-efect": "off"}}),
        ("adapters/good", {"device": "tpu"}),
    ):
        with wording.of(UsageError):
            gate(names, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='no such directory: "adapters/none"'):  # the rest depends on its path's length
        gate("adapters/none")
    (demo / "broken.yml").write_text("version: 2\n")
    with pytest.raises(ConfigError):
        gate("broken.yml")
    assert issubclass(ConfigError, GateError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtypes": ["bf16"]}, 'entry 1 of "dtypes" must be'),
        ({"allow_pickle": 3}, '"allow_pickle" must be true or false'),
        ({"checks": {"no-efect": "off"}}, 'checks: unknown key "no-efect"'),
        ({"expect": {"rank": 8}}, 'expect: unknown key "rank"'),
        ({"expect": {"r": "x"}, "checks": {"no-effect": "off"}}, 'expect: "r" must be a valid integer'),
    ],
)
def test_an_error_names_the_argument(demo: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        gate(demo / "adapters" / "good", base=demo / "base", **options)


@pytest.mark.parametrize("name", ["out", "out/report.json"])
def test_a_report_is_read_again(cwd: Path, name: str) -> None:
    write_report(FAIL, "out")
    assert render(read_report(cwd / name)) == render(FAIL)


@pytest.mark.parametrize("name", ["", "none", "out/summary.md", 5])
def test_what_is_no_report_is_not_read(cwd: Path, name: Any) -> None:
    write_report(PASS, "out")
    with pytest.raises(UsageError):
        read_report(name)


def test_a_report_shows_a_line_for_each_adapter() -> None:
    first, *lines, last = repr(FAIL).splitlines()
    assert (first, last) == ("Report(result='fail', adapters=(", "))")
    assert len(lines) == len(FAIL.adapters)
    shown = f"name={FAILED.name!r}, base={FAILED.base.model!r}, dtype='bfloat16', verdict='failed'"
    assert f"  AdapterReport({shown}, cause={FAILED.cause!r})," in lines
    assert repr(EMPTY) == "Report(result='error', adapters=())"


MISTAKES = ({"adapters": "typo"}, {"dtypes": 16}, {"device": "tpu"}, {"adapters": "out"})


@pytest.mark.parametrize(
    "mistake", tried("Y60", "gate(…)", "exit 2, nothing changes", {str(mistake): mistake for mistake in MISTAKES})
)
def test_a_mistake_touches_no_report(mistake, demo, tmp_path, cwd) -> None:
    write_report(PASS, "out")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(UsageError):
        gate(**{"adapters": demo / "adapters" / "good", "output": "out"} | mistake)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


class _Bytes:
    def __fspath__(self) -> bytes:
        return b"adapters/good"


_LOOP: dict[str, object] = {}
_LOOP["no-effect"] = _LOOP


WRONG = (
    ("adapters", 123), ("adapters", None), ("adapters", b"x"), ("adapters", [1]), ("adapters", [["x"]]),
    ("adapters", {"x"}), ("adapters", _Bytes()), ("adapters", "\ud800"), ("adapters", ["x", "\ud800"]),
    ("adapters", "a\0b"), ("adapters", ""),
    ("base", 1), ("base", ""), ("base", "\ud800"), ("dtypes", 16), ("dtypes", [16]), ("dtypes", [Path("float16")]),
    ("dtypes", None),
    ("dtypes", "fp16"), ("quantization", 8),
    ("revision", 1), ("revision", "\ud800"), ("checks", "x"), ("checks", {"no-effect": object}), ("checks", _LOOP),
    ("checks", {(1, 2): 3}), ("expect", []), ("expect", {"r": "\ud800"}), ("allow_pickle", "no"), ("allow_pickle", 1),
    ("allow_pickle", None), ("device", None), ("device", "\ud800"), ("device", "cuda:\u0661"), ("cache", 1),
    ("cache", "a\0b"), ("output", 1), ("output", ""), ("output", "a\0b"),
)  # fmt: skip


def _wrong() -> Iterator[Any]:
    for number, (argument, value) in enumerate(WRONG):
        shown = "a path of bytes" if isinstance(value, _Bytes) else ascii(value)[:40]
        row = pytest.mark.attempt(f"Y01-{number:02}", f"gate({argument}={shown})", "UsageError")
        yield pytest.param(argument, value, marks=row)


@pytest.mark.parametrize(("argument", "value"), list(_wrong()))
def test_a_wrong_type_is_a_sentence(argument: str, value: object, demo: Path, tmp_path: Path) -> None:
    options = {"adapters": demo / "adapters" / "good", "base": demo / "base", "output": tmp_path / "out"}
    with pytest.raises(UsageError) as caught:
        gate(**options | {argument: value})
    assert not (tmp_path / "out").exists()
    assert str(caught.value).isprintable()


def test_dtypes_may_be_one_text_as_on_the_command_line(demo: Path) -> None:
    adapter = demo / "adapters" / "lfs-pointer"
    for given, expected in (("float16", ["float16"]), ("float16, bfloat16", ["float16", "bfloat16"])):
        report = gate(adapter, base=demo / "base", dtypes=given)
        assert [each.base.dtype for each in report.adapters] == expected


def test_the_text_of_an_error_says_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        gate([])
    assert str(caught.value) == f"{caught.value.message}; to do: {caught.value.hint}"


def test_nothing_slow_is_imported_before_a_run() -> None:
    code = """
import sys, merge_gate
assert merge_gate.__version__
before = {name.partition(".")[0] for name in sys.modules}
from merge_gate import gate, Report, Verdict
assert gate.__module__ == "merge_gate.api"
after = {name.partition(".")[0] for name in sys.modules}
heavy = {"torch", "transformers", "peft", "numpy"}
sys.exit(str(before & (heavy | {"pydantic", "rich", "jinja2"}) | after & heavy).replace("set()", "") or 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_every_public_name_can_be_imported() -> None:
    of_export = {"Export", "ExportRecord"} if "export" not in FEATURES else set()
    assert all(getattr(merge_gate, name) for name in {*merge_gate.__all__} - of_export)
    listed = subprocess.run(
        [sys.executable, "-c", "import merge_gate; print(*dir(merge_gate))"], check=True, capture_output=True, text=True
    )
    assert set(merge_gate.__all__) <= set(listed.stdout.split())
    with pytest.raises(AttributeError):
        merge_gate.gates  # noqa: B018
