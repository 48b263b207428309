"""What reaches the runner: no foreign line is a command, and what is ours arrives decoded."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate.action import workflow
from merge_gate.report.wording.untrusted import inert
from tests.support.wording import Wording

HOSTILE = [
    "::error::x",
    "  ::set-output name=result::pass",
    "\t::add-path::/evil",
    "a ##[add-path]/evil",
    "progress\r::debug::b",
    "x\x1b]0;title\x07",
    "\u202e::notice::c",
]


def passed_on(*chunks: bytes, secret: str = "") -> list[str]:
    stream = io.BytesIO()
    log = workflow.Log(stream, secret)
    log.open()
    for chunk in chunks:
        log.write(chunk)
    log.close()
    lines = stream.getvalue().decode().split("\n")[:-1]
    token = re.fullmatch(r"::stop-commands::([0-9a-f]{32})", lines[0])
    assert token
    assert lines[-1] == f"::{token[1]}::"
    return lines[1:-1]


def is_command(line: str) -> bool:
    """As actions/runner reads a line (ActionCommand.cs): `::` after blanks, or `##[` anywhere."""
    return line.lstrip().startswith("::") or "##[" in line


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_line_is_no_command(text: str) -> None:
    lines = passed_on(text.encode() + b"\n")
    assert lines
    assert not [line for line in lines if is_command(line)]
    assert not [character for line in lines for character in line if ord(character) < 32]


@given(st.lists(st.binary(max_size=40) | st.sampled_from([text.encode() for text in HOSTILE]), max_size=8))
def test_no_bytes_in_any_pieces_are_a_command(chunks: list[bytes]) -> None:
    assert not [line for line in passed_on(*chunks) if is_command(line)]


@given(st.text(max_size=60), st.integers(min_value=1, max_value=7))
def test_ordinary_text_arrives_whatever_the_pieces(text: str, size: int) -> None:
    text = "".join(character for character in text if character.isprintable() and character not in "#:")
    data = f"a {text} z".encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert "".join(passed_on(*pieces)).startswith("a ")
    assert len(passed_on(*pieces)) == 1


def test_a_secret_is_hidden_even_between_two_pieces() -> None:
    assert passed_on(b"token=hf_se", b"cret!\n", secret="hf_secret") == ["token=***!"]


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    stream = io.BytesIO()
    log = workflow.Log(stream)
    log.write(b"x" * 100_000)
    assert stream.getvalue().startswith(b"xxx")


def test_the_last_words_are_kept() -> None:
    log = workflow.Log(io.BytesIO())
    log.write("".join(f"line {index}\n" for index in range(50)).encode() + b"::error::last")
    log.close()
    assert log.tail[-2:] == ["line 49", ": :error::last"]
    assert len(log.tail) == 12


def decode(line: str) -> tuple[str, dict[str, str], str]:
    """Take a command apart as the runner does."""
    match = re.fullmatch(r"::([a-z-]+)(?: (.*?))?::(.*)", line)
    assert match, line
    name, listed, data = match.groups()

    def plain(text: str, *more: tuple[str, str]) -> str:
        for code, character in (*more, ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            text = text.replace(code, character)
        return text

    pairs = (pair.partition("=") for pair in (listed or "").split(",") if pair)
    return name, {key: plain(value, ("%3A", ":"), ("%2C", ",")) for key, _, value in pairs}, plain(data)


@given(st.text(), st.text())
def test_a_command_is_one_line_and_arrives_as_it_was(title: str, message: str) -> None:
    line = workflow.command("error", message, title=title)
    assert "\n" not in line
    assert "\r" not in line
    title, message = (re.sub(":(?=:)", ": ", inert(text)) for text in (title, message))
    assert decode(line) == ("error", {"title": title}, message)
    assert line.count("::") == 2, "some runners split at the last"


def adapter(name: str, verdict: str = "failed", *, check: str = "adapter-nonfinite", message: str = "1 NaN") -> dict:
    finding = {"check": check, "severity": "error", "message": message, "hint": "release another", "tensor": "t.lora_B"}
    return {"name": name, "verdict": verdict, "cause": check, "line": 7, "column": 5, "findings": [finding]}


def test_an_annotation_points_at_the_entry(wording: Wording) -> None:
    report = {"adapters": [adapter("good", "passed"), adapter("a:b,c", message="x: y, 100%")]}
    (line,) = workflow.annotate(report, "gate/config.yml")
    name, properties, data = decode(line)
    assert name == "error"
    wording(properties.pop("title"), data)
    assert properties == {"file": "gate/config.yml", "line": "7", "col": "5"}


def test_many_annotations_are_nine_and_a_count_failed_ones_first(wording: Wording) -> None:
    adapters = [adapter("undecided", "error")] + [adapter(f"a{index}") for index in range(20)]
    lines = workflow.annotate({"adapters": adapters}, "")
    assert len(lines) == 10
    assert [decode(line)[1]["title"].split()[0] for line in lines[:2]] == ["a0", "a1"]
    rest = decode(lines[9])[2]
    assert "12" in rest.split()
    wording(rest)
    assert "file" not in decode(lines[0])[1]


def test_what_is_so_in_several_dtypes_is_annotated_once() -> None:
    one, other = adapter("x"), adapter("x", check="merged-nonfinite")
    lines = workflow.annotate({"adapters": [one, other, dict(one)]}, "config.yml")
    titles = [decode(line)[1]["title"] for line in lines]
    assert [title.rpartition(" ")[2] for title in titles] == ["adapter-nonfinite", "merged-nonfinite"]


def test_an_accepted_failure_is_a_warning_after_the_errors() -> None:
    known = adapter("known") | {"accepted": {"reason": "r", "owner": "o", "until": "2026-12-31"}}
    lines = workflow.annotate({"adapters": [known, adapter("new")]}, "")
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::warning"]
    assert "known" in decode(lines[1])[1]["title"].split()


def test_the_finding_that_decided_is_the_one_that_is_told() -> None:
    judged = adapter("x")
    other = {**judged["findings"][0], "check": "no-effect", "message": "nothing changes"}
    judged["findings"] = [{**other, "severity": "warning"}, other, *judged["findings"]]
    assert decode(workflow.annotate({"adapters": [judged]}, "")[0])[2].startswith("1 NaN")


def test_a_place_that_the_message_names_is_not_repeated() -> None:
    named = adapter("x", message="t.lora_B holds 1 NaN")
    assert workflow.annotate({"adapters": [named]}, "")[0].count("t.lora_B") == 1


def test_an_adapter_without_a_finding_still_is_an_error(wording: Wording) -> None:
    bare = {**adapter("x", "error"), "cause": None, "findings": []}
    level, properties, _ = decode(workflow.annotate({"adapters": [bare]}, "")[0])
    assert level == "error"
    wording(properties["title"])


@pytest.mark.parametrize(
    ("path", "inside"), [("/w/gate/a.yml", "gate/a.yml"), ("/w/a.yml", "a.yml"), ("/x/a.yml", ""), ("/w/../x.yml", "")]
)
def test_a_file_by_its_place_in_the_workspace(path: str, inside: str) -> None:
    assert workflow.file_in_workspace(Path(path), Path("/w")) == inside


def test_outputs_cannot_be_forged(tmp_path: Path) -> None:
    file = tmp_path / "output"
    failed = json.dumps(["a\nresult=pass", "b\nresult<<EOF\npass\nEOF"])
    workflow.write_outputs(str(file), {"result": "fail", "failed": failed})
    workflow.write_outputs(str(file), {"report-path": "/tmp/x\nresult=pass"})
    lines = file.read_text().splitlines()
    delimiters = [line.partition("<<")[2] for line in lines if re.fullmatch(r"[a-z-]+<<merge-gate-[0-9a-f]{32}", line)]
    assert len(set(delimiters)) == 3
    assert [lines.count(delimiter) for delimiter in delimiters] == [1, 1, 1]
    assert lines[lines.index(f"result<<{delimiters[0]}") + 1] == "fail"


def test_a_long_summary_is_cut_at_a_line(tmp_path: Path, wording: Wording) -> None:
    file = tmp_path / "summary"
    workflow.write_summary(str(file), "short")
    workflow.write_summary(str(file), "é" * 9 + "\n" + "| a |\n" * 300_000)
    text = file.read_text()
    assert text.startswith("short\né")
    assert len(text.encode()) < 1024 * 1024
    *_, row, _, rest = text.splitlines()
    assert row == "| a |"
    wording(rest)


def test_without_files_of_a_runner_nothing_is_written() -> None:
    workflow.write_outputs("", {"result": "pass"})
    workflow.write_summary("", "text")


@pytest.mark.parametrize(
    ("server", "has_artifacts"),
    [
        ("https://github.com", True),
        ("https://acme.ghe.com", True),
        ("", True),
        ("https://github.acme.example", False),
        ("https://github.com.example", False),
    ],
)
def test_a_server_without_artifacts_is_named(server: str, has_artifacts: bool, wording: Wording) -> None:
    said = workflow.missing_artifacts(server)
    assert (said == "") is has_artifacts
    if not has_artifacts:
        assert "report-path" in said
        wording(said)


def test_paths_are_no_patterns() -> None:
    paths = [Path("/w/reports [gpu]/report.json"), Path("/w/a*b?/c\\d")]
    assert workflow.literal_patterns(paths) == "/w/reports \\[gpu]/report.json\n/w/a\\*b\\?/c\\\\d"


def test_problems_of_the_configuration_are_annotated_at_lines(wording: Wording) -> None:
    stream = io.BytesIO()
    log = workflow.Log(stream, config="gate/a.yml")
    log.write(b"gate/a.yml:3:5: adapters: unknown key\nother.yml:1:1: no\n x gate/a.yml:3:5: no\ngate/a.yml:9:1: :")
    log.close()
    assert log.places == [("3", "5", "adapters: unknown key"), ("9", "1", ":")]
    first, _second = (decode(line) for line in workflow.annotate_config(log.places, "gate/a.yml"))
    wording(first[1].pop("title"))
    assert first[1] == {"file": "gate/a.yml", "line": "3", "col": "5"}
    assert first[2] == "adapters: unknown key"
    assert workflow.annotate_config(log.places, "") == []
