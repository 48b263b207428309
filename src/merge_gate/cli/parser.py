"""Parses the command line, and the environment variables that set options: `MERGE_GATE_DEVICE` for `--device`.

In: the words of the command line. Out: their values; `command` is the name of the command. It runs nothing, and imports
nothing that takes time.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NoReturn, TypeAlias

from merge_gate import __version__
from merge_gate._internal.text import one_of, quoted
from merge_gate.cli import check_command, demo_command, init_command, print_command, report_command, run_command
from merge_gate.cli.arguments import DEFAULT_CONFIG, EXIT_CODES, CommandParser, Commands, HelpText, examples
from merge_gate.cli.report_command import REPORT
from merge_gate.names.suggestions import closest, nearest
from merge_gate.records.features import declared, part, parts

PREFIX = "MERGE_GATE_"
_WITHOUT_VARIABLE = ("--help", "--version", "--allow-pickle", "--trust-remote-code", "--image", "--gpus", "--plan")
"""`MERGE_GATE_IMAGE` and `MERGE_GATE_GPUS` tell a gate in a container about the container."""
_OTHERS = frozenset((
    "CACHE_KEY", "CANARIES", "COMMIT", "CONFIG", "DEBUG", "E2E_HOME", "GPUS", "HANDOVER", "IMAGE", "JOB_INDEX", "PLACE",
    "PUBLISH_WITHIN", "REAL_ADAPTER", "SANDBOX", "SCREENSHOTS",
))  # fmt: skip
"""Names after the prefix that are no option's: of the gate, its action and container, its recipes, and its tests."""
_INPUT = f"{PREFIX}INPUT_"
"""Before an input of the action."""
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def commanded(argv: Sequence[str]) -> list[str]:
    """The words of the command line, with the words of a command joined: `report combine`."""
    first = " ".join(argv[:2])
    return [first, *argv[2:]] if first in all_commands() else list(argv)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The values of the command line. If only the command is missing, the error suggests `run`."""
    words = commanded(_without_help(argv))
    top, commands = parsers(words[0] if words and words[0] in all_commands() else "")
    if not words:
        top.print_help(sys.stderr)
        top.exit(2)
    if words[0] not in commands.choices:
        _explain_word(top, words, [*commands.choices])
        variables: dict[str, str] = {}
    else:
        more, variables = words_of(commands.choices[words[0]], words[1:], os.environ)
        commands.choices[words[0]].from_environment = variables
        end = words.index("--") if "--" in words else len(words)
        words[end:end] = more
    unknown = unknown_variables(commands.choices.values(), os.environ)
    if unknown:  # of this command
        unknown = unknown_variables(parsers()[1].choices.values(), os.environ)
    values, rest = top.parse_known_args(words, argparse.Namespace(variables=variables, unknown_variables=unknown))
    if rest:
        command = commands.choices[values.command]
        option = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
        if option:
            if why := _why_gone(option):
                command.error(why)
            if option in _options(parsers("run")[1].choices["run"]):
                command.error(
                    f"{quoted(option)} is an option of `merge-gate run`, not of `merge-gate {values.command}`"
                )
            command.error(f"there is no option {quoted(option)}{_meant(option, _options(command))}")
        command.error(f"{quoted(rest[0])} is not an option: names come before the options, and a list has no spaces")
    if values.command in {"run", "check"} and not values.names:
        if not os.path.isfile(DEFAULT_CONFIG):  # noqa: PTH113 (False where pathlib raises)
            command = commands.choices[values.command]
            command.error(
                f"name a configuration or adapters: there is no {DEFAULT_CONFIG} here\n"
                f"  for example: merge-gate {values.command} ./my-adapter --base ./my-base"
            )
        values.names = [DEFAULT_CONFIG]
    return values


def _without_help(argv: Sequence[str]) -> Sequence[str]:
    """The words with `help` and `version` as the options that they stand for."""
    if argv and argv[0] == "help":
        return [*argv[1:], "--help"]
    return ["--version"] if list(argv) == ["version"] else argv


def _explain_word(top: argparse.ArgumentParser, words: Sequence[str], known: Sequence[str]) -> None:
    """End with an error, unless the first word is an option of `merge-gate` itself."""
    if words[0] == REPORT:
        _refuse_report(top, words[1:])
    if _is_place(words[0]):
        meant = quoted(f"merge-gate run {shlex.quote(words[0])}", 200, "`")
        top.error(f"the command is missing; did you mean {meant}?")
    if why := _why_gone(words[0]):
        top.error(why)
    options = _options(top)
    if words[0] not in options:
        kind, names = ("option", options) if words[0].startswith("-") else ("command", known)
        top.error(f"there is no {kind} {quoted(words[0])}{_meant(words[0], names)}")


def _why_gone(word: str) -> str:
    """What to use instead of a command or an option that is gone; empty for any other word."""
    return next((f"{word} is gone: {gone[word]}" for gone in declared("GONE") if word in gone), "")


def _refuse_report(top: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    """`merge-gate report` alone, or with a word that is none of its commands."""
    second = words[0] if words else ""
    if _is_place(second):
        meant = f"{REPORT} show" if len(words) == 1 else f"{REPORT} diff"
        command = " ".join(["merge-gate", meant, *map(shlex.quote, words)])
        top.error(f"the command is missing; did you mean {quoted(command, 200, '`')}?")
    known = [name.removeprefix(f"{REPORT} ") for name in all_commands() if name.startswith(f"{REPORT} ")]
    if not second or second in {"-h", "--help"}:
        lines = [f"  merge-gate {REPORT} {name} --help" for name in known]
        text = "\n".join(["the commands of `merge-gate report`:", *lines, ""])
        (sys.stdout if second else sys.stderr).write(text)
        sys.exit(0 if second else 2)
    top.error(f"there is no command {quoted(f'{REPORT} {second}')}{_meant(second, known)}")


def _options(command: argparse.ArgumentParser) -> list[str]:
    actions = command._actions  # noqa: SLF001 - argparse has no public name for them
    return [option for action in actions for option in action.option_strings]


def _meant(word: str, known: Sequence[str]) -> str:
    """A hint: the nearest of the known words, or all of them."""
    if near := closest(word, known) or _of_letter(word, known):
        return f"; did you mean {quoted(near)}?"
    return "" if word.startswith("-") else f", expected {one_of(known)}"


def _of_letter(word: str, known: Sequence[str]) -> str:
    """The only option that begins with the letter of a short option: `--base` for `-b`; empty if there are several."""
    letter = re.fullmatch(r"-([a-z])", word)
    options = [option for option in known if letter and option.startswith(f"--{letter[1]}")]
    return options[0] if len(options) == 1 else ""


def _is_place(word: str) -> bool:
    """Whether it is a path, or looks like one, or like a Hub id."""
    if word.startswith("-"):
        return False
    return "/" in word or word.endswith((".yml", ".yaml")) or os.path.exists(word)  # noqa: PTH110 (False where pathlib raises)


def parser_of_words() -> argparse.ArgumentParser:
    """The command line for a shell's completion, in which a command of two words is a command in a command."""
    top = CommandParser(prog="merge-gate", description="A CI gate for PEFT adapters.")
    commands = top.add_subparsers(metavar="COMMAND")
    inner = commands.add_parser(REPORT, help="show, compare, and combine reports").add_subparsers(metavar="COMMAND")
    for name, command in parsers()[1].choices.items():
        first, _, second = name.partition(" ")
        place = inner if second else commands
        place.add_parser(second or first, parents=[command], add_help=False, help=command.description)
    return top


