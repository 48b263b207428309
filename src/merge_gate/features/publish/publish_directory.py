"""The directory that models are published to: what it may be, and what may be in it, before anything is merged.

In: names of directories. Out: the directory, empty or with unchanged models of earlier runs, or why it is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from merge_gate._internal.errors import GateError, NotPublishedError, UsageError
from merge_gate._internal.output_files import PUBLISH_WITHIN
from merge_gate._internal.text import has_hidden, quoted
from merge_gate.features.publish.partial import PartialDirectory, partial_name, remove_leftovers, unchanged, waiting
from merge_gate.records.files import MANIFEST_NAME, FileIdentity
from merge_gate.report.stored.output_directory import explained, made_directory

_CHOSEN_BY = " with --publish"
_MOST_NAME_BYTES = 255
_MIB, _GIB = 1 << 20, 1 << 30


def prepared(directory: str, names: Collection[str], made: contextlib.ExitStack, *, is_plan: bool) -> Path:
    """Create the directory, and remove what killed runs left in it. It must be in that of `PUBLISH_WITHIN`, if set.

    If it is empty in the end, `made` removes it. For a plan, nothing is created or removed.

    Raises:
        UsageError: the directory cannot be used, or one of the names cannot be a directory in it.
        GateError: the disk is full.
    """
    target, within = _without_link(directory), os.environ.get(PUBLISH_WITHIN)
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
        made.enter_context(made_directory(target, lambda folder: folder.mkdir(parents=True, exist_ok=True)))
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


def refuse_inputs(target: Path, inputs: Iterable[tuple[str, str]], models: Collection[Path] = ()) -> None:
    """Refuse to publish inside of an input, or to put a model in the place of one, or of a directory that holds one.

    `inputs` pairs directories and what they belong to.
    """
    for directory, owner in inputs:
        if not os.path.isdir(directory):  # noqa: PTH112 - a name with a zero byte is no directory
            continue
        own = Path(directory).resolve()
        weights = {path.resolve().parent for path in own.glob("*.safetensors")}  # a snapshot has links to its files
        if not {target, *target.parents}.isdisjoint({own, *weights}):
            raise UsageError(
                f"the directory to publish to, {quoted(str(target), 200)}, is inside {owner}",
                hint=f"choose a directory elsewhere{_CHOSEN_BY}",
            )
        for place in {own, *own.parents}.intersection(models):
            raise UsageError(
                f"{owner} is in {quoted(str(place), 200)}, and this run would publish a model there",
                hint=f"choose another directory{_CHOSEN_BY}",
            )


def refuse_small_disk(target: Path, needed_bytes: int, what: str, hint: str) -> None:
    """Refuse a disk that cannot hold so many bytes, by a `GateError`. `what` needs them."""
    with explained(f"cannot write to {quoted(str(target), 200)}", hint=hint):
        disk = os.statvfs(target)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < needed_bytes:
        raise GateError(
            f"{what} need {_size(needed_bytes)} in {quoted(str(target), 200)}, and {_size(free_bytes)} are free",
            hint=hint,
        )


def _size(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.1f} MiB"


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
            PartialDirectory(place).remove()
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
