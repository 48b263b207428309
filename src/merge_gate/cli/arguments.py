"""Arguments and help texts that several commands share, and the configuration that they ask for.

A command with a configuration file refuses the options for adapters that are named on the command line. The file was
reviewed, and the report has its digest.
"""

from __future__ import annotations

import argparse
import copy
import re
import shutil
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from merge_gate._internal.errors import UsageError
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate._internal.text import MOST_FOREIGN, NUMBER, foreign, one_of, quoted, repeatable, unusable, wrapped
from merge_gate.names.suggestions import nearest
from merge_gate.records.terms import DTYPES, Quantization

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from merge_gate.records.config import Config
    from merge_gate.report.stored.report_files import ReportCopy

DEFAULT_OUTPUT = "merge-gate-report"
DEFAULT_CONFIG = "merge-gate.yml"
_WIDEST_HELP = 100
FORMATS = tuple(file.word for file in OUTPUT_FILES)
"""The formats of a report, by the words of the command line."""


def exit_codes(*lines: str) -> str:
    """The last part of a help text."""
    return _part("exit codes:", lines)


def examples(*lines: str) -> str:
    """The part of a help text before the exit codes."""
    return _part("examples:", lines) + "\n"


def _part(title: str, lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in (title, *(f"  {line}" for line in lines)))


EXIT_CODES = exit_codes(
    "0  pass: every adapter was merged, every parameter of the result was checked, and no adapter failed, except for "
    "failures that a baseline accepts",
    "1  fail: at least one adapter failed. The report shows which ones and why",
    "2  usage or configuration error: nothing was judged",
    "3  error: no adapter failed, but at least one could not be judged",
)

Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


