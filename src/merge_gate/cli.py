"""argv → exit code. Prints and writes, decides nothing.

In: the command line and the environment. Out: text on standard output and error, the exit codes of errors.py. The
imports that take time stand in the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from merge_gate import __version__
from merge_gate.errors import ConfigError, ExitCode, GateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_gate.records import Report

DEFAULT_OUTPUT = "merge-gate-report"

EXIT_CODES = """\
exit codes:
  0  pass: every listed adapter was merged and checked, and none failed
  1  fail: at least one adapter is broken; the report says which and why
  2  usage or configuration error: nothing was judged
  3  error: no adapter failed, but at least one could not be judged
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves here."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        for problem in error.problems:
            _say(str(problem))
        count = len(error.problems)
        _say(f"merge-gate: {count} problem{'s' if count > 1 else ''} in the configuration; nothing was judged")
        return error.exit_code
    except GateError as error:
        _say(f"merge-gate: {error.message}")
        if error.hint:
            _say(f"  {error.hint}")
        return error.exit_code
    except _Stopped as stop:
        _say(f"merge-gate: stopped by {stop.signal_name}; the report holds what was judged until then")
        return ExitCode.ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ERROR
    except Exception as error:
        _say(f"merge-gate: unexpected {type(error).__name__}: {error}")
        _say("  this is a bug of merge-gate; run again with MERGE_GATE_DEBUG=1 for the details, and please report it")
        if os.environ.get("MERGE_GATE_DEBUG"):
            raise
        return ExitCode.ERROR


def _say(line: str) -> None:
    from merge_gate.report.untrusted import safe_text

    print(safe_text(line), file=sys.stderr)


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal_name = signal.Signals(number).name


def _stop_on_signals() -> None:
    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        raise _Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="merge-gate",
        description="Merge LoRA and other PEFT adapters into a scratch copy of their base, check that every parameter "
        "is finite, and name what is broken.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"merge-gate {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_check(commands)
    _add_demo(commands)
    _add_schema(commands)
    return top


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="gate the adapters of a config",
        description="Gate every adapter that CONFIG lists; writes report.json and summary.md to the output directory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("config", metavar="CONFIG", help="the YAML file that lists the adapters")
    run.add_argument("--device", default="auto", type=_device, help="auto (default), cpu, cuda or cuda:N")
    run.add_argument(
        "--output", default=DEFAULT_OUTPUT, metavar="DIR", help=f"where the report goes (default: {DEFAULT_OUTPUT})"
    )
    run.add_argument("--only", action="append", default=[], metavar="NAME", help="gate this adapter only; repeatable")
    run.set_defaults(run=_run)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check config and files only",
        description="Check CONFIG and the adapters' files: formats, headers, adapter_config.json, expectations. Loads "
        "no model; a clean check says nothing about values.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("config", metavar="CONFIG", help="the YAML file that lists the adapters")
    check.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="check this adapter only; repeatable"
    )
    check.set_defaults(run=_check)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="see what the gate catches",
        description="Make a tiny base and a handful of good and broken adapters in DIR, and gate them for real.",
    )
    demo.add_argument("directory", nargs="?", metavar="DIR", help="a new directory (default: a temporary one)")
    demo.set_defaults(run=_demo)


def _add_schema(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schema = commands.add_parser(
        "schema", help="print a JSON Schema", description="Print the JSON Schema of the config or of report.json."
    )
    schema.add_argument("document", choices=("config", "report"), help="which one")
    schema.set_defaults(run=_schema)


def _device(text: str) -> str:
    name, _, index = text.partition(":")
    if text in {"auto", "cpu", "cuda"} or (name == "cuda" and index.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")


# --- the commands --------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from merge_gate.config import load_config

    config = load_config(arguments.config)
    report = _gate(config, arguments.device, arguments.output, tuple(arguments.only))
    return exit_code(report)


def _gate(config: object, device: str, output: str, only: tuple[str, ...]) -> Report:
    from merge_gate.gate import run_gate
    from merge_gate.records import Config
    from merge_gate.terminal import make_view

    if not isinstance(config, Config):
        raise TypeError("expected a Config")
    _stop_on_signals()
    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        return run_gate(config, device=device, output=output, view=view, only=only)


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}[report.result.value]


def _check(arguments: argparse.Namespace) -> int:
    from merge_gate.config import load_config
    from merge_gate.gate import check_files
    from merge_gate.records import Verdict
    from merge_gate.report.untrusted import safe_text

    config = load_config(arguments.config)
    counts = dict.fromkeys(Verdict, 0)
    for adapter in check_files(config, only=tuple(arguments.only)):
        counts[adapter.verdict] += 1
        print(safe_text(f"{adapter.verdict.value:>6}  {adapter.name}  ({adapter.source})"))
        for finding in adapter.findings:
            print(safe_text(f"        {finding.severity.value}: {finding.check}: {finding.message}"))
            if finding.hint:
                print(safe_text(f"        {finding.hint}"))
    total = sum(counts.values())
    print(f"{total} adapters: {counts[Verdict.PASSED]} have sound files, {counts[Verdict.FAILED]} failed, "
          f"{counts[Verdict.ERROR]} could not be read. No weights were merged.")  # fmt: skip
    if counts[Verdict.FAILED]:
        return ExitCode.FAIL
    return ExitCode.ERROR if counts[Verdict.ERROR] else ExitCode.PASS


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        return _run_demo(arguments.directory)
    with tempfile.TemporaryDirectory(prefix="merge-gate-demo-") as directory:
        return _run_demo(directory)


def _run_demo(directory: str) -> int:
    from merge_gate.config import load_config
    from merge_gate.demo import EXPECTED, make_demo

    path = make_demo(directory)
    report = _gate(load_config(path), "cpu", str(Path(directory) / DEFAULT_OUTPUT), ())
    got = {(one.name, one.base.dtype): (one.verdict, one.cause) for one in report.adapters}
    code = exit_code(report)
    if got != dict(EXPECTED):
        wrong = sorted(key for key in {*got, *EXPECTED} if got.get(key) != EXPECTED.get(key))
        raise GateError(
            f"the gate did not judge the demo as it should: {wrong}",
            hint="this installation of merge-gate cannot be trusted; please report this with the versions above",
        )
    print(f"\nThe gate judged all {len(got)} demo entries as it should. The gate itself returned {int(code)}: a "
          "workflow step would be red.")  # fmt: skip
    print(f"Files and report: {directory}" if Path(directory).name else "")
    return ExitCode.PASS


def _schema(arguments: argparse.Namespace) -> int:
    if arguments.document == "config":
        from merge_gate.config import config_schema as schema
    else:
        from merge_gate.report.json_report import report_schema as schema
    print(json.dumps(schema(), indent=2))
    return ExitCode.PASS


if __name__ == "__main__":
    raise SystemExit(main())
