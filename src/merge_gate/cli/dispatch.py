"""Runs one command of the command line, and turns every error into a sentence.

In: the command line and the environment. Out: text on standard output and error, and an exit code of errors.py. Each
command imports slow modules inside its function, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from merge_gate._internal.errors import SHORTAGES, ConfigError, ExitCode, GateError
from merge_gate._internal.interrupts import Interrupted, interruptible
from merge_gate._internal.text import quoted
from merge_gate.cli.output import DEBUG, exit_code
from merge_gate.cli.parser import command_of, parsed
from merge_gate.records.features import declared
from merge_gate.run.streams import flush_streams, mend_streams, say

_OF_NO_PLACE = ("explain", "schema")
"""Commands that use no files of the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves here but argparse's SystemExit."""
    mend_streams()
    try:
        with interruptible(timeout_s=None):
            return _obey(_parsed(sys.argv[1:] if argv is None else argv))
    except Interrupted as stop:  # before or after the command itself
        say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict")
        return ExitCode.ERROR
    finally:
        flush_streams()


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parsed(argv)
    if arguments.variables:
        say(f"merge-gate: options from the environment: {', '.join(arguments.variables.values())}")
    for line in arguments.unknown_variables:
        say(f"merge-gate: warning: {line}")
    return arguments


def _obey(arguments: argparse.Namespace) -> int:
    try:
        if arguments.command not in _OF_NO_PLACE:
            _refuse_deleted_directory()
        return int(command_of(arguments.command)[1](arguments))
    except ConfigError as error:
        for problem in error.problems:
            say(str(problem))
        if error.more:
            say(f"and {error.more:,} more")
        count = len(error.problems) + error.more
        say(f"merge-gate: {count:,} problem{'s' if count > 1 else ''} in the configuration; nothing was judged")
        return error.exit_code
    except GateError as error:
        say(f"merge-gate: {error.message}")
        if error.hint:
            say(f"  {error.hint}")
        return error.exit_code
    except Interrupted as stop:
        return _stopped(stop, arguments)
    except Exception as error:
        return _crashed(error, verbose=getattr(arguments, "verbose", False))


def _refuse_deleted_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        from merge_gate.config.from_arguments import current_directory_gone

        raise current_directory_gone() from None


def _crashed(error: Exception, *, verbose: bool) -> int:
    """Report a missing requirement of this machine, or a bug. It is never an adapter's failure."""
    if isinstance(error, OSError) and (shortage := SHORTAGES.get(error.errno or 0)):
        say(f"merge-gate: {shortage}")
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("merge_gate"):
        say(f"merge-gate: the package {quoted(error.name)} is missing")
        say("  install merge-gate again in an environment of its own")
    else:
        say(f"merge-gate: unexpected {type(error).__name__}: {error}")
        if not verbose and not os.environ.get(DEBUG):
            say(f"  this is a bug of merge-gate: please report it, with the traceback that {DEBUG}=1 prints")
            return ExitCode.ERROR
        say("  this is a bug of merge-gate: please report it, with this traceback:")
        say("".join(traceback.format_exception(error)).rstrip())  # raised, it would end with 1: an adapter failed
    return ExitCode.ERROR


def _stopped(stop: Interrupted, arguments: argparse.Namespace) -> int:
    """The exit code after a signal: no verdict, unless the whole report was on disk when it arrived."""
    from merge_gate.report.stored.stored_report import stored_if_any

    output = stop.output
    report = stored_if_any(output) if output else None
    if report is not None and report.complete:
        say(f"merge-gate: stopped by {stop.signal_name} after the last adapter; the report in {output} is complete")
        return exit_code(report)
    partial = f"; {Path(output, 'report.json')} holds what was judged until then" if report else ""
    say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict{partial}")
    if partial and arguments.command == "run":
        for after_stop in declared("after_stop"):
            say(f"  {after_stop(arguments)}")
    return ExitCode.ERROR
