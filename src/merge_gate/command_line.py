"""argv → a namespace: commands, options, help texts. Runs nothing, and imports nothing that takes time.

In: the words of the command line. Out: their values; `command` names the command. Knows no other module of the package
but its version, and words that stand for something: files of a report, quantisations.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence

from merge_gate import __version__
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.records.terms import Quantization
from merge_gate.text import one_of, quoted

DEFAULT_OUTPUT = "merge-gate-report"
_LONGEST = 40

EXIT_CODES = """\
exit codes:
  0  pass: no adapter failed (but for failures that a baseline accepts): each was merged and every parameter of the
     result checked, with --quick some by a bound instead of a merge
  1  fail: at least one adapter is broken; the report says which and why
  2  usage or configuration error: nothing was judged
  3  error: no adapter failed, but at least one could not be judged
"""

EXIT_CODES_OF_CHECK = """\
exit codes:
  0  the files of every adapter are sound; nothing was merged
  1  the files of at least one adapter failed
  2  usage or configuration error: nothing was checked
  3  no adapter failed, but at least one could not be judged: its files or those of its base
"""

Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


COMBINE, BASELINE = "report combine", "report baseline"
"""Commands of two words, which argparse hears as one; a report of such a name is given as ./combine."""


def commanded(argv: Sequence[str]) -> list[str]:
    """The words of the command line, those of a command in one."""
    first = " ".join(argv[:2])
    return [first, *argv[2:]] if first in {COMBINE, BASELINE} else list(argv)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The values of the command line; one that only lacks its command is told so."""
    top, commands = _parsers()
    words = commanded(argv)
    if not words:
        top.print_help(sys.stderr)
        top.exit(2)
    if words[0] not in commands.choices:
        if _is_place(words[0]):
            meant = quoted(f"merge-gate run {shlex.quote(words[0])}", 200, "`")
            top.error(f"the command is missing; did you mean {meant}?")
        options = ["-h", *_options(top), "--help"]
        if not any(option.startswith(words[0]) for option in options):
            kind, known = ("option", options) if words[0].startswith("-") else ("command", [*commands.choices])
            top.error(f"there is no {kind} {quoted(words[0])}{_meant(words[0], known)}")
    values, rest = top.parse_known_args(words)
    if rest:
        command = commands.choices[values.command]
        option = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
        if option:
            if option in _options(commands.choices["run"]):
                command.error(
                    f"{quoted(option)} is an option of `merge-gate run`, not of `merge-gate {values.command}`"
                )
            command.error(f"there is no option {quoted(option)}{_meant(option, _options(command))}")
        command.error(f"{quoted(rest[0])} stands alone: names come before the options, and a list has no blanks in it")
    return values


def output_of(argv: Sequence[str]) -> str | None:
    """The output directory that a command line with a mistake names.

    None if the command has no output directory, or if the mistake may be in `--output` itself.
    """
    _, commands = _parsers()
    words = commanded(argv) or [""]
    command = words[0] if words[0] in commands.choices else _nearest(words[0], [*commands.choices])
    if _is_place(words[0]):
        command = "run"  # the command was left out
    if command not in {"run", COMBINE} or any(_may_mean_output(word, commands.choices[command]) for word in words):
        return None
    output = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    _add_output(output)
    try:
        return str(output.parse_known_args(words[1:])[0].output)
    except argparse.ArgumentError:
        return None


def _may_mean_output(word: str, command: argparse.ArgumentParser) -> bool:
    """Whether this is `--output` mistyped, or an abbreviation of it that is not clear."""
    name, known = word.partition("=")[0], _options(command)
    if not name.startswith("--"):
        return name.startswith("-o")
    meant = [option for option in known if option.startswith(name)]
    if name in known or len(meant) == 1:
        return False
    return "--output" in meant or name.startswith("--out") or _nearest(name, known) == "--output"


def _options(command: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"--[a-z][a-z-]*", command.format_usage())


