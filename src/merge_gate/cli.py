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
import traceback
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from merge_gate.command_line import DEFAULT_OUTPUT, output_of, parsed
from merge_gate.errors import LACKING, ConfigError, ExitCode, GateError, UsageError
from merge_gate.interrupts import Interrupted, interruptible
from merge_gate.report.streams import flush_streams, mend_streams, say, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from merge_gate.cache.keeper import Keeping
    from merge_gate.earlier_reports import EarlierReports
    from merge_gate.engine.process import WorkerProcess
    from merge_gate.records.config import Config
    from merge_gate.records.report import Report


_EXIT_CODE = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves here but argparse's SystemExit."""
    mend_streams()
    try:
        with interruptible(time_limit_s=None):
            return _obey(_parsed(sys.argv[1:] if argv is None else argv))
    except Interrupted as stop:  # before or after the command itself
        say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict")
        return ExitCode.ERROR
    finally:
        flush_streams()


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. If it is wrong, an earlier report must not pass for the report of the run that was meant."""
    try:
        return parsed(argv)
    except SystemExit as leaving:
        output = output_of(argv) if leaving.code == ExitCode.USAGE else None
        if output is not None and Path(output).is_dir():
            with suppress(GateError), _claimed(output):
                pass
        raise


@contextmanager
def _claimed(output: str) -> Iterator[EarlierReports]:
    """Hold the output directory; at the end, say where the reports of earlier runs are."""
    from merge_gate.report.directory import claimed

    with claimed(output) as earlier:
        try:
            yield earlier
        finally:
            _say_place(earlier)


def _say_place(earlier: EarlierReports) -> None:
    if earlier.line:
        say(f"merge-gate: {earlier.line}")


def _obey(arguments: argparse.Namespace) -> int:
    try:
        return int(_COMMANDS[arguments.command](arguments))
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
        if isinstance(error, OSError) and (lacking := LACKING.get(error.errno or 0)):
            say(f"merge-gate: {lacking}")
            return ExitCode.ERROR
        say(f"merge-gate: unexpected {type(error).__name__}: {error}")
        say("  this is a bug of merge-gate; run again with MERGE_GATE_DEBUG=1 for the details, and please report it")
        if os.environ.get("MERGE_GATE_DEBUG"):
            say(traceback.format_exc().rstrip())  # raised, it would end with 1: an adapter failed
        return ExitCode.ERROR


def _stopped(stop: Interrupted, arguments: argparse.Namespace) -> int:
    """What a signal has left: no verdict, unless the whole report was on disk when it arrived."""
    from merge_gate.report.directory import written

    output = getattr(arguments, "output", None)
    report = written(output) if output else None
    if report is not None and report.complete:
        say(f"merge-gate: stopped by {stop.signal_name} after the last adapter; the report in {output} is complete")
        return _EXIT_CODE[report.result]
    held = f"; {Path(output, 'report.json')} holds what was judged until then" if output and report else ""
    say(f"merge-gate: stopped by {stop.signal_name}, so there is no verdict{held}")
    if held and arguments.command == "run" and not arguments.container:
        say("  to go on from there: the same command with --resume")
    return ExitCode.ERROR


# --- the commands --------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    with _started_early(arguments) as child:
        from merge_gate.cache.resume import forget
        from merge_gate.report.directory import refuse_report
        from merge_gate.report.files import FORMATS

        refuse_report(arguments.output, FORMATS, arguments.names)
        if arguments.container:
            return _run_in_container(arguments)
        with _claimed(arguments.output) as earlier:
            config = _config(arguments)
            if arguments.image or arguments.gpus != "auto":
                hint = "add --container, or use --device"
                raise UsageError("--image and --gpus belong to --container", hint=hint)
            keeping = _keeping(arguments)

            def begins() -> None:
                if keeping.left is not None:
                    keeping.left.keep(arguments.output)
                earlier.replace_previous()

            report = _gate(
                config,
                arguments.device,
                arguments.output,
                tuple(arguments.only),
                quick=arguments.quick,
                shard=_shard(arguments),
                keeping=keeping,
                ray=_ray(arguments),
                child=child,
                begins=begins,
            )
            forget(arguments.output)
            return exit_code(report)


def _started_early(arguments: argparse.Namespace) -> AbstractContextManager[WorkerProcess | None]:
    """The worker, so that it imports while the config is read; leaving ends it, whatever became of the run.

    With verdicts to take over there may be nothing to merge: on one core it would only be in the way of finding out.
    """
    from merge_gate.engine.process import WorkerProcess

    looks_back = arguments.resume or (arguments.cache and not arguments.no_cache)
    if arguments.container or arguments.ray is not None or (looks_back and len(os.sched_getaffinity(0)) == 1):
        return nullcontext()
    try:
        return WorkerProcess()
    except (GateError, OSError):
        return nullcontext()  # once there is something to merge, it is tried again, and said


def _config(arguments: argparse.Namespace) -> Config:
    """The file's, or that of the adapters that are named on the command line."""
    from merge_gate.config.direct import config_of, names_a_file
    from merge_gate.config.load import load_config

    options = {name: getattr(arguments, name, None) for name in ("base", "dtype", "quantization")}
    if names_a_file(arguments.names):
        given = [f"--{name}" for name, value in options.items() if value]
        if given:
            raise UsageError(f"{given[0]} is for adapters that are named here", hint="write it into the config instead")
        return load_config(arguments.names[0])
    if getattr(arguments, "container", False):
        raise UsageError("--container needs a config", hint="write one with: merge-gate init DIR")
    dtypes = [word.strip() for word in (options["dtype"] or "").split(",") if word.strip()]
    return config_of(arguments.names, base=options["base"], dtypes=dtypes, quantization=options["quantization"])


