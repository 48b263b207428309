"""The environment variables that set options: `MERGE_GATE_DEVICE` for `--device`.

A flag on the command line overrides its variable. An option that can be given several times has no variable, and no
variable can make the gate trust more.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from merge_gate.names.suggestions import nearest
from merge_gate.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PREFIX = "MERGE_GATE_"
WITHOUT_VARIABLE = frozenset((
    "--help", "--version", "--allow-pickle", "--trust-remote-code", "--image", "--gpus", "--plan", "--ray", "--shard",
    "--attestation", "--key",
))  # fmt: skip
"""A variable of these could keep a job from merging, or choose who is trusted. `MERGE_GATE_IMAGE` and `MERGE_GATE_GPUS`
tell a gate in a container about the container."""
_OTHERS = frozenset((
    "CACHE_KEY", "CANARIES", "COMMIT", "CONFIG", "DEBUG", "E2E_HOME", "GPUS", "HANDOVER", "IMAGE", "JOB_INDEX", "PLACE",
    "PUBLISH_WITHIN", "REAL_ADAPTER", "SANDBOX", "SCREENSHOTS",
))  # fmt: skip
"""Names after the prefix that are no option's: of the gate, its action and container, its recipes, and its tests."""
_INPUT = f"{PREFIX}INPUT_"
"""Before an input of the action."""
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


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


def _variables(command: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str, str]]:
    for action in command._actions:  # noqa: SLF001 - argparse has no public name for them
        option = next((word for word in action.option_strings if word.startswith("--")), "")
        repeats = isinstance(action, argparse._AppendAction)  # noqa: SLF001 - as above
        if option and option not in WITHOUT_VARIABLE and not repeats:
            yield action, option, PREFIX + option.removeprefix("--").replace("-", "_").upper()


def _is_given(options: Sequence[str], words: Sequence[str]) -> bool:
    """Whether one of these spellings of an option is among the words."""
    long = [option for option in options if option.startswith("--")]
    short = [option for option in options if not option.startswith("--")]
    return any(
        word.partition("=")[0] in long or (not word.startswith("--") and word.startswith(tuple(short)))
        for word in words
    )
