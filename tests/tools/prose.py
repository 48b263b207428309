"""Shows where the project's prose is not plain American English: documents, the action, docstrings, and messages.

    .venv/bin/python -m tests.tools.prose        # `make lint` calls it

It is an editor's aid: it prints what it finds, and fails nothing. The rules are in `prose_rules.toml`.
"""

import ast
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = tomllib.loads(Path(__file__).with_name("prose_rules.toml").read_text(encoding="utf-8"))
DICTIONARIES = "clear,en-GB_to_en-US"
"""Of codespell: plain misspellings, and British spelling. It lacks verbs in -ise, which rules.toml has."""

NOT_PROSE = re.compile(
    r"^(```|~~~).*?^\1.*?$"  # a fenced block
    r"|`[^`]*`"  # code within a sentence
    r"|<[^>\n]*>"  # a tag or an address
    r"|\bhttps?://\S+"
    r"|^---\n.*?^---$",  # front matter
    re.MULTILINE | re.DOTALL,
)


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


def prose_of(path: Path) -> list[str]:
    """The sentences of one file."""
    source = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".py":
            texts = list(prose_of_module(source))
        case ".yml":
            texts = list(prose_of_action(source))
        case _:
            texts = [source]
    return [one for text in texts for one in sentences(text)]


def problems(prose: list[str]) -> list[str]:
    """What breaks a rule in one file, spelling excepted."""
    found = []
    for rule in RULES["banned"]:
        banned = re.compile(rf"\b(?:{rule['words']})\b", re.IGNORECASE)
        matches = ((banned.search(sentence), sentence) for sentence in prose)
        found += [f"{match[0]!r}: write {rule['instead']}: {sentence}" for match, sentence in matches if match]
    limits = RULES["limits"]
    words = sum(len(sentence.split()) for sentence in prose)
    where = len(re.findall(r"\bwhere\b", "\n".join(prose), re.IGNORECASE))
    if where > limits["where-at-least"] and where > words * limits["where-per-1000-words"] / 1000:
        found.append(f"'where' {where} times in {words} words: use 'if' or 'when' for a condition")
    lengths = [(len(sentence.split()), sentence) for sentence in prose]
    found += [f"a sentence of {count} words: {one}" for count, one in lengths if count > limits["longest-sentence"]]
    long = [one for count, one in lengths if count > limits["long-sentence"]]
    if len(long) > max(1, len(lengths) * limits["long-sentences-percent"] / 100):
        found.append(f"{len(long)} of {len(lengths)} sentences have more than {limits['long-sentence']} words")
    return found


def misspelled(every: dict[str, list[str]]) -> Iterator[str]:
    """What codespell would write in American English."""
    with tempfile.TemporaryDirectory() as folder:
        for number, prose in enumerate(every.values()):
            Path(folder, f"{number}.txt").write_text("\n".join(prose), encoding="utf-8")
        command = [sys.executable, "-m", "codespell_lib", "--builtin", DICTIONARIES, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r".*/(\d+)\.txt:\d+: (.*)", line):
            yield f"{list(every)[int(match[1])]}: {match[2]}"


def main() -> None:
    """Print one line for each place."""
    patterns = ("*.md", "docs/**/*.md", "action.yml", "src/merge_gate/**/*.py", "recipes/*.py", "entrypoint.py")
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    every = {str(path.relative_to(ROOT)): prose_of(path) for path in files}
    places = [f"{path}: {problem}" for path, prose in every.items() for problem in problems(prose)]
    for place in (*places, *misspelled(every)):
        print(place)
    print(f"prose: {len(every)} files read")


if __name__ == "__main__":
    main()
