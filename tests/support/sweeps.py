"""Sweeps over model types, each in a process of its own, since some models end theirs; the result goes into a document.

In: what checks one type in a directory. Out: a result for each type, and a block of docs/evidence/truth.md.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.gating import one_thread
from tests.support.generated import write_block

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "truth.md"
LONGEST_S = 120


def check_one(check: Callable[[str, Path], Any], checked: type[Any], model_type: str) -> Any:
    with tempfile.TemporaryDirectory() as directory, one_thread():
        try:
            return check(model_type, Path(directory))
        except Exception as error:  # noqa: BLE001 - a type that cannot be loaded is counted, not fatal
            return checked(model_type=model_type, skipped=f"{type(error).__name__}: {error}"[:200])


def sweep(check: Callable[[str, Path], Any], checked: type[Any], model_types: Sequence[str], right: str) -> list[Any]:
    """What `check` says of each type, in records of `checked`. `right` is the word for one without fault."""
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=50) as pool:
        for number, model_type in enumerate(model_types, 1):
            try:
                one = pool.apply_async(check_one, (check, checked, model_type)).get(LONGEST_S)
            except multiprocessing.TimeoutError:
                one = checked(model_type=model_type, skipped=f"not done in {LONGEST_S} s")
            found.append(one)
            said = (
                "; ".join(one.wrong[:3])
                or one.skipped
                or getattr(one, "refused", "")
                or getattr(one, "loaded", "")
                or right
            )
            sys.stderr.write(f"{number:4} of {len(model_types)}  {model_type}: {said}\n")
    return found


def table(head: tuple[str, str], rows: Sequence[tuple[object, object]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows)


def write(about: str, block: str, swept: Callable[[list[str]], list[Any]], document: Callable[[list[Any]], str]) -> int:
    """The command of a sweep: all types, or those that are named. 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="write docs/evidence/truth.md")
    given = parser.parse_args()
    found = swept(given.types)
    text = document(found)
    if given.write:
        write_block(DOCUMENT, block, text)
    sys.stdout.write(f"{text}\n")
    return int(any(one.wrong for one in found))
