"""`merge-gate init`: write a first configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import IO

from merge_gate._internal.errors import ExitCode, UsageError
from merge_gate.cli.arguments import CommandParser, Commands, examples
from merge_gate.run.streams import tell


def add(commands: Commands[CommandParser]) -> None:
    init = commands.add_parser(
        "init",
        help="write a first config",
        description="Write a merge-gate.yml with comments to the current directory. It lists the adapters in DIR and "
        "up to four levels below it. An existing merge-gate.yml is not changed.",
        epilog=examples("merge-gate init ./adapters", "merge-gate init ./adapters --pin"),
    )
    init.add_argument(
        "--pin",
        action="store_true",
        help="also write the SHA-256 of each base that is a directory, so that no other base passes",
    )
    init.add_argument("directories", nargs="+", metavar="DIR", help="a directory with adapters")


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.config.init_file import first_config
    from merge_gate.files.fitting_bases import fits
    from merge_gate.files.preflight import base_of
    from merge_gate.files.resolve import base_weight_files, digest_directory
    from merge_gate.report.stored.output_directory import explained

    def digest_of(base: str) -> str:
        with explained(f"cannot read the base {base}", "check that it is complete"):
            return digest_directory(base, base_weight_files(base))

    text = first_config(arguments.directories, base_of, digest_of if arguments.pin else None, fits)
    path = Path("merge-gate.yml")
    with explained(f"cannot write {path}", chosen_by=""):
        try:
            with path.open("x", encoding="utf-8") as file:
                _write_or_remove(file, text, path)
        except FileExistsError:
            raise UsageError(f"{path} already exists, and was not changed", hint="remove it, or edit it") from None
    tell(f"{path} lists the adapters that were found. Review it, then run: merge-gate run {path}")
    return ExitCode.PASS


def _write_or_remove(file: IO[str], text: str, path: Path) -> None:
    """Half a config would keep the next `init` from writing a whole one."""
    try:
        file.write(text)
        file.flush()
    except OSError:
        path.unlink()
        raise
