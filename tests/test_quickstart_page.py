"""The quickstart is followed to the letter: its commands run in order, and its output is what they print today."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from merge_gate.cli import dispatch
from merge_gate.demo import make_demo
from tests.support.command import COMMAND, environment, shell
from tests.support.generated import CODE_BLOCK, blocks, without_numbers

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
GIT = {
    **{f"GIT_{role}_{part}": "a@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def commands(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a transcript, each with the lines that it shows."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], [line for line in part.splitlines()[1:] if line.strip()]) for part in parts]


def missing(shown: list[str], printed: str) -> list[str]:
    """The lines that are not printed in this order. Figures may differ by machine."""
    rest = iter([without_numbers(line) for line in printed.splitlines()])
    return [line for line in shown if without_numbers(line) not in rest]


def configs() -> list[str]:
    return [body for body in blocks(PAGE, "yaml") if "jobs:" not in body]


def workspace(place: Path) -> Path:
    """The state of section 4: the config of section 3, and the adapter that overflows."""
    make_demo(str(place / "merge-gate-demo"))
    (place / "merge-gate-demo/base").rename(place / "base")
    (place / "adapters").mkdir()
    (place / "merge-gate-demo/adapters/overflow").rename(place / "adapters/support")
    (place / "merge-gate.yml").write_text(configs()[0], encoding="utf-8")
    return place


def test_check_and_init_print_what_the_page_shows(tmp_path, cwd, capsys) -> None:
    workspace(tmp_path)
    (tmp_path / "merge-gate.yml").unlink()
    told = [pair for body in blocks(PAGE, "console") for pair in commands(body)]
    light = [pair for pair in told if pair[0].startswith(("merge-gate check", "merge-gate init"))]
    assert [command.split()[1] for command, _ in light] == ["check", "init"]
    for command, shown in light:
        assert dispatch.main(command.split()[1:]) == 0
        assert missing(shown, capsys.readouterr().out) == []


@pytest.mark.slow
def test_the_page_is_followed_to_the_letter(tmp_path: Path) -> None:
    for kind, body in CODE_BLOCK.findall(PAGE):
        if kind == "yaml":
            file = tmp_path / ("merge-gate.yml" if body in configs() else ".github/workflows/gate.yml")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body, encoding="utf-8")
        if kind != "console":
            continue
        for command, shown in commands(body):
            answer = shell(command, cwd=tmp_path, **GIT)
            fails = any(line.startswith("FAIL: the only adapter") for line in shown)
            assert answer.code == fails, (command, answer.said)
            assert missing(shown, answer.out) == [], (command, answer.out)


@pytest.mark.slow
def test_the_action_annotates_and_summarizes_as_the_page_shows(tmp_path: Path) -> None:
    place, summary = workspace(tmp_path), tmp_path / "summary"
    (tmp_path / "temp").mkdir()
    given = environment(
        GITHUB_WORKSPACE=str(place),
        GITHUB_STEP_SUMMARY=str(summary),
        GITHUB_OUTPUT=str(tmp_path / "output"),
        GITHUB_JOB="gate",
        RUNNER_TEMP=str(tmp_path / "temp"),
        MERGE_GATE_INPUT_RUNTIME="native",
        PATH=f"{Path(COMMAND[0]).parent}{os.pathsep}{os.environ['PATH']}",
    )
    command = [sys.executable, str(ROOT / "entrypoint.py"), "action"]
    done = subprocess.run(command, env=given, cwd=place, capture_output=True, text=True, check=False)
    (error,) = re.findall(r"^::error file=(\S+?),line=(\d+),.*?title=(.*?)::(.*)$", done.stdout, re.MULTILINE)
    file, line, title, message = map(unquote, error)
    (annotation,) = blocks(PAGE, "text")
    assert without_numbers(f"{file}, line {line}\n{title}\n{message}") == without_numbers(annotation)
    assert f", line {line}\n" in annotation
    (shown,) = blocks(PAGE, "markdown")
    assert missing([text for text in shown.splitlines() if text], summary.read_text(encoding="utf-8")) == []
    written = {path.name for path in (tmp_path / "temp").glob("*/report/*")}
    (artifact,) = re.findall(r"\*\*An artifact\*\*.*?\n\n", PAGE, re.DOTALL)
    assert written == set(re.findall(r"`(\w+\.\w+)`", artifact))