def parsers(only: str = "") -> tuple[argparse.ArgumentParser, Commands[CommandParser]]:
    """The command line, and its commands, or only one of them."""
    top = CommandParser(
        prog="merge-gate",
        description="Merge LoRA and other PEFT adapters into a scratch copy of their base, check that every parameter "
        "is finite, and name what is broken.",
        usage="%(prog)s COMMAND [arguments]",
        epilog=examples("merge-gate demo", "merge-gate run ./my-adapter --base ./my-base", "merge-gate help run")
        + EXIT_CODES,
    )
    top.add_argument("-V", "--version", action="version", version=f"merge-gate {__version__}")
    top._positionals.title = "commands"  # noqa: SLF001 - a group of add_subparsers would come after the options
    commands = top.add_subparsers(prog="merge-gate", required=True, metavar="COMMAND", dest="command")
    for name in [only] if only else all_commands():
        command_of(name)[0](commands)
    headings = {"schema": "more commands"} | {name: heading for name, _, heading in declared("COMMAND")}
    top.formatter_class = partial(HelpText, headings=headings)
    for command in commands.choices.values():
        show_variables(command)
    return top, commands


_Command: TypeAlias = "tuple[Callable[[Commands[CommandParser]], None], Callable[[argparse.Namespace], int]]"

