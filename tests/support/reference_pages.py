"""Parts of docs/reference that are made from the command line: its commands, variables, and exit codes.

In: the parser. Out: Markdown.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from merge_gate._internal.errors import ExitCode
from merge_gate.cli.parser import parsers

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
    return (
        f"| {spelled.replace('|', chr(92) + '|')} | {named} | {_lazy_group(ENVIRONMENT.sub('', action.help or ''))} |"
    )


def _lazy_group(text: str) -> str:
    """A help text as Markdown: percent signs as argparse shows them, and nothing that ends a cell or starts a tag."""
    plain = " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")
    return (
        re.sub(r"(?<![\w`])(--[a-z][a-z-]*)(?![\w`])", r"`\1`", plain).replace("*", "\\*").replace("_", "\\_")
        if ("`" not in plain)
        else plain
    )


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
