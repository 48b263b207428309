"""Counts the words of the documents: README.md, the other files at the root, and docs/.

    .venv/bin/python -m tests.tools.words

A word has a letter or a digit. Generated tables do not count: the rows that a tool makes from code or data, between a
mark such as `<!-- checks (make schemas writes this table) -->` and its end.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = re.compile(r"^<!-- .*? -->\n.*?^<!-- (?:/.*?|end) -->$", re.MULTILINE | re.DOTALL)


def words(text: str) -> int:
    """The number of words, without the rows of generated tables."""
    own = GENERATED.sub(lambda match: re.sub(r"^\|.*$", "", match[0], flags=re.MULTILINE), text)
    return sum(re.search(r"\w", word) is not None for word in re.sub(r"<!--.*?-->", "", own).split())


def words_by_page() -> dict[str, int]:
    """The words of each page, by its path from the root."""
    pages = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
    return {page.relative_to(ROOT).as_posix(): words(page.read_text(encoding="utf-8")) for page in pages}


def main() -> None:
    """Print the words of each page, most first, and their sum."""
    counted = words_by_page()
    for page, count in sorted(counted.items(), key=lambda item: -item[1]):
        print(f"{count:7,}  {page}")
    print(f"{sum(counted.values()):7,}  in {len(counted)} pages")


if __name__ == "__main__":
    main()
