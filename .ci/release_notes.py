# ruff: noqa: INP001 # a script, not a package
"""Print the notes of a release: the section of CHANGELOG.md about its version.

    python3 .ci/release_notes.py 1.0.0 https://github.com/acme/merge-gate > notes.md

In: the version and the repository's address. Out: the section without its heading, its links to files as absolute
links to the version's tag. A version without a section, or with a section that has no date yet, ends with an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def notes(changelog: str, version: str, repository: str) -> str:
    """Return the text about `version`; `repository` is an address such as https://github.com/acme/merge-gate."""
    expected = f"## {version} - YYYY-MM-DD"
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading.split(" ")[0] != version:
            continue
        if not DATE.fullmatch(heading.removeprefix(f"{version} - ")):
            raise SystemExit(f"CHANGELOG.md: got '## {heading}', expected '{expected}'")
        files = f"{repository.rstrip('/')}/blob/v{version}/"
        return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", rf"]({files}\1)", text.strip()) + "\n"
    raise SystemExit(f"CHANGELOG.md has no section '{expected}'")


if __name__ == "__main__":
    sys.stdout.write(notes(CHANGELOG.read_text(encoding="utf-8"), *sys.argv[1:]))
