"""Resolves a name in a configuration to absolute directories or a Hub id, or raises `InvalidName`.

It checks which directories exist and never looks into an adapter or a base. A name that looks like a path, or is close
to one here (hub_names.py), is no Hub id: a mistyped directory must not become a download of a stranger's repository.
"""

# os.path returns False if pathlib raises (a name too long), and keeps ./ as written:
# ruff: noqa: PTH110, PTH111, PTH112, PTH114, PTH115, PTH118, PTH121, PTH207

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path

from merge_gate._internal.earlier_reports import PREVIOUS, REPORTS, is_own
from merge_gate._internal.text import listing, quoted
from merge_gate.names.hub_names import HUB, close_directory, could_be_hub_id
from merge_gate.names.suggestions import nearest
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME


class InvalidName(Exception):  # noqa: N818 (not an error of the program: the caller adds its place)
    """A name that cannot be resolved. Carries the problem's message and hint, which may be made when it is shown."""


_PATH_LIKE = re.compile(r"\.{1,2}(?:$|[/\\])|[/~\\]|[A-Za-z]:[/\\]")
_GLOB = re.compile(r"[*?\[]")
_SPELLINGS = (
    (re.compile(r"\$"), "variables in names are not expanded: write the full name"),
    (re.compile(r"://"), "a URL is no name: write a Hub id as owner/name"),
    (re.compile(r"^(?![A-Za-z]:).*\\"), "write paths with /"),
    (re.compile(r"^[^./][^/]*/[^/]+@"), "give the revision under its own key, in a configuration file"),
)
"""The hint for a name that is written as for a shell, another tool, or another system."""


def is_glob(written: str, directory: Path) -> bool:
    """Whether the text is a pattern. If a directory has exactly this name, it is not a pattern."""
    return (
        bool(_GLOB.search(written)) and not written.startswith(HUB) and not os.path.isdir(_absolute(written, directory))
    )


ResolvedName = tuple[str, str | None, str | None]
"""A name of an adapter or a base, and its absolute directory or its Hub id."""


def resolve_name(
    written: str, directory: Path, *, on_hub: bool, is_base: bool, output: str | None = None
) -> list[ResolvedName]:
    """Resolve `written`: to each directory that a glob matches, sorted, or to the one directory or Hub id.

    Args:
        written: the text in the file. The name of a base is never a glob.
        directory: the start of relative paths.
        on_hub: a revision is given. Then `acme/billing` is a Hub id even if it is close to a directory here.
        is_base: a Hub id may be a bare name (`gpt2`). Otherwise it must be `owner/name`.
        output: the output directory of this run. A glob skips it, and directories with reports of earlier runs.

    Raises:
        InvalidName: no directory and no Hub id has this name.
    """
    if is_base or not is_glob(written, directory):
        return [_resolve_exact(written, directory, on_hub=on_hub, is_base=is_base)]
    if "**" in written:
        raise InvalidName(f'{quoted(written)}: "**" is not supported', "write one * for each level")
    matches = sorted(glob.glob(os.path.expanduser(written), root_dir=directory))
    folders = [match for match in matches if os.path.isdir(directory / match)]
    directories = [match for match in folders if not _is_for_reports(directory / match, output)]
    if not directories:
        files = " (only files)" if matches else ""
        files = " (only directories with reports)" if folders else files
        hint = partial(suggest_name, _literal_part(written, directory))
        raise InvalidName(f"no directory matches {quoted(written)}{files}", hint)
    return [(name, os.path.normpath(directory / name), None) for name in directories]


def _is_for_reports(place: Path, output: str | None) -> bool:
    """Whether a directory is where a run writes or wrote its reports, and holds no file of an adapter."""
    if any(os.path.lexists(place / name) for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)):
        return False
    with suppress(OSError, ValueError):  # the output directory does not exist yet, or cannot
        if output is not None and os.path.samefile(place, output):
            return True
    return any(is_own(folder / name) for folder in (place, place / PREVIOUS) for name in REPORTS)


def _resolve_exact(written: str, directory: Path, *, on_hub: bool, is_base: bool) -> ResolvedName:
    if written.startswith(HUB):
        hub_id = written.removeprefix(HUB)
        if not could_be_hub_id(hub_id, is_base=is_base):
            raise InvalidName(f"{quoted(written)} is no Hub id", f"write it as {HUB}owner/name")
        return hub_id, None, hub_id
    place = _absolute(written, directory)
    if os.path.isdir(place):
        return written, os.path.normpath(place), None
    if os.path.exists(place):
        raise InvalidName(f"{quoted(written)} is a file, expected a directory", "name the directory that holds it")
    could_be_hub = could_be_hub_id(written, is_base=is_base)
    if os.path.islink(place.rstrip("/")) and not (could_be_hub and on_hub):
        target = quoted(os.readlink(place.rstrip("/")), 200)
        raise InvalidName(
            f"{quoted(written)} is a broken symbolic link to {target}", "fix the link, or name the directory"
        )
    close = close_directory(written, directory, is_base=is_base) if could_be_hub and not on_hub else ""
    if could_be_hub and not close:
        return written, None, written
    hint: str | Callable[[], str] = next((hint for pattern, hint in _SPELLINGS if pattern.search(written)), "")
    if close:
        hint = partial(_suggest_close, written, directory, close, "" if is_base else " or add a revision (--revision)")
    elif not hint:
        more = "" if _PATH_LIKE.match(written) else "; a Hub id looks like owner/name"
        hint = partial(suggest_name, Path(place).parent, written, more=more)
    raise InvalidName(f"no such directory: {quoted(written)}", hint)


def _suggest_close(written: str, directory: Path, close: str, or_so: str) -> str:
    """Suggest close names in this directory. If no name is close, list the directory."""
    is_part = close.endswith("/") and os.path.isdir(directory / close)
    here = f"{suggest_name(directory / close)}; if" if is_part else f"did you mean {quoted(close)}? If"
    return f"{here} it is on the Hub, write {quoted(HUB + written)}{or_so}"


def _absolute(written: str, directory: Path) -> str:
    on_disk = os.fsdecode(written.encode("utf-8", "surrogateescape"))  # in a locale without UTF-8, another string
    return os.path.join(directory, os.path.expanduser(on_disk))


def suggest_name(
    parent: Path,
    written: str = "",
    what: str = "directory",
    is_wanted: Callable[[os.DirEntry[str]], bool] = os.DirEntry.is_dir,
    more: str = "",
) -> str:
    """Name the entry of `parent` that the user may have meant, or all of its entries; then `more`."""
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if is_wanted(entry))[:200]
    except PermissionError as error:
        return f"{quoted(str(error.filename))} may not be read{more}"
    except (OSError, ValueError):
        return f"the directory {quoted(str(parent))} does not exist either{more}"
    head, slash, tail = written.rstrip("/").rpartition("/")
    near = nearest(tail, names, before=head + slash) if tail else ""
    return (near or f"{quoted(str(parent))} holds {listing(map(quoted, names)) or f'no {what}'}") + more


def _literal_part(pattern: str, directory: Path) -> Path:
    """Return the deepest directory that a pattern names without a wildcard."""
    parts = Path(os.path.expanduser(pattern)).parts[:-1]
    return directory.joinpath(*takewhile(lambda part: not _GLOB.search(part), parts))
