"""Decides whether a name that comes from outside may become a path.

In: a name from a repository's listing, an index, a manifest, or a header. Out: whether it is safe. It uses only the
standard library.
"""

from __future__ import annotations

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A full commit of the Hub. huggingface_hub asks the server again for the commit of any other name."""

_MOST_BYTES = 255
"""What file systems allow in one part of a path."""


def is_inside(name: object) -> bool:
    """Whether a relative name stays inside of its directory, has one spelling only, and can be the name of a file."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    parts = name.encode("utf-8", "surrogatepass").split(b"/")
    return not {b"", b".", b".."} & set(parts) and max(map(len, parts)) <= _MOST_BYTES and name.isprintable()
