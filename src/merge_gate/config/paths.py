"""A name as written in the configuration → a directory, several directories, or a Hub id.

In: the text, and the directory that relative paths start from. Out: absolute directories or a Hub id, or `Unusable`.
Looks at which directories exist, never into an adapter or a base. A name that reads as a path is never taken for a
Hub id: a mistyped directory must not become a download from whoever owns that name on the Hub.
"""

# os.path says False where pathlib raises (a name too long), and keeps ./ as written:
# ruff: noqa: PTH110, PTH111, PTH112, PTH114, PTH115, PTH118, PTH207

from __future__ import annotations

import glob
import os
import re
from functools import partial
from itertools import takewhile
from pathlib import Path

from merge_gate.config.suggestions import nearest
from merge_gate.text import listing, quoted


class Unusable(Exception):  # noqa: N818 (not an error of the program: it carries a problem to where its place is known)
    """A name that stands for nothing. Carries the problem's message and hint."""


_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_PART}/)?{_PART}")
_PATH_LIKE = re.compile(r"\.{1,2}(?:$|[/\\])|[/~\\]|[A-Za-z]:[/\\]")
_GLOB = re.compile(r"[*?\[]")


def is_glob(written: str, directory: Path) -> bool:
    """Say whether the text is a pattern. A directory that has just this name is no pattern."""
    return bool(_GLOB.search(written)) and not os.path.isdir(_absolute(written, directory))


Found = tuple[str, str | None, str | None]
"""The text that names an adapter or a base, and its absolute directory or its Hub id."""


def find_all(written: str, directory: Path, *, on_hub: bool, is_base: bool) -> list[Found]:
    """Return what `written` stands for: one for each directory that a glob matches, sorted, or the one that it names.

    Args:
        written: the text in the file; of a base it is no glob.
        directory: where relative paths start.
        on_hub: a revision is given, so that a name beside an existing directory (`acme/` is here, `acme/billing` is
            not) still reads as a Hub id.
        is_base: a Hub id may be a bare name (`gpt2`); otherwise it must be `owner/name`.

    Raises:
        Unusable: nothing.
    """
    if is_base or not is_glob(written, directory):
        return [_find(written, directory, on_hub=on_hub, is_base=is_base)]
    if "**" in written:
        raise Unusable(f'{quoted(written)}: "**" is not supported', "write one * for each level")
    matches = sorted(glob.glob(os.path.expanduser(written), root_dir=directory))
    found = [match for match in matches if os.path.isdir(directory / match)]
    if not found:
        files = " (only files)" if matches else ""
        hint = partial(_siblings, _literal_part(written, directory))
        raise Unusable(f"no directory matches {quoted(written)}{files}", hint)
    return [(name, os.path.normpath(directory / name), None) for name in found]


def _find(written: str, directory: Path, *, on_hub: bool, is_base: bool) -> Found:
    place = _absolute(written, directory)
    if os.path.isdir(place):
        return written, os.path.normpath(place), None
    if os.path.exists(place):
        raise Unusable(f"{quoted(written)} is a file, expected a directory", "name the directory that holds it")
    path_like = bool(_PATH_LIKE.match(written))
    first = written.split("/", 1)[0]
    beside = not path_like and not on_hub and "/" in written and os.path.isdir(directory / first)
    could_be_hub = could_be_hub_id(written, is_base=is_base)
    if os.path.islink(place.rstrip("/")) and not (could_be_hub and on_hub):
        to = quoted(os.readlink(place.rstrip("/")), 200)
        raise Unusable(
            f"{quoted(written)} is a link to {to}, which is not there", "mend the link, or name the directory"
        )
    if could_be_hub and not beside:
        return written, None, written
    if "://" in written:
        raise Unusable(f"{quoted(written)} is a URL, expected a directory or a Hub id", "a Hub id is just owner/name")
    more = "a Hub id looks like owner/name" if not path_like and not beside else ""
    if beside and could_be_hub:
        more = f"{quoted(first)} is a directory here, so this reads as a path; to mean the Hub, give a revision"
        more += " (in a config)"
    hint = (not beside and _other_spelling(written)) or partial(_siblings, Path(place).parent, written, more)
    raise Unusable(f"no such directory: {quoted(written)}", hint)


def _other_spelling(written: str) -> str:
    """What a name means that is written as a shell, another tool or another system would have it."""
    if "$" in written:
        return "variables are not replaced in a name: write it out"
    if "\\" in written and not re.match(r"[A-Za-z]:", written):
        return "paths are written with /"
    hub_id, at, revision = written.partition("@")
    if at and could_be_hub_id(hub_id, is_base=False):
        return f"a revision stands under a key of its own, in a config: revision: {quoted(revision)}"
    return ""


def could_be_hub_id(written: str, *, is_base: bool) -> bool:
    """Say whether a name may be one of the Hub's, by its letters alone. That of a base may be bare (`gpt2`)."""
    has_owner = "/" in written
    return bool(_HUB_ID.fullmatch(written)) and (has_owner or is_base) and not _PATH_LIKE.match(written)


def _absolute(written: str, directory: Path) -> str:
    on_disk = os.fsdecode(written.encode("utf-8", "surrogateescape"))  # in a locale without UTF-8, another string
    return os.path.join(directory, os.path.expanduser(on_disk))


def _siblings(parent: Path, written: str = "", more: str = "") -> str:
    """Say what is there instead: the name that was perhaps meant, written as the other was, or all. Then `more`."""
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())[:200]
    except PermissionError as error:
        there = f"{quoted(str(error.filename))} may not be read"
    except (OSError, ValueError):
        there = f"there is no directory {quoted(str(parent))} either"
    else:
        head, slash, tail = written.rstrip("/").rpartition("/")
        near = nearest(tail, names, before=head + slash) if tail else ""
        there = near or f"{quoted(str(parent))} holds {listing(quoted(n) for n in names) or 'no directories'}"
    return f"{there}; {more}" if more else there


def _literal_part(pattern: str, directory: Path) -> Path:
    """Return the deepest directory that a pattern names without a wildcard."""
    parts = Path(os.path.expanduser(pattern)).parts[:-1]
    return directory.joinpath(*takewhile(lambda part: not _GLOB.search(part), parts))
