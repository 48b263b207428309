"""argv → exit code. Prints and writes, decides nothing.

In: the command line and the environment. Out: text on standard output and error, the exit codes of errors.py. The
imports that take time stand in the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate.action.interrupts import Interrupted, interruptible
from merge_gate.errors import ConfigError, ExitCode, GateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_gate.records import AdapterReport, Config, Report

DEFAULT_OUTPUT = "merge-gate-report"

EXIT_CODES = """\
exit codes:
  0  pass: every listed adapter was merged and checked, and none failed
  1  fail: at least one adapter is broken; the report says which and why
  2  usage or configuration error: nothing was judged
  3  error: no adapter failed, but at least one could not be judged
"""


_EXIT_CODE = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves here but argparse's SystemExit."""
    _mend_streams()
    try:
        with interruptible(time_limit_s=None):
            return _obey(_parsed(sys.argv[1:] if argv is None else argv))
    except Interrupted as stop:  # before or after the command itself
        _say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict")
        return ExitCode.ERROR
    finally:
        _flush()


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; where it is wrong, an earlier run's report must not stand for the run that was meant."""
    try:
        return parser().parse_args(argv)
    except SystemExit as leaving:
        if leaving.code == ExitCode.USAGE and argv[:1] == ["run"]:
            _forget_report(argv)
        raise


def _forget_report(argv: Sequence[str]) -> None:
    options = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    options.add_argument("--output", nargs="?", default=DEFAULT_OUTPUT)
    with suppress(GateError), _claimed(options.parse_known_args(argv)[0].output or DEFAULT_OUTPUT):
        pass


def _claimed(output: str) -> AbstractContextManager[None]:
    from merge_gate.report.directory import claimed
    from merge_gate.report.files import FORMATS

    return claimed(output, FORMATS)


def _obey(arguments: argparse.Namespace) -> int:
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
    except Interrupted as stop:
        return _stopped(stop, getattr(arguments, "output", None))
    except Exception as error:
        _say(f"merge-gate: unexpected {type(error).__name__}: {error}")
        _say("  this is a bug of merge-gate; run again with MERGE_GATE_DEBUG=1 for the details, and please report it")
        if os.environ.get("MERGE_GATE_DEBUG"):
            raise
        return ExitCode.ERROR


def _stopped(stop: Interrupted, output: str | None) -> int:
    """What a signal has left: no verdict, unless the whole report was on disk when it arrived."""
    from merge_gate.report.directory import written

    report = written(output) if output else None
    if report is not None and report.complete:
        _say(f"merge-gate: stopped by {stop.signal_name} after the last adapter; the report in {output} is complete")
        return _EXIT_CODE[report.result]
    held = f"; {Path(output, 'report.json')} holds what was judged until then" if output and report else ""
    _say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict{held}")
    return ExitCode.ERROR


# --- streams -------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    from merge_gate.report.terminal import write
    from merge_gate.report.untrusted import safe_text

    write(sys.stderr, safe_text(line) + "\n")


def _tell(line: str) -> None:
    from merge_gate.report.terminal import write
    from merge_gate.report.untrusted import inert

    write(sys.stdout, inert(line) + "\n")


