"""A directory of a model or of an export that is being written, and that has no name yet.

In: a directory and the name that the model will have. Out: `DIR/.NAME.partial`, locked, with the model's files in
`model/`. It gets its name whole, or is removed. The system ends the lock with the process, so that a later run removes
what a killed one left. Only the owner of the lock removes anything. The marker is the first file of the directory, and
the last to go.

The new model and an earlier one of that name are exchanged in one step. If the file system cannot do that, the earlier
one waits in `replaced/`, and gets its name back if the new one does not get it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.locked_directory import AlreadyLockedError, DirectoryLock, locked_directory
from merge_gate._internal.text import quoted
from merge_gate._internal.whole_file import sync_directory
from merge_gate.files.identity import directory_identity
from merge_gate.records.features import FEATURES, part
from merge_gate.records.files import FileIdentity
from merge_gate.report.formats.fields import UnreadableError

_ENDING = ".partial"
_MARKER = "written-by-merge-gate"
_MODEL, _REPLACED = "model", "replaced"
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2

_LOOK = "an exchange began: look at `model` before it is removed"
_ABANDONED = f"if there is no other run, move its `{_REPLACED}` (what had its name) back if it has one, and delete it"


def partial_name(name: str) -> str:
    """The name of the directory in which the model `name` is written."""
    return f".{name}{_ENDING}"


def waiting(place: Path) -> str:
    """The end of a hint: where an earlier model waits for its name, if it does in this partial directory."""
    earlier = place / _REPLACED
    return f"; what had its name is in {quoted(str(earlier), 200)}" if os.path.lexists(earlier) else ""


class PartialDirectory:
    """`.NAME.partial` next to the model's directory `target`, new and empty. What a killed run left there is removed.

    Raises:
        NotPublishedError: another run writes to it, or it holds files of someone else.
        OSError: it cannot be created.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._place = target, target.with_name(partial_name(target.name))
        self.model = self._place / _MODEL
        self._stack = contextlib.ExitStack()
        with self._stack:
            lock = self._lock()
            if not _is_leftover(self._place) or not _put_back(self._place):
                raise NotPublishedError(
                    f"{quoted(str(self._place), 200)} contains files that merge-gate did not write, or no longer knows",
                    hint="if no run is publishing there and you need none of its files, delete that directory; "
                    f"otherwise choose another one{waiting(self._place)}",
                )
            _clear(self._place)
            (self._place / _MARKER).touch(exist_ok=False)
            self._stack.callback(_remove_leftover, self._place, lock)  # called before the lock ends, and only once
            self.model.mkdir()
            self._stack = self._stack.pop_all()

    def _lock(self) -> DirectoryLock:
        while True:
            with contextlib.suppress(FileExistsError):  # not `exist_ok`: another run may remove it at this moment
                self._place.mkdir(parents=True)
            try:
                lock = self._stack.enter_context(locked_directory(self._place, follow=False))
            except FileNotFoundError:  # another run has just given it its name, or removed it
                continue
            except AlreadyLockedError:
                raise NotPublishedError(
                    f"another run of merge-gate is writing {quoted(str(self._target), 200)}",
                    hint="wait for it, or choose another directory",
                ) from None
            if not lock.is_held and os.listdir(self._place):  # noqa: PTH208 - names are all that is wanted
                raise NotPublishedError(
                    f"{quoted(str(self._place), 200)} exists, and its file system has no locks: another run may be "
                    "writing to it",
                    hint=_ABANDONED,
                )
            if _is_of(lock, self._place):
                return lock
            self._stack.close()

    def publish(self, *, replaces: tuple[FileIdentity, ...] | None) -> None:
        """Give the model its name. The directory that has the identity `replaces` is exchanged for it, and removed.

        Raises:
            NotPublishedError: something else has that name, and stays there.
            OSError: the directory cannot be renamed.
        """
        target = self._target
        if replaces is not None:
            _copy_modes(target, self.model)
        sync_directory(self.model)
        try:
            if replaces is None or self._take_away(target, replaces):
                _rename(self.model, target)
        except FileExistsError:
            raise _taken(target) from None
        sync_directory(target.parent)
        self.remove()

    def _take_away(self, target: Path, expected: tuple[FileIdentity, ...]) -> bool:
        """Exchange the two models, and look at what came out. If it is not the expected one, it goes back.

        Returns whether the new model still needs the name, because the file system cannot exchange directories.
        """
        marker, out = self._place / _MARKER, self.model
        marker.write_text(_LOOK)
        if not renameat2(self.model, target, _RENAME_EXCHANGE):
            out = target.rename(self._place / _REPLACED)
        is_other = out.is_symlink() or _content(out) != expected[1:]
        if is_other and out == self.model and not renameat2(out, target, _RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(target))
        marker.write_text("")
        if is_other:
            raise _taken(target)
        return out != self.model

    def remove(self) -> None:
        """Remove the directory, with all that was written, and end the lock. A second call does nothing."""
        self._stack.close()


