"""The pages of docs/reference that are made from the command line, and what they say about variables."""

from __future__ import annotations

import re
from pathlib import Path

from merge_gate.cli.parser import without_variable
from tests.support.generated import held
from tests.support.reference_pages import command_reference, commands, exit_code_table, variable_table

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
INTERNAL = {"MERGE_GATE_HANDOVER", "MERGE_GATE_CANARIES", "MERGE_GATE_JOB_INDEX"}
"""Variables between the action, its launcher, and the container; users do not set them."""


def test_the_reference_of_commands_is_that_of_the_parser() -> None:
    held(REFERENCE / "command-line.md", "commands", command_reference())


def test_the_reference_of_variables_is_that_of_the_parser() -> None:
    held(REFERENCE / "environment.md", "variables", variable_table())


def test_the_reference_of_exit_codes_is_that_of_the_parser() -> None:
    held(REFERENCE / "exit-codes.md", "exit codes", exit_code_table())


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