COMMANDS: dict[str, _Command] = {
    "run": (run_command.add, run_command.run),
    "check": (check_command.add, check_command.run),
    "init": (init_command.add, init_command.run),
    "demo": (demo_command.add, demo_command.run),
    report_command.SHOW: (report_command.add_show, report_command.show),
    report_command.DIFF: (report_command.add_diff, report_command.diff),
    report_command.BASELINE: (report_command.add_baseline, report_command.baseline),
    "explain": (print_command.add_explain, print_command.explain),
    "schema": (print_command.add_schema, print_command.schema),
    "completion": (print_command.add_completion, lambda shell: print_command.completion(shell, parser_of_words())),
}
"""What adds each command of the gate to the command line, and what runs it, in the order of the help."""


def all_commands() -> list[str]:
    """The commands of the gate and of features, in the order of the help. A feature names the one after its own."""
    names = list(COMMANDS)
    for name, before, _ in declared("COMMAND"):
        names.insert(names.index(before), name)
    return names


def command_of(name: str) -> _Command:
    """What adds a command to the command line, and what runs it."""
    if name in COMMANDS:
        return COMMANDS[name]
    feature = next(feature for feature, own in parts("declared") if vars(own).get("COMMAND", ("",))[0] == name)
    command = part(feature, "command")
    return command.add, command.run


# --- variables -------------------------------------------------------------------------------------------------------
# A flag on the command line overrides its variable. An option that can be given several times has no variable, and no
# variable can make the gate trust more.


def show_variables(command: argparse.ArgumentParser) -> None:
    """Name the variable of each option in its help."""
    for action, _, variable in _variables(command):
        action.help = f"{action.help} [env: {variable}]"


def words_of(
    command: argparse.ArgumentParser, words: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The options that come from variables, as words of the command line, and the variable of each option.

    Args:
        command: the parser of the command, which ends the process if a variable is wrong.
        words: the words after the command. An option among them makes its variable unused.
        environ: the environment. An empty variable counts as one that is not set.
    """
    more, used = [], {}
    for action, option, variable in _variables(command):
        value = environ.get(variable, "")
        if not value or _is_given(action.option_strings, words):
            continue
        if action.nargs != 0:
            more.append(f"{option}={value}")
        elif value.lower() in _YES:
            more.append(option)
        elif value.lower() in _NO:
            continue
        else:
            command.error(f"the variable {variable} is {quoted(value)}, expected {_YES[1]} or {_NO[1]}")
        used[option] = variable
    return more, used


def unknown_variables(commands: Iterable[argparse.ArgumentParser], environ: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence for each variable that nothing reads. It may be a mistyped one, which would have set an option."""
    options = (variable.removeprefix(PREFIX) for command in commands for *_, variable in _variables(command))
    known = sorted({*options, *_OTHERS})
    given = sorted(name for name, value in environ.items() if value and name.startswith(PREFIX))
    strange = [name for name in given if not name.startswith(_INPUT) and name.removeprefix(PREFIX) not in known]
    hints = (nearest(name.removeprefix(PREFIX), known, before=PREFIX) for name in strange)
    return tuple(
        f"nothing reads the variable {quoted(name)}{f' ({hint})' if hint else ''}"
        for name, hint in zip(strange, hints, strict=True)
    )


def without_variable() -> set[str]:
    """The options that no variable sets: it could keep a job from merging, or make the gate trust more."""
    return {*_WITHOUT_VARIABLE, *chain.from_iterable(declared("WITHOUT_VARIABLE"))}


def _variables(command: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str, str]]:
    without = without_variable()
    for action in command._actions:  # noqa: SLF001 - argparse has no public name for them
        option = next((word for word in action.option_strings if word.startswith("--")), "")
        repeats = isinstance(action, argparse._AppendAction)  # noqa: SLF001 - as above
        if option and option not in without and not repeats:
            yield action, option, PREFIX + option.removeprefix("--").replace("-", "_").upper()


def _is_given(options: Sequence[str], words: Sequence[str]) -> bool:
    """Whether one of these spellings of an option is among the words."""
    long = [option for option in options if option.startswith("--")]
    short = [option for option in options if not option.startswith("--")]
    return any(
        word.partition("=")[0] in long or (not word.startswith("--") and word.startswith(tuple(short)))
        for word in words
    )