def _meant(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, or all of them where these are few."""
    if near := _nearest(word, known):
        return f"; did you mean {quoted(near)}?"
    return "" if word.startswith("-") else f", expected {one_of(known)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like this one; empty if none is."""
    from difflib import get_close_matches  # noqa: PLC0415 - only a mistake needs it

    return next(iter(get_close_matches(word[:_LONGEST], known, 1)), "")


def _is_place(word: str) -> bool:
    """Whether it is a path, or looks like one, or like a Hub id."""
    if word.startswith("-"):
        return False
    return "/" in word or word.endswith((".yml", ".yaml")) or os.path.exists(word)  # noqa: PTH110 (False where pathlib raises)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, Commands[argparse.ArgumentParser]]:
    top = argparse.ArgumentParser(
        prog="merge-gate",
        description="Merge LoRA and other PEFT adapters into a scratch copy of their base, check that every parameter "
        "is finite, and name what is broken.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"merge-gate {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_run, _add_check, _add_init, _add_demo, _add_report, _add_combine, _add_baseline, _add_schema):
        add(commands)
    return top, commands


def _add_run(commands: Commands[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="gate adapters, named here or in a config",
        description="Gate every adapter that CONFIG lists, or the adapters that are named: directories, globs or Hub "
        "ids. Writes report.json, and the same for people and other tools, to the output directory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_names(run)
    named = run.add_argument_group("for adapters that are named here; a config says it itself")
    named.add_argument(
        "--base", type=_given, metavar="BASE", help="a directory or a Hub id (default: as the adapter names it)"
    )
    named.add_argument(
        "--dtype", type=_given, metavar="LIST", help="auto, float32, bfloat16, float16, or several: bfloat16,float16"
    )
    named.add_argument("--quantization", type=_given, metavar="Q", help=one_of(Quantization))
    run.add_argument("--device", default="auto", type=_device, help="auto (default), cpu, cuda or cuda:N")
    _add_output(run)
    run.add_argument("--only", action="append", default=[], metavar="NAME", help="gate this adapter only; repeatable")
    run.add_argument(
        "--quick",
        action="store_true",
        help="let a bound stand for the merge where it proves every value finite and small; for large fleets",
    )
    run.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="gate the I-th of N parts, on this machine of N; N alone takes I from JOB_COMPLETION_INDEX, which counts "
        "from 0; `merge-gate report combine` makes one report of all",
    )
    kept = run.add_argument_group("verdicts of earlier runs", "taken over where everything that decides is the same")
    kept.add_argument("--cache", metavar="DIR", help="keep verdicts in DIR, and take over those that are there")
    kept.add_argument("--no-cache", action="store_true", help="take over nothing; --cache keeps the new verdicts")
    kept.add_argument("--resume", action="store_true", help="go on from the report of a killed run in --output")
    cluster = run.add_argument_group("on a Ray cluster", "needs the extra `ray`")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="merge on the cluster at HOST:PORT, or the one that `auto` finds; without ADDRESS, as the last word, on "
        "one that is started on this machine for this run",
    )
    container = run.add_argument_group("in a container", "needs a Docker or Podman engine, and the extra `launcher`")
    container.add_argument("--container", action="store_true", help="run inside the released image, not here")
    container.add_argument("--image", default="", metavar="REF", help="another image (default: this version's own)")
    container.add_argument("--gpus", default="auto", metavar="WHICH", help="auto (default), none, all, or indices: 0,1")


def _add_check(commands: Commands[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check config and files only",
        description="Check CONFIG and the adapters' files, or the files of the adapters that are named: formats, "
        "headers, adapter_config.json, expectations. Loads no model; a clean check says nothing about values.",
        epilog=EXIT_CODES_OF_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_names(check)
    check.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="check this adapter only; repeatable"
    )


def _add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names",
        nargs="+",
        type=_given,
        metavar="CONFIG|ADAPTER",
        help="the YAML file that lists the adapters, or adapters: directories, globs, Hub ids",
    )


def _add_init(commands: Commands[argparse.ArgumentParser]) -> None:
    init = commands.add_parser(
        "init",
        help="write a first config",
        description="Write merge-gate.yml, with comments, into the current directory, for the adapters in DIR and up "
        "to four levels below it. An existing one stays.",
    )
    init.add_argument("directories", nargs="+", metavar="DIR", help="a directory with adapters")


def _add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="see what the gate catches",
        description="Make a tiny base and a handful of good and broken adapters in DIR, and gate them for real.",
    )
    demo.add_argument("directory", nargs="?", metavar="DIR", help="a new directory (default: a temporary one)")


def _add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="show a report again, or what changed",
        description="Show a stored report, or what changed from one to another (exit code 1 if something broke or got "
        "worse, 3 if nothing did but the newer run is not complete).",
        epilog=f"see also: merge-gate {COMBINE} --help, merge-gate {BASELINE} --help",
    )
    report.add_argument(
        "reports", nargs="+", metavar="REPORT", help="the report.json of a run, or its directory; two are compared"
    )
    formats = ("terminal", *(one.word for one in OUTPUT_FILES if one.word))
    report.add_argument("--format", choices=formats, default="terminal", help="default: terminal")


def _add_combine(commands: Commands[argparse.ArgumentParser]) -> None:
    combine = commands.add_parser(
        COMBINE,
        prog=f"merge-gate {COMBINE}",
        help="make one report of all shards",
        description="Make one report of the reports of all shards of a run (`merge-gate run --shard I/N`). A shard "
        "that is missing, doubled, incomplete, or of another config, version or set leaves no verdict: exit code 3.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    combine.add_argument(
        "directories",
        nargs="+",
        metavar="DIR",
        help="a shard's output directory, or one that holds several, as artifacts are downloaded",
    )
    _add_output(combine)


def _add_baseline(commands: Commands[argparse.ArgumentParser]) -> None:
    baseline = commands.add_parser(
        BASELINE,
        prog=f"merge-gate {BASELINE}",
        help="write a first baseline",
        description="Print a baseline that accepts the failures of a report, one by one, for 90 days. Write a reason "
        "and an owner for each, and name the file in the config: `baseline: FILE`.",
    )
    baseline.add_argument("report", metavar="REPORT", help="the report.json of a run, or its directory")


def _add_schema(commands: Commands[argparse.ArgumentParser]) -> None:
    schema = commands.add_parser(
        "schema", help="print a JSON Schema", description="Print the JSON Schema of the config or of report.json."
    )
    schema.add_argument("document", choices=("config", "report"), help="which one")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        type=_directory,
        metavar="DIR",
        help=f"where the report goes (default: {DEFAULT_OUTPUT})",
    )


def _directory(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a directory (a variable that is not set?)")
    return text


def _given(text: str) -> str:
    """An empty word is a mistake: without it another base, in another dtype, would be judged."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (a variable that is not set?)")
    return text


def _shard(text: str) -> str:
    if re.fullmatch(r"([1-9]\d{0,4}/)?[1-9]\d{0,4}", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no shard, expected I/N such as 2/4, counted from 1")


def _device(text: str) -> str:
    name, _, index = text.partition(":")
    if text in {"auto", "cpu", "cuda"} or (name == "cuda" and index.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
