"""Holds the project's prose to plain American English: documents, the action, docstrings, and messages.

The rules are in `tests/language/rules.toml`, each with its reason. `tests/language/exempt.txt` lists the files that do
not follow them yet. A listed file that follows the rules must leave the list, so the list only shrinks.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "language"
RULES = tomllib.loads((DATA / "rules.toml").read_text(encoding="utf-8"))
DICTIONARIES = "clear,en-GB_to_en-US"
"""Of codespell: plain misspellings, and British spelling. It lacks verbs in -ise, which rules.toml has."""

EXEMPT = (DATA / "exempt.txt").read_text(encoding="utf-8").split()

GENERATED: set[str] = set()
"""Tables that a program writes."""

NOT_PROSE = re.compile(
    r"^(```|~~~).*?^\1.*?$"  # a fenced block
    r"|`[^`]*`"  # code within a sentence
    r"|<[^>\n]*>"  # a tag or an address
    r"|\bhttps?://\S+"
    r"|^---\n.*?^---$",  # front matter
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Prose:
    """The sentences of one file."""

    path: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.sentences)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text. A blank line, list item, heading, table cell, or described argument ends a sentence."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", NOT_PROSE.sub(" CODE ", text))
    ends = r"\n\s*\n|\n\s*(?:[-*|#>]|\d+\.)\s*|\s\|\s|\|$|\n +(?=\w+: )"
    for block in re.split(ends, text, flags=re.MULTILINE):
        for sentence in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`\"(\[])", " ".join(block.split())):
            if len(sentence.split()) > 1:
                yield sentence


def literal(node: ast.AST) -> str | None:
    """The text of a string or an f-string, with CODE in place of each value; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "CODE" for part in node.values)
    return None


def prose_of_module(source: str) -> Iterator[str]:
    """Docstrings and messages. A string of three words or more counts as a message."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = literal(node)
        if text is not None and id(node) not in inside and len(re.findall(r"[A-Za-z]{2,}", text)) >= 3:
            yield text


def prose_of_action(source: str) -> Iterator[str]:
    """Every description in an action or a workflow."""
    pending = [yaml.safe_load(source)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from (str(text) for key, text in value.items() if key == "description")
            pending.extend(value.values())


def prose_of(path: Path) -> Prose:
    source = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".py":
            texts = list(prose_of_module(source))
        case ".yml":
            texts = list(prose_of_action(source))
        case _:
            texts = [source]
    return Prose(str(path.relative_to(ROOT)), tuple(one for text in texts for one in sentences(text)))


def files() -> list[Path]:
    patterns = ("*.md", "docs/**/*.md", "action.yml", "src/merge_gate/**/*.py", "recipes/*.py", "entrypoint.py")
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in GENERATED)


ALL = {prose.path: prose for prose in map(prose_of, files())}


def problems(prose: Prose) -> list[str]:
    """What breaks a rule in one file, spelling excepted."""
    found = []
    for rule in RULES["banned"]:
        banned = re.compile(rf"\b(?:{rule['words']})\b", re.IGNORECASE)
        matches = ((banned.search(sentence), sentence) for sentence in prose.sentences)
        found += [f"{match[0]!r}: write {rule['instead']}: {sentence}" for match, sentence in matches if match]
    limits = RULES["limits"]
    words = sum(len(sentence.split()) for sentence in prose.sentences)
    where = len(re.findall(r"\bwhere\b", prose.text, re.IGNORECASE))
    if where > limits["where-at-least"] and where > words * limits["where-per-1000-words"] / 1000:
        found.append(f"'where' {where} times in {words} words: use 'if' or 'when' for a condition")
    lengths = [(len(sentence.split()), sentence) for sentence in prose.sentences]
    found += [f"a sentence of {count} words: {one}" for count, one in lengths if count > limits["longest-sentence"]]
    long = [one for count, one in lengths if count > limits["long-sentence"]]
    if len(long) > max(1, len(lengths) * limits["long-sentences-percent"] / 100):
        found.append(f"{len(long)} of {len(lengths)} sentences have more than {limits['long-sentence']} words")
    return found


@pytest.fixture(scope="session")
def misspelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each file, what codespell would write in American English."""
    folder = tmp_path_factory.mktemp("prose")
    for number, prose in enumerate(ALL.values()):
        (folder / f"{number}.txt").write_text(prose.text, encoding="utf-8")
    command = [sys.executable, "-m", "codespell_lib", "--builtin", DICTIONARIES]
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/"}
    )
    assert done.returncode in {0, 65}, done.stderr
    paths, found = list(ALL), {path: [] for path in ALL}
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r".*/(\d+)\.txt:\d+: (.*)", line):
            found[paths[int(match[1])]].append(match[2])
    return found


@pytest.mark.parametrize("path", [path for path in ALL if path not in EXEMPT])
def test_prose_is_plain_american_english(path: str, misspelled: dict[str, list[str]]) -> None:
    found = problems(ALL[path]) + misspelled[path]
    assert not found, f"{path}:\n" + "\n".join(found)


def test_exempt_files_still_break_a_rule(misspelled: dict[str, list[str]]) -> None:
    if os.environ.get("UPDATE_GOLDENS"):
        broken = [path for path in ALL if problems(ALL[path]) or misspelled[path]]
        added = set(broken) - set(EXEMPT)
        assert not added, f"these files broke a rule and were not exempt: {sorted(added)}"
        (DATA / "exempt.txt").write_text("".join(f"{path}\n" for path in broken), encoding="utf-8")
        return
    clean = [path for path in EXEMPT if path not in ALL or not (problems(ALL[path]) or misspelled[path])]
    assert not clean, f"take these files out of tests/language/exempt.txt: {clean}"


@pytest.mark.parametrize("example", RULES["examples"], ids=lambda example: example["text"][:30])
def test_rules_find_what_they_name(example: dict[str, object]) -> None:
    prose = Prose("example", tuple(sentences(str(example["text"]))))
    assert bool(problems(prose)) is example["breaks-a-rule"]


def test_codespell_finds_british_spelling() -> None:
    command = [sys.executable, "-m", "codespell_lib", "--builtin", DICTIONARIES, "-"]
    done = subprocess.run(command, input="behaviour, behavior\n", capture_output=True, text=True, check=False)
    assert "behaviour ==> behavior" in done.stdout
    assert "behavior ==>" not in done.stdout


def test_glossary_is_sorted_and_short() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    glossary = contributing.partition("### Glossary")[2].partition("\n## ")[0]
    terms = re.findall(r"^\| ([a-z -]+) \|", glossary, re.MULTILINE)
    terms.remove("term")
    assert terms == sorted(set(terms))
    assert 30 <= len(terms) <= 40