def _run_in_container(arguments: argparse.Namespace) -> int:
    """Run in a container. The launcher holds the output directory itself, so it is held only shortly here."""
    from merge_gate.report.directory import claimed

    with claimed(arguments.output) as earlier:
        pass
    try:
        return _in_container(arguments)
    finally:
        if os.path.lexists(Path(arguments.output, "report.json")):
            earlier.replace_previous()
        _say_place(earlier)


def _in_container(arguments: argparse.Namespace) -> int:
    from merge_gate.action.docker.launcher import for_a_person, run_in_container

    _config(arguments)
    if arguments.resume:
        raise UsageError(
            "--resume is for a run that is not in a container", hint="give both runs a --cache: it does the same"
        )
    if arguments.ray is not None:
        raise UsageError("--ray is for a run that is not in a container", hint="leave --container away")
    more = [word for name in arguments.only for word in ("--only", name)]
    more += [option for option, asked in (("--quick", arguments.quick), ("--no-cache", arguments.no_cache)) if asked]
    if shard := _shard(arguments):
        more += ["--shard", "{}/{}".format(*shard)]
    run = for_a_person(
        arguments.names[0],
        output=arguments.output,
        device=arguments.device,
        arguments=more,
        image=arguments.image,
        gpus=arguments.gpus,
        cache=arguments.cache,
        environ=os.environ,
    )

    def write(log: bytes) -> None:
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()

    return run_in_container(run, write)


def _keeping(arguments: argparse.Namespace) -> Keeping:
    """Which verdicts of earlier runs count, and where those of this one are kept."""
    from merge_gate.cache.keeper import Keeping
    from merge_gate.cache.resume import left_in

    if arguments.resume and arguments.no_cache:
        raise UsageError("--no-cache judges anew, and --resume does not", hint="give one of them")
    left = left_in(arguments.output) if arguments.resume else None
    return Keeping(cache=arguments.cache, fresh=arguments.no_cache, left=left)


def _shard(arguments: argparse.Namespace) -> tuple[int, int] | None:
    from merge_gate.shards.partition import shard_of

    return shard_of(arguments.shard, os.environ) if arguments.shard is not None else None


def _ray(arguments: argparse.Namespace) -> str | None:
    from merge_gate.on_ray.ray_cluster import checked_address

    return checked_address(arguments.ray) if arguments.ray is not None else None


def _gate(
    config: Config,
    device: str,
    output: str | None,
    only: tuple[str, ...] = (),
    *,
    quick: bool = False,
    shard: tuple[int, int] | None = None,
    keeping: Keeping | None = None,
    ray: str | None = None,
    child: WorkerProcess | None = None,
    begins: Callable[[], object] = lambda: None,
) -> Report:
    from merge_gate.cache.keeper import NOTHING
    from merge_gate.gate import run_gate
    from merge_gate.report.terminal import make_view

    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        return run_gate(
            config,
            device=device,
            output=output,
            view=view,
            only=only,
            quick=quick,
            shard=shard,
            keeping=keeping or NOTHING,
            ray=ray,
            child=child,
            begins=begins,
        )


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return _EXIT_CODE[report.result.value]