def _is_of(lock: DirectoryLock, place: Path) -> bool:
    """Whether a lock is that of the directory which has the name now: another run may have made a new one."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.descriptor), place.stat(follow_symlinks=False))
    return False


def _copy_modes(earlier: Path, model: Path) -> None:
    """Give a model the permissions of the earlier one: of the directory, and of the files that both have."""
    for path in (earlier, *earlier.rglob("*")):
        with contextlib.suppress(OSError):  # a file that only the earlier one has
            shutil.copymode(path, model / path.relative_to(earlier), follow_symlinks=False)


def _is_leftover(place: Path) -> bool:
    """Whether a directory holds what a run of merge-gate writes into a partial directory, or nothing."""
    names = set(os.listdir(place))  # noqa: PTH208 - names are all that is wanted
    return not names or (_MARKER in names and names <= {_MARKER, _MODEL, _REPLACED})


def remove_leftovers(parent: Path) -> None:
    """Remove the partial directories of dead runs, and put back what they took away. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        places = [Path(entry.path) for entry in os.scandir(parent) if _is_partial(entry)]
        for place in places:
            with contextlib.suppress(OSError, AlreadyLockedError), locked_directory(place, follow=False) as lock:
                if lock.is_held:
                    _remove_leftover(place, lock)


def _is_partial(entry: os.DirEntry[str]) -> bool:
    is_named_so = entry.name.startswith(".") and entry.name.endswith(_ENDING)
    return is_named_so and entry.is_dir(follow_symlinks=False)


def _remove_leftover(place: Path, lock: DirectoryLock) -> None:
    with contextlib.suppress(OSError):
        if _is_of(lock, place) and _is_leftover(place) and _put_back(place):
            _clear(place)
            place.rmdir()


def _clear(place: Path) -> None:
    """The marker goes last, and stays with what cannot be removed: without it, no later run may remove the rest."""
    for name in (_MODEL, _REPLACED, _MARKER):
        _remove(place / name)
        if os.path.lexists(place / name):
            return


def _put_back(place: Path) -> bool:
    """Give an earlier model its name again if the new one did not get it. False if a user's files may be in `place`."""
    if os.path.lexists(place / _MODEL) and os.path.lexists(place / _REPLACED):
        try:
            _rename(place / _REPLACED, place.with_name(place.name.removeprefix(".").removesuffix(_ENDING)))
        except OSError:
            return False
    is_looked_at = not os.path.lexists(place / _MODEL) or not (place / _MARKER).stat().st_size
    return is_looked_at or any(
        unchanged(place / _MODEL, made_by=feature) is not None
        for feature, modules in FEATURES.items()
        if "directory" in modules
    )


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(directory.stat(follow_symlinks=False).st_mode):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            directory.unlink()


def unchanged(place: Path, *, weights: bool = True, made_by: str = "publish") -> tuple[FileIdentity, ...] | None:
    """The identity of an unchanged directory that a feature made; None for anything else.

    Without `weights`, only the sizes of a publication's weights count.
    """
    own = part(made_by, "directory")
    try:
        if place.is_symlink() or not (place / own.LISTING).is_file():
            return None  # before all of it is listed: it may be a whole disk
        identity = directory_identity(place)
        is_own = own.is_unchanged(place, weights=weights)
        return identity if is_own and directory_identity(place) == identity else None
    except (OSError, GateError, UnreadableError):
        return None


def _content(directory: Path) -> tuple[FileIdentity, ...]:
    """The identity of all that is in a directory. That of the directory itself changes with its name."""
    try:
        return directory_identity(directory)[1:]
    except OSError:
        return ()


def _taken(target: Path) -> NotPublishedError:
    return NotPublishedError(
        f"{quoted(str(target), 200)} appeared or changed during this run",
        hint="let only one program write to that directory",
    )


def _rename(source: Path, target: Path) -> None:
    """`os.rename` would replace an empty directory."""
    if renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):  # the file system cannot do that (NFS, old overlayfs)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def renameat2(source: Path, target: Path, flag: int) -> bool:
    """The system call of Linux 3.15. False if the file system does not know the flag."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(number, os.strerror(number), str(target))
