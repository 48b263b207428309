"""Checks the directory that models are published to, before anything is merged.

In: the directory, the names that the models will have, and the directories of bases and adapters. Out: the directory,
created, or a sentence that says why it cannot be used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from merge_gate.errors import GateError, NotPublishedError, UsageError
from merge_gate.output_files import PUBLISH_WITHIN
from merge_gate.publish.manifest import MANIFEST_NAME
from merge_gate.publish.partial import PartialDirectory, partial_name, remove_leftovers, unchanged, waiting
from merge_gate.records.files import FileIdentity
from merge_gate.report.stored.output_directory import explained
from merge_gate.text import has_hidden, quoted

_CHOSEN_BY = " with --publish"
_MOST_NAME_BYTES = 255
_GIB = 1 << 30


def prepared(directory: str, names: Collection[str], within: str | None = None, *, is_plan: bool = False) -> Path:
    """Create the directory, and remove what killed runs left in it. With `within`, it must be in that directory.

    For a plan, nothing is created or removed.

    Raises:
        UsageError: the directory cannot be used, or one of the names cannot be a directory in it.
        GateError: the disk is full.
    """
    target = _without_link(directory)
    if within and not target.is_relative_to(Path(within).resolve()):
        raise UsageError(
            f"cannot publish to {quoted(directory, 200)}: it is outside of {quoted(within, 200)} ({PUBLISH_WITHIN})",
            hint=f"choose a directory inside of it{_CHOSEN_BY}",
        )
    for name in names:
        _refuse_name(name)
    if is_plan:
        return target
    with explained(f"cannot publish to {quoted(directory, 200)}", chosen_by=_CHOSEN_BY):
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK | os.X_OK):
            raise UsageError(
                f"cannot publish to {quoted(directory, 200)}: it is not writable",
                hint=f"choose a directory that you may write to{_CHOSEN_BY}",
            )
        remove_leftovers(target)
        for name in names:
            _refuse_existing(target, name)
    return target


def _without_link(directory: str) -> Path:
    """The directory, resolved. It may not be a link, and nothing between it and the current directory may be one."""
    place, here = Path(directory).absolute(), Path.cwd()
    for part in (place, *place.parents):
        if part.is_symlink() and (part == place or part.is_relative_to(here)):
            raise UsageError(
                f"cannot publish to {quoted(directory, 200)}: {quoted(str(part), 200)} is a symbolic link, expected a "
                "directory",
                hint=f"remove the link, or name the directory that it points to{_CHOSEN_BY}",
            )
    return place.resolve()


def refuse_inside(target: Path, inputs: Iterable[tuple[str, str]]) -> None:
    """Refuse a directory that is an input, or is inside one. `inputs` pairs directories and what they belong to."""
    for directory, owner in inputs:
        if not os.path.isdir(directory):  # noqa: PTH112 - a name with a zero byte is no directory
            continue
        own = Path(directory).resolve()
        weights = {path.resolve().parent for path in own.glob("*.safetensors")}  # a snapshot has links to its files
        if any(target == place or place in target.parents for place in {own, *weights}):
            raise UsageError(
                f"the directory to publish to, {quoted(str(target), 200)}, is inside {owner}",
                hint=f"choose a directory elsewhere{_CHOSEN_BY}",
            )


def refuse_over(places: Iterable[Path], inputs: Iterable[tuple[str, str]]) -> None:
    """Refuse to publish a model in the place of an input, or of a directory that holds one."""
    owners = [(Path(directory).resolve(), owner) for directory, owner in inputs if os.path.isdir(directory)]  # noqa: PTH112 - as above
    for place in places:
        for directory, owner in owners:
            if place == directory or place in directory.parents:
                raise UsageError(
                    f"{owner} is in {quoted(str(place), 200)}, and this run would publish a model there",
                    hint=f"choose another directory{_CHOSEN_BY}",
                )


def refuse_small_disk(target: Path, needed_bytes: int) -> None:
    """Refuse a disk that cannot hold the models, by a `GateError`."""
    with explained(f"cannot publish to {quoted(str(target), 200)}", chosen_by=_CHOSEN_BY):
        disk = os.statvfs(target)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < needed_bytes:
        raise GateError(
            f"the models to publish need {needed_bytes / _GIB:,.1f} GiB in {quoted(str(target), 200)}, and "
            f"{free_bytes / _GIB:,.1f} GiB are free",
            hint="free some space, choose another disk with --publish, or publish fewer adapters with --only",
        )


def _refuse_name(name: str) -> None:
    bad = "/" in name or has_hidden(name) or name.startswith(".") or name != name.strip()
    if bad or len(os.fsencode(partial_name(name))) > _MOST_NAME_BYTES:
        raise UsageError(
            f"a model cannot be published as {quoted(name, 200)}, which is not a valid directory name",
            hint='give the adapter a "name" of at most 200 bytes, without / and without a dot at its start',
        )


def _refuse_existing(target: Path, name: str) -> None:
    place = target / name
    if os.path.lexists(place) and not unchanged(place, weights=False):
        raise _changed(UsageError, place)
    if os.path.lexists(target / partial_name(name)):
        try:
            PartialDirectory(target, name).remove()
        except NotPublishedError as error:
            raise UsageError(error.message, hint=error.hint) from error


def replaceable(place: Path, notify: Callable[[str], None]) -> tuple[FileIdentity, ...] | None:
    """The identity of the earlier model in a directory; None if there is none. Every byte must be as published."""
    if not os.path.lexists(place):
        return None
    notify(f"{place} is compared with its {MANIFEST_NAME} before it is replaced")
    if (identity := unchanged(place)) is None:
        raise _changed(NotPublishedError, place)
    return identity


def _changed(kind: type[GateError], place: Path) -> GateError:
    return kind(
        f"{quoted(str(place), 200)} exists, and is not an unchanged directory that merge-gate published",
        hint=f"move it away, or choose another directory{_CHOSEN_BY}; `merge-gate verify` names the files that differ"
        + waiting(place.with_name(partial_name(place.name))),
    )
