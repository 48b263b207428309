"""The report, taken out of a directory into which foreign code may have written.

In: that directory. Out: the report's files, copied into a directory that the foreign code never saw, and a sentence
for each file that was refused. Knows nothing of what the files say.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.claimed_directory import claimed_directory
from merge_gate.earlier_reports import EarlierReports, move_aside
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.regular_file import chunks, open_regular_file
from merge_gate.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS_BYTES = {one.name: one.limit_bytes for one in OUTPUT_FILES}
"""The files of a report and how large each may be."""


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[EarlierReports]:
    """Hold the directory of the report, made if absent, for one run. The reports of earlier runs are moved aside.

    Raises:
        UsageError: another run writes there, or a file that merge-gate did not write has the name of a report.
        OSError: the directory cannot be used.
    """
    target.mkdir(parents=True, exist_ok=True)
    with claimed_directory(target, chosen_by="`output`"):
        yield move_aside(target, chosen_by="`output`")


def take(source: Path, target: Path) -> list[str]:
    """Copy the files of a report from `source` to `target`, which is there; return what was refused and why."""
    refused = []
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name, limit in LIMITS_BYTES.items():
            try:
                _take(folder, name, limit, target)
            except FileNotFoundError:
                continue
            except OSError as error:
                refused.append(f"{name} was not taken from the report directory: {error.strerror}")
    finally:
        os.close(folder)
    return refused


def files(folder: Path) -> list[Path]:
    """Return the files of a report that are there: regular files under their names, no links."""
    paths = (folder / name for name in LIMITS_BYTES)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _take(folder: int, name: str, limit: int, target: Path) -> None:
    """A link at the target's name is replaced and not written through."""
    with open_regular_file(name, folder=folder) as file, whole_file(target / name) as copy:
        for chunk in chunks(file, limit):
            copy.write(chunk)


def remove_tree(folder: Path) -> None:
    """Remove a directory that foreign code has filled: with folders that no one may enter, or thousands deep.

    Those two tools follow no link on their way down, and need no stack as deep as the directory.
    """
    for words in (["chmod", "-R", "u+rwX", "--", str(folder)], ["rm", "-rf", "--", str(folder)]):
        with contextlib.suppress(OSError):
            subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True)
