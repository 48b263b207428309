"""Takes apart what the action writes for the runner, as the runner does."""

from __future__ import annotations

import re
from pathlib import Path


def is_command(line: str) -> bool:
    """As actions/runner reads a line (ActionCommand.cs): `::` after blanks, or `##[` anywhere."""
    return line.lstrip().startswith("::") or "##[" in line


def decode(line: str) -> tuple[str, dict[str, str], str]:
    """The name, the properties, and the message of a command."""
    match = re.fullmatch(r"::([a-z-]+)(?: (.*?))?::(.*)", line)
    assert match, line
    name, listed, data = match.groups()

    def plain(text: str, *more: tuple[str, str]) -> str:
        for code, character in (*more, ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            text = text.replace(code, character)
        return text

    pairs = (pair.partition("=") for pair in (listed or "").split(",") if pair)
    return name, {key: plain(value, ("%3A", ":"), ("%2C", ",")) for key, _, value in pairs}, plain(data)


def outputs_in(file: Path) -> dict[str, str]:
    """The outputs of a step; the last value of each name counts."""
    text = file.read_text(encoding="utf-8")
    return {
        name: value for name, _, value in re.findall(r"^([a-z-]+)<<(\S+)\n(.*?)\n\2$", text, re.MULTILINE | re.DOTALL)
    }