def _mend_streams() -> None:
    """A stream that the caller closed becomes /dev/null, else the first file to be opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            from merge_gate.report.terminal import silence

            silence(stream)


# --- the command line ----------------------------------------------------------------------------------------------


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
    _add_report(commands)
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
    run.add_argument(
        "--quick",
        action="store_true",
        help="let a bound stand for the merge where it proves every value finite and small; for large fleets",
    )
    container = run.add_argument_group("in a container", "needs a Docker or Podman engine, and the extra `launcher`")
    container.add_argument("--container", action="store_true", help="run inside the released image, not here")
    container.add_argument("--image", default="", metavar="REF", help="another image (default: this version's own)")
    container.add_argument("--gpus", default="auto", metavar="WHICH", help="auto (default), none, all, or indices: 0,1")
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


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    told = "show a stored report, or what changed from one to another (exit code 1 if something broke or got worse)"
    report = commands.add_parser("report", help="show a report again, or what changed", description=told)
    report.add_argument("reports", nargs="+", metavar="REPORT", help="the report.json of a run; two are compared")
    formats = ("terminal", "markdown", "html", "junit", "sarif")
    report.add_argument("--format", choices=formats, default="terminal", help="default: terminal")
    report.set_defaults(run=_report)


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
    from merge_gate.config.load import load_config

    with _claimed(arguments.output):  # before anything else: an earlier verdict must not stand for this run's
        config = load_config(arguments.config)
        if not arguments.container:
            if arguments.image or arguments.gpus != "auto":
                raise UsageError("--image and --gpus belong to --container", hint="add --container, or use --device")
            only, quick = tuple(arguments.only), arguments.quick
            return exit_code(_gate(config, arguments.device, arguments.output, only, quick=quick))
    return _run_in_container(arguments)  # the run in there claims the directory itself


def _run_in_container(arguments: argparse.Namespace) -> int:
    from merge_gate.action.launcher import for_a_person, run_in_container

    more = [word for name in arguments.only for word in ("--only", name)]
    if arguments.quick:
        more.append("--quick")
    run = for_a_person(
        arguments.config,
        output=arguments.output,
        device=arguments.device,
        arguments=more,
        image=arguments.image,
        gpus=arguments.gpus,
        environ=os.environ,
    )

    def write(log: bytes) -> None:
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()

    return run_in_container(run, write)


def _gate(
    config: Config, device: str, output: str | None, only: tuple[str, ...] = (), *, quick: bool = False
) -> Report:
    from merge_gate.gate import run_gate
    from merge_gate.report.terminal import make_view

    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        return run_gate(config, device=device, output=output, view=view, only=only, quick=quick)


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return _EXIT_CODE[report.result.value]


def _check(arguments: argparse.Namespace) -> int:
    from merge_gate.config.load import load_config
    from merge_gate.gate import check_files
    from merge_gate.records import Verdict
    from merge_gate.report.terminal import make_view
    from merge_gate.report.words import counted

    config = load_config(arguments.config)
    counts = dict.fromkeys(Verdict, 0)
    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        for adapter in check_files(config, view=view, only=tuple(arguments.only)):
            counts[adapter.verdict] += 1
            for line in _checked(adapter):
                _tell(line)
    _tell(
        f"{counted(sum(counts.values()), 'adapter')}: the files of {counts[Verdict.PASSED]} are sound, "
        f"{counts[Verdict.FAILED]} failed, {counts[Verdict.ERROR]} could not be read. Nothing was merged: "
        "`merge-gate run` does that."
    )
    if counts[Verdict.FAILED]:
        return ExitCode.FAIL
    return ExitCode.ERROR if counts[Verdict.ERROR] else ExitCode.PASS


def _checked(adapter: AdapterReport) -> Iterator[str]:
    """What the files of one adapter say, worst first; `sound` is less than `passed`."""
    from merge_gate.records import Severity, Verdict
    from merge_gate.report.untrusted import one_line
    from merge_gate.report.words import MESSAGE_LIMIT, NAME_LIMIT

    said = "sound" if adapter.verdict is Verdict.PASSED else adapter.verdict.value
    yield f"{said:<6}  {one_line(adapter.name, NAME_LIMIT)}  ({one_line(adapter.source, NAME_LIMIT)})"
    for finding in adapter.findings:
        kind = "warning: " if finding.severity is Severity.WARNING else ""
        yield f"        {kind}{finding.check}: {one_line(finding.message, MESSAGE_LIMIT)}"
        if finding.hint:
            yield f"        to do: {one_line(finding.hint, MESSAGE_LIMIT)}"


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        _run_demo(arguments.directory, str(Path(arguments.directory, DEFAULT_OUTPUT)))
        _tell(f"Its files are yours to play with: merge-gate run {Path(arguments.directory, 'merge-gate.yml')}")
    else:
        with tempfile.TemporaryDirectory(prefix="merge-gate-demo-") as directory:
            _run_demo(directory, None)
        _tell("To keep the files and the report, name a new directory: merge-gate demo DIR")
    return ExitCode.PASS


def _run_demo(directory: str, output: str | None) -> None:
    from merge_gate.config.load import load_config
    from merge_gate.demo import EXPECTED, make_demo

    report = _gate(load_config(make_demo(directory)), "cpu", output)
    got = {(one.name, one.base.dtype): (one.verdict, one.cause) for one in report.adapters}
    wrong = sorted(f"{key[0]} ({key[1]})" for key in {*got, *EXPECTED} if got.get(key) != EXPECTED.get(key))
    if wrong:
        raise GateError(
            f"the gate did not judge the demo as it should: {', '.join(wrong)}",
            hint="this installation of merge-gate cannot be trusted; please report this, with the output of `pip list`",
        )
    _tell(
        f"\nThe gate judged all {len(got)} entries of the demo as it should. Its own exit code is "
        f"{int(exit_code(report))}: in a workflow, this release would stop here."
    )


def _schema(arguments: argparse.Namespace) -> int:
    if arguments.document == "config":
        from merge_gate.config.load import config_schema as schema
    else:
        from merge_gate.report.schema import report_schema as schema
    return _print(json.dumps(schema(), indent=2) + "\n")


def _report(arguments: argparse.Namespace) -> int:
    from merge_gate.report.stored import show

    return _print(*show(arguments.reports, arguments.format))


def _print(text: str, code: ExitCode = ExitCode.PASS) -> ExitCode:
    """Write a document, as UTF-8 whatever the locale is. It is all the output there is, so an error is one."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    except OSError as error:
        raise GateError(f"standard output cannot be written to: {error.strerror}") from error
    return code


if __name__ == "__main__":
    raise SystemExit(main())
