"""Reads the files next to the weights of a base or an adapter that may be published.

In: a directory, which is hostile. Out: the bytes of the files whose names are on the allow-list, and the names of the
others. A link may lead to another file of the directory or of its own repository in the Hub's cache, and no further.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_gate.companion_names import TEMPLATES, companion_kind
from merge_gate.errors import NotPublishedError
from merge_gate.files.headers import shown
from merge_gate.records.terms import record
from merge_gate.regular_file import read_regular_file

_MOST_BYTES = 256 * 1024 * 1024
_POINTER = b"version https://git-lfs"


@record
class CompanionFiles:
    """The files of one directory. `others` are the names that are not on the allow-list, without hidden files."""

    files: dict[str, bytes]
    others: tuple[str, ...] = ()


def read_companions(directory: str, owner: str) -> CompanionFiles:
    """The files next to the weights. `owner` is what messages call the directory's owner, such as `the base`.

    Raises:
        NotPublishedError: a file on the allow-list cannot be read, is too large, is a Git LFS pointer, or is a link to
            another place.
    """
    folder = Path(directory)
    files: dict[str, bytes] = {}
    others: list[str] = []
    try:
        for name in _names(folder):
            if companion_kind(name) is None:
                others.append(name)
            else:
                files[name] = _read(folder, name, owner)
                if sum(map(len, files.values())) > _MOST_BYTES:
                    raise NotPublishedError(
                        f"the files next to the weights of {owner} have more than {_MOST_BYTES:,} bytes",
                        hint=f"remove what is not needed from {shown(directory)}",
                    )
    except OSError as error:
        raise NotPublishedError(
            f"the directory of {owner} cannot be read: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error
    return CompanionFiles(files=files, others=tuple(others))


def _names(folder: Path) -> list[str]:
    """The names in the directory, without hidden files, and those of the chat templates in their folder."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.name == TEMPLATES and entry.is_dir(follow_symlinks=False):
            names += [f"{TEMPLATES}/{template.name}" for template in os.scandir(entry.path)]
        else:
            names.append(entry.name + "/" * entry.is_dir())
    return sorted(names)


def _read(folder: Path, name: str, owner: str) -> bytes:
    what = f"{shown(name)} of {owner}"
    try:
        place = _within(folder, name, what)
        data = read_regular_file(place, _MOST_BYTES)
    except OSError as error:
        raise NotPublishedError(
            f"{what} cannot be read: {error.strerror or error}",
            hint="correct that file, or remove it if the model does not need it",
        ) from error
    if data.startswith(_POINTER):
        raise NotPublishedError(
            f"{what} is a Git LFS pointer, expected the file itself",
            hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
        )
    return data


def _within(folder: Path, name: str, what: str) -> Path:
    """The file itself, if a link leads to it. The Hub's cache links from a snapshot to the repository's blobs."""
    top = folder.resolve()
    place = (top / name).resolve(strict=True)
    is_blob = top.parent.name == "snapshots" and top.parent.parent / "blobs" in place.parents
    is_companion = top in place.parents and companion_kind(place.relative_to(top).as_posix()) is not None
    if not is_blob and not is_companion:
        raise NotPublishedError(
            f"{what} is a link to {shown(str(place))}, expected such a file of its directory",
            hint="replace the link by a copy of the file: what a link leads to might not be meant for publication",
        )
    return place