class HelpText(argparse.HelpFormatter):
    """Wraps the description, and each line of the epilog for itself, to the width of the terminal."""

    _HANGING = 3

    def __init__(self, prog: str, headings: Mapping[str, str] = MappingProxyType({}), **options: Any) -> None:
        """`headings` has the commands that begin a group of commands."""
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, **{"width": min(columns, _WIDEST_HELP) - 2, "max_help_position": 28, **options})
        self._headings = headings

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, Commands):
            self._action_max_length += self._HANGING  # argparse forgets their indentation

    def _format_action(self, action: argparse.Action) -> str:
        heading = self._headings.get(action.dest)
        return (f"\n  {heading}:\n" if heading else "") + super()._format_action(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            first = indent + " " * (len(line) - len(line.lstrip()))
            rest = first + " " * (self._HANGING if first else 0)
            lines += wrapped(line, width, first, rest) or [""]
        return "\n".join(lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width)


class _ShortHelp(argparse.Action):
    """Prints the arguments, some of the options, and two examples."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, shown: Sequence[str], **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)
        self._shown = shown

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        text = HelpText(parser.prog)
        text.add_usage(parser.usage, [], [])
        text.add_text(parser.description)
        text.start_section(None)
        for action in parser._actions:  # noqa: SLF001 - argparse has no public name for them
            if not action.option_strings or any(word in self._shown for word in action.option_strings):
                short = copy.copy(action)
                short.help = (action.help or "").partition(" [env:")[0]
                text.add_argument(short)
        text.end_section()
        text.add_text("\n".join((parser.epilog or "").splitlines()[:3]))
        text.add_text(f"`{parser.prog} --help` shows all options, their variables, and the exit codes.")
        sys.stdout.write(text.format_help())
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """A parser that knows no abbreviations: a later option could give `--out` another meaning.

    `from_environment` has the options that come from variables, so that an error names the variable. With `short`, `-h`
    shows only these options.
    """

    def __init__(self, *, short: Sequence[str] = (), **options: Any) -> None:
        conflicts = "resolve" if short else "error"  # the -h of `short` replaces that of --help
        super().__init__(
            **{"allow_abbrev": False, "conflict_handler": conflicts, **options, "formatter_class": HelpText}
        )
        self.register("type", "name", given)
        self.from_environment: dict[str, str] = {}
        if short:
            self.add_argument("-h", action=_ShortHelp, shown=short, help="show the options that most users need")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        is_long = isinstance(value, str) and len(value) > MOST_FOREIGN
        super()._check_value(action, quoted(value, MOST_FOREIGN, "") if is_long else value)

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument (\S+?): ", message)
        options = named[1].split("/") if named else []
        variables = [self.from_environment[option] for option in options if option in self.from_environment]
        message = repeatable(message)
        super().error(f"{message} (from the variable {variables[0]})" if variables else message)


def add_appearance(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("display options")
    group.add_argument("-q", "--quiet", action="store_true", help="show only the result, without progress")
    group.add_argument(
        "-v", "--verbose", action="store_true", help="also show when each merge starts, and details of crashes"
    )
    group.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="color the result. auto (default) uses colors on a terminal and respects NO_COLOR and FORCE_COLOR",
    )


def add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names",
        nargs="*",
        type=given,
        metavar="CONFIG|ADAPTER",
        help="the YAML file that lists the adapters, or the adapters themselves: directories, globs, or Hub ids "
        f"(default: {DEFAULT_CONFIG})",
    )


def add_output(command: argparse.ArgumentParser, default: str = DEFAULT_OUTPUT) -> None:
    command.add_argument(
        "-o",
        "--output",
        default=default,
        type=given,
        metavar="DIR",
        help=f"the directory for the report (default: {default})",
    )


def add_reports(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--report",
        action="append",
        default=[],
        type=_copy,
        metavar="FORMAT=FILE",
        help=f"also write the report to FILE, or to standard output if FILE is `-`. FORMAT is {one_of(FORMATS)}; "
        "repeatable",
    )


def _copy(text: str) -> ReportCopy:
    from merge_gate.report.stored.report_files import ReportCopy

    word, equals, place = text.partition("=")
    if word not in FORMATS or not equals or not place:
        raise argparse.ArgumentTypeError(f"{foreign(text)} is not FORMAT=FILE, with {one_of(FORMATS)}")
    return ReportCopy(word, place)


def given(text: str) -> str:
    """The text, unless it can be no name. An empty base or dtype would silently select another one."""
    if why := unusable(text):
        raise argparse.ArgumentTypeError(why)
    return text


# --- adapters on the command line ------------------------------------------------------------------------------------

_OPTIONS = ("base", "dtype", "quantization", "revision", "set", "expect", "allow_pickle")
_EXPECTED = ("peft_type", "r", "lora_alpha", "projection_prng_key", "base", "sha256:FILE", "base-sha256")


def add_named_options(command: argparse.ArgumentParser, *, merges: bool = True) -> None:
    """Add the options. A command that merges nothing has none for dtypes and quantization."""
    group = command.add_argument_group("options for adapters on the command line (a config has its own)")
    group.add_argument(
        "--base",
        type=given,
        metavar="BASE",
        help="the base: a directory or a Hub id (default: the base in adapter_config.json)",
    )
    if merges:
        dtypes = one_of(("auto", *DTYPES))
        group.add_argument("--dtype", type=given, metavar="LIST", help=f"{dtypes}, or several: bfloat16,float16")
        group.add_argument("--quantization", type=given, metavar="Q", help=one_of(Quantization))
    group.add_argument("--revision", type=given, metavar="REV", help="commit, tag or branch of adapters on the Hub")
    group.add_argument(
        "--set",
        action="append",
        type=_setting,
        metavar="CHECK=SEVERITY[:LIMIT]",
        help="set the severity of a check (error, warning, off or on), and its limit: `headroom=error:0.9`; repeatable",
    )
    group.add_argument(
        "--expect",
        action="append",
        type=_expectation,
        metavar="KEY=VALUE",
        help=f"fail an adapter if a value differs. KEY is {one_of(_EXPECTED)}, the digest that a report has of the "
        "base; repeatable",
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="load pickled adapter weights (.bin), with weights_only=True"
    )


def requested_config(arguments: argparse.Namespace) -> Config:
    """The configuration in the file, or that of the adapters named on the command line."""
    from merge_gate.config.exchanged import refuse_exchanged_base
    from merge_gate.config.from_arguments import config_of, names_a_file
    from merge_gate.config.load_config import load_config
    from merge_gate.judging.policies import POLICIES

    output, policy = getattr(arguments, "output", None), getattr(arguments, "policy", None)
    values: dict[str, Any] = {name: getattr(arguments, name, None) for name in _OPTIONS}
    if names_a_file(arguments.names):
        for option in (f"--{name.replace('_', '-')}" for name, value in values.items() if value):
            variable = arguments.variables.get(option)
            source = f" (from the variable {variable})" if variable else ""
            raise UsageError(
                f"{option}{source} is for adapters named on the command line",
                hint=f"{arguments.names[0]} lists the adapters of this run: write it into that file instead",
            )
        config = load_config(arguments.names[0], output=output, policy=policy)
    else:
        if getattr(arguments, "container", False):
            raise UsageError("--container needs a config", hint="write one with: merge-gate init DIR")
        refuse_exchanged_base(arguments.command, values["base"], arguments.names)
        config = config_of(
            arguments.names,
            base=values["base"],
            dtypes=[word.strip() for word in (values["dtype"] or "").split(",") if word.strip()],
            quantization=values["quantization"],
            revision=values["revision"],
            checks=_unique("--set", values["set"]),
            expect=_expected(values["expect"]),
            allow_pickle=bool(values["allow_pickle"]),
            output=output,
            policy=policy,
        )
    if arguments.unknown_variables and POLICIES[config.policy].needs_known_variables:
        raise UsageError("; ".join(arguments.unknown_variables), hint=f"policy: {config.policy} allows no unknown ones")
    return config


def _setting(text: str) -> tuple[str, dict[str, object]]:
    check, equals, value = text.partition("=")
    severity, colon, limit = value.partition(":")
    if not check or not equals or not severity or (colon and not NUMBER.fullmatch(limit)):
        raise argparse.ArgumentTypeError(f"{foreign(text)} is not CHECK=SEVERITY or CHECK=SEVERITY:LIMIT with a number")
    return check, {"severity": severity} | ({"limit": float(limit)} if colon else {})


def _expectation(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise argparse.ArgumentTypeError(f"{foreign(text)} is not KEY=VALUE")
    if key not in _EXPECTED and not key.startswith("sha256:"):
        hint = nearest(key, _EXPECTED) or f"known keys: {', '.join(_EXPECTED)}"
        raise argparse.ArgumentTypeError(f"unknown key {quoted(key)} ({hint})")
    return key, _number(value) if key in {"r", "lora_alpha", "projection_prng_key"} and NUMBER.fullmatch(
        value
    ) else value


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"-?\d+", text, re.ASCII) else float(text)


def _expected(pairs: list[tuple[str, object]] | None) -> dict[str, object]:
    """The mapping that a file has under `expect`: digests are in a mapping of their own."""
    expect = _unique("--expect", pairs)
    digests = {key.partition(":")[2]: expect.pop(key) for key in list(expect) if key.startswith("sha256:")}
    return expect | ({"sha256": digests} if digests else {})


def _unique(option: str, pairs: list[tuple[str, Any]] | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs or ():
        if key in values:
            raise UsageError(f"{option} names {key} twice", hint="give each one once")
        values[key] = value
    return values