def _check(arguments: argparse.Namespace) -> int:
    from merge_gate.gate import check_files
    from merge_gate.records.terms import Verdict
    from merge_gate.report.terminal import make_view
    from merge_gate.report.text import files_told
    from merge_gate.report.words import counted

    config = _config(arguments)
    counts = dict.fromkeys(Verdict, 0)
    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        for adapter in check_files(config, view=view, only=tuple(arguments.only)):
            counts[adapter.verdict] += 1
            for line in files_told(adapter, of=len(config.adapters)):
                tell(line)
    tell(
        f"{counted(sum(counts.values()), 'adapter')}: the files of {counts[Verdict.PASSED]:,} are sound, "
        f"{counts[Verdict.FAILED]:,} failed, {counts[Verdict.ERROR]:,} could not be judged. Nothing was merged: "
        "`merge-gate run` does that."
    )
    if counts[Verdict.FAILED]:
        return ExitCode.FAIL
    return ExitCode.ERROR if counts[Verdict.ERROR] else ExitCode.PASS


def _init(arguments: argparse.Namespace) -> int:
    from merge_gate.config.first import first_config
    from merge_gate.report.directory import explained
    from merge_gate.sources.preflight import base_of

    text, path = first_config(arguments.directories, base_of), Path("merge-gate.yml")
    with explained(f"cannot write {path}", chosen_by=""):
        try:
            with path.open("x", encoding="utf-8") as file:
                _write_or_remove(file, text, path)
        except FileExistsError:
            raise UsageError(f"{path} is there already, and stays as it is", hint="remove it, or edit it") from None
    tell(f"{path} lists what lies there. Look it over, then: merge-gate run {path}")
    return ExitCode.PASS


def _write_or_remove(file: IO[str], text: str, path: Path) -> None:
    """Half a config would keep the next `init` from writing a whole one."""
    try:
        file.write(text)
        file.flush()
    except OSError:
        path.unlink()
        raise


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        _run_demo(arguments.directory, Path(arguments.directory, DEFAULT_OUTPUT))
        tell(f"Its files are yours to play with: merge-gate run {Path(arguments.directory, 'merge-gate.yml')}")
    else:
        with tempfile.TemporaryDirectory(prefix="merge-gate-demo-") as directory:
            _run_demo(directory, None)
        tell("To keep the files and the report, name a new directory: merge-gate demo DIR")
    return ExitCode.PASS


def _run_demo(directory: str, output: Path | None) -> None:
    from merge_gate.config.load import load_config
    from merge_gate.demo import make_demo, misjudged

    config = load_config(make_demo(directory))
    if output is None:
        report = _gate(config, "cpu", None)
    else:
        with _claimed(str(output)) as earlier:
            report = _gate(config, "cpu", str(output), begins=earlier.replace_previous)
    if wrong := misjudged(report):
        raise GateError(
            f"the gate did not judge the demo as it should: {', '.join(wrong)}",
            hint="this installation of merge-gate cannot be trusted; please report this, with the output of `pip list`",
        )
    tell(
        f"\nThe gate judged all {len(report.adapters)} entries of the demo as it should. Its own exit code is "
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


def _report_combine(arguments: argparse.Namespace) -> int:
    """The shards are read before earlier reports in the output directory are moved aside."""
    from merge_gate.report.files import write_report
    from merge_gate.report.terminal import make_view
    from merge_gate.shards.combined import combined
    from merge_gate.shards.shard_files import found_in, refuse_overwriting

    found = found_in(arguments.directories)
    refuse_overwriting(found, arguments.output)
    with _claimed(arguments.output) as earlier:
        report = combined(found)
        earlier.replace_previous()
        with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
            write_report(report, arguments.output)
            view.finish(report, arguments.output)
    return exit_code(report)


def _report_baseline(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from merge_gate.report.baseline import render
    from merge_gate.report.stored import stored

    return _print(render(stored(arguments.report), datetime.now(UTC).date()))


def _print(text: str, code: ExitCode = ExitCode.PASS) -> ExitCode:
    """Write a document, as UTF-8 whatever the locale is. It is all the output there is, so an error is one."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    except OSError as error:
        raise GateError(f"standard output cannot be written to: {error.strerror}") from error
    return code


_COMMANDS = {
    "run": _run,
    "check": _check,
    "init": _init,
    "demo": _demo,
    "report": _report,
    "report combine": _report_combine,
    "report baseline": _report_baseline,
    "schema": _schema,
}
