"""The pages of docs/reference that are made from the command line, and what they say about variables."""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merge_gate._internal.errors import ExitCode
from merge_gate.cli.parser import parsers, without_variable
from tests.support.generated import held

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
INTERNAL = {"MERGE_GATE_HANDOVER", "MERGE_GATE_CANARIES", "MERGE_GATE_JOB_INDEX"}
"""Variables between the action, its launcher, and the container; users do not set them."""

ENVIRONMENT = re.compile(r" ?\[env: (\w+)\]")
MEANINGS = re.compile(r"^  (\d)  (?:\w+: )?(.+)$", re.MULTILINE)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name: `run`, `report show`."""
    return dict(parsers()[1].choices)


def command_reference() -> str:
    """A section for each command: description, a table for each group of options, and examples."""
    return "\n\n".join("\n\n".join(_section(name, parser)) for name, parser in commands().items())


def _section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## merge-gate {name}"
    yield _lazy_group(parser.description or "")
    for group in parser._action_groups:
        rows = [row for action in group._group_actions if (row := _row(action))]
        if not rows:
            continue
        title = {"positional arguments": "Arguments", "options": "Options"}.get(group.title or "", group.title or "")
        note = f" ({_lazy_group(group.description)})" if group.description else ""
        yield f"**{title[:1].upper()}{title[1:]}**{note}"
        yield "\n".join(["| option | variable | meaning |", "|---|---|---|", *rows])
    shown = re.match(r"examples:\n((?:  .+\n)+)", parser.epilog or "")
    if shown:
        yield "```console\n" + "".join(f"{line.strip()}\n" for line in shown[1].splitlines()) + "```"


def _row(action: argparse.Action) -> str:
    if "--help" in action.option_strings:
        return ""
    spelled = ", ".join(f"`{word}`" for word in action.option_strings)
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    if not spelled:
        spelled = f"`{value or action.dest}`"
    elif value and action.nargs != 0:
        spelled += f" `{f'[{value}]' if action.nargs == '?' else value}`"
    variable = ENVIRONMENT.search(action.help or "")
    named = f"`{variable[1]}`" if variable else ""
    meaning = _lazy_group(ENVIRONMENT.sub("", action.help or ""))
    return f"| {spelled.replace('|', chr(92) + '|')} | {named} | {meaning} |"


def _lazy_group(text: str) -> str:
    """A help text as Markdown: percent signs as argparse shows them, and nothing that ends a cell or starts a tag."""
    plain = " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")
    if "`" in plain:
        return plain
    return re.sub(r"(?<![\w`])(--[a-z][a-z-]*)(?![\w`])", r"`\1`", plain).replace("*", "\\*").replace("_", "\\_")


def variable_table() -> str:
    """Each variable that stands for an option, with the commands that have it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, parser in commands().items():
        for action in parser._actions:
            if variable := ENVIRONMENT.search(action.help or ""):
                option = next(word for word in action.option_strings if word.startswith("--"))
                found.setdefault(variable[1], (option, []))[1].append(name)
    rows = [f"| `{name}` | `{option}` | {', '.join(used)} |" for name, (option, used) in sorted(found.items())]
    return "\n".join(["| variable | option | commands |", "|---|---|---|", *rows])


def exit_code_table() -> str:
    """What each exit code means, by command."""
    rows = []
    for name, parser in commands().items():
        codes = dict(MEANINGS.findall(parser.epilog or ""))
        if codes:
            assert set(codes) <= {str(int(code)) for code in ExitCode}, name
            rows.append(f"| `{name}` | {' | '.join(_lazy_group(codes.get(str(int(code)), '')) for code in ExitCode)} |")
    head = " | ".join(str(int(code)) for code in ExitCode)
    return "\n".join([f"| command | {head} |", f"|---|{'---|' * len(ExitCode)}", *rows])


@pytest.mark.parametrize(
    ("page", "name", "made"),
    [
        ("command-line", "commands", command_reference),
        ("environment", "variables", variable_table),
        ("exit-codes", "exit codes", exit_code_table),
    ],
)
def test_the_reference_of_the_command_line_is_that_of_the_parser(page: str, name: str, made: Callable[[], str]) -> None:
    held(REFERENCE / f"{page}.md", name, made())


def test_every_option_is_in_the_reference() -> None:
    page = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## merge-gate ([a-z ]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(commands())
    for name, parser in commands().items():
        for option in (option for action in parser._actions for option in action.option_strings):
            assert f"`{option}`" in sections[name] or option in {"-h", "--help"}


def test_every_variable_of_merge_gate_is_in_the_reference() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r'"(MERGE_GATE_[A-Z_]*[A-Z])"', text)}
    page = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    missing = [name for name in used if f"`{name}`" not in page and not name.startswith("MERGE_GATE_INPUT")]
    assert used >= {"MERGE_GATE_CACHE_KEY", "MERGE_GATE_PLACE"}
    assert set(missing) <= INTERNAL
    assert all(f"`{option}`" in page for option in without_variable() - {"--help", "--version", "--trust-remote-code"})
