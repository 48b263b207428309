"""Copies the report out of a directory that foreign code may have written to.

Only files with the names of a report are copied. Links are not followed, pipes and devices are not read, and files
above their limit are refused. Each refused file is reported in a sentence.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate._internal.regular_file import chunks, open_regular_file
from merge_gate._internal.whole_file import whole_file

MAX_BYTES = {file.name: file.max_bytes for file in OUTPUT_FILES}
"""The files of a report, each with its largest size."""


def take(source: Path, target: Path) -> list[str]:
    """Copy the files of a report to `target`, which exists. Return a sentence for each refused file."""
    refused = []
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name, most in MAX_BYTES.items():
            try:
                _take(folder, name, most, target)
            except FileNotFoundError:
                continue
            except OSError as error:
                refused.append(f"{name} was not copied from the report directory: {error.strerror}")
    finally:
        os.close(folder)
    return refused


def files(folder: Path) -> list[Path]:
    """Return the files of a report that exist: regular files, no links."""
    paths = (folder / name for name in MAX_BYTES)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _take(folder: int, name: str, most: int, target: Path) -> None:
    """Copy one file. A link at the target's name is replaced, not followed."""
    with open_regular_file(name, folder=folder) as file, whole_file(target / name) as copy:
        for chunk in chunks(file, most):
            copy.write(chunk)


def remove_tree(folder: Path) -> None:
    """Remove a directory that foreign code has filled, perhaps with unreadable folders or thousands of levels.

    `chmod` and `rm` follow no links below the directory, and their stack does not grow with its depth.
    """
    for words in (["chmod", "-R", "u+rwX", "--", str(folder)], ["rm", "-rf", "--", str(folder)]):
        with contextlib.suppress(OSError):
            subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True)
