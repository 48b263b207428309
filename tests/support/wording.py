"""Sentences that tests meet, each held against one golden: `wording/NAME.txt` next to `test_NAME.py`.

A test passes each sentence to the fixture `wording`, and asserts ids, fields and names for itself. So a sentence that
is changed on purpose costs no edit of a test: run the module with UPDATE_GOLDENS=1 (and without xdist, since all tests
of a module write one file), and look at the difference.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import constants

SECTION = re.compile(r"^== (.*)$", re.MULTILINE)
BETWEEN = "--\n"
VERSIONS = {f"{name} {version(name)}": name for name in ("PEFT", "transformers")}


def golden_of(module: Path) -> Path:
    """The golden of a test module."""
    return module.parent / "wording" / f"{module.stem.removeprefix('test_')}.txt"


def read(golden: Path) -> dict[str, str]:
    """The sections of a golden, by the test that they are of."""
    _, *parts = SECTION.split(golden.read_text(encoding="utf-8")) if golden.exists() else [""]
    return {name: body.removeprefix("\n") for name, body in zip(parts[::2], parts[1::2], strict=True)}


def write(golden: Path, sections: dict[str, str]) -> None:
    """Sections in the order of their names, so that the order of the tests does not matter."""
    golden.parent.mkdir(exist_ok=True)
    golden.write_text("".join(f"== {name}\n{sections[name]}" for name in sorted(sections)), encoding="utf-8")


def hold(golden: Path, text: str) -> None:
    """Hold a whole text against its golden."""
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "look at the difference, then run with UPDATE_GOLDENS=1"


def hold_in_order(golden: Path, parts: Iterable[str]) -> None:
    """Hold parts of a text against its golden, up to the first that differs."""
    stored, at = golden.read_text(encoding="utf-8"), 0
    for part in parts:
        assert stored[at : at + len(part)] == part, "look at the difference, then run with UPDATE_GOLDENS=1"
        at += len(part) + 1
    assert at == len(stored) + 1, "parts are missing"


class Wording:
    """The sentences of one test, in their order. `replaced` maps what differs from run to run to a word for it."""

    def __init__(self, golden: Path, test: str, replaced: dict[str, str]) -> None:
        self._golden = golden
        self._test = test.replace("\n", "\\n")
        self._replaced = replaced | {sys.executable: "<python>", constants.HF_HUB_CACHE: "<cache>"}
        self._expected = read(golden).get(self._test)
        self._met: list[str] = []

    def __call__(self, *texts: object) -> None:
        """Hold sentences against the golden. An error, a finding and a refusal stand for their message and hint."""
        for text in texts:
            message, hint = getattr(text, "message", text), getattr(text, "hint", "")
            self._met.append(self._plain(f"{message}\n> {hint}\n" if hint else f"{message}\n"))
        if not os.environ.get("UPDATE_GOLDENS"):
            expected = (self._expected or "").split(BETWEEN)
            assert self._met == expected[: len(self._met)], "look at the difference, then run with UPDATE_GOLDENS=1"

    @contextmanager
    def of(self, kind: type[Exception], match: str | None = None) -> Iterator[pytest.ExceptionInfo[Exception]]:
        """Hold the error of this kind that the block raises."""
        with pytest.raises(kind, match=match) as caught:
            yield caught
        self(caught.value)

    def close(self) -> None:
        """The golden has no other sentence of this test."""
        if os.environ.get("UPDATE_GOLDENS"):
            if self._met:
                write(self._golden, read(self._golden) | {self._test: BETWEEN.join(self._met)})
        else:
            assert (self._expected or "") == BETWEEN.join(self._met), "the golden has more sentences"

    def _plain(self, text: str) -> str:
        for found in sorted(self._replaced, key=len, reverse=True):
            text = text.replace(found, self._replaced[found])
        text = re.sub(r'<temporary>[^"]*…', "<temporary>…", text.replace("\0", "\\0"))  # cut to a length
        for found, name in VERSIONS.items():
            text = text.replace(found, f"{name} <version>")
        return re.sub(r"\b(127\.0\.0\.1|localhost):\d+", r"\1:<port>", text)
