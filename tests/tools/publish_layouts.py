"""Publish a change of every model type that transformers converts, and write the result: `make publish-layouts`.

Each type is saved as a tiny random model. Every second weight gets other values, which are written through
transformers' reverse conversion. `from_pretrained` of the result must give exactly these values, and no others.
"""

from __future__ import annotations

import argparse
import datetime as dt
import multiprocessing
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from tests.support.engine import publish_layouts
from tests.support.gating import one_thread
from tests.support.generated import write_block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "evidence/truth.md"
LONGEST_S = 120


def check_one(model_type: str) -> publish_layouts.Checked:
    """One type in a process of its own: some models end theirs."""
    with tempfile.TemporaryDirectory() as directory, one_thread():
        try:
            return publish_layouts.check(model_type, Path(directory))
        except Exception as error:  # noqa: BLE001 - a type that cannot be loaded is counted, not fatal
            return publish_layouts.Checked(model_type=model_type, skipped=f"{type(error).__name__}: {error}"[:200])


def sweep(model_types: Sequence[str]) -> list[publish_layouts.Checked]:
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=50) as pool:
        for number, model_type in enumerate(model_types, 1):
            try:
                checked = pool.apply_async(check_one, (model_type,)).get(LONGEST_S)
            except multiprocessing.TimeoutError:
                checked = publish_layouts.Checked(model_type=model_type, skipped=f"not done in {LONGEST_S} s")
            found.append(checked)
            result = "; ".join(checked.wrong[:3]) or checked.refused or checked.skipped or "exact"
            print(f"{number:4} of {len(model_types)}  {model_type}: {result}", file=sys.stderr, flush=True)
    return found


def document(found: list[publish_layouts.Checked]) -> str:
    built = [one for one in found if not one.skipped]
    written = [one for one in built if not one.refused]
    compared = [one for one in written if one.is_compared]
    exact = [one for one in compared if not one.wrong]
    tested = f"{dt.datetime.now(dt.UTC).date()}, transformers {transformers.__version__}, torch {torch.__version__}."
    rows = [
        ("model types with a conversion", len(found)),
        ("a tiny model can be built", len(built)),
        ("the change can be written", len(written)),
        ("the written model is compared", len(compared)),
        ("it loads exactly the changed tensors", len(exact)),
        ("types with a conversion of values", sum(bool(one.converted) for one in written)),
        ("changed tensors", sum(one.changed for one in written)),
        ("of these, converted", sum(one.converted for one in written)),
    ]
    lines = [
        tested,
        "",
        *_table(("", "count"), [(name, f"{count:,}") for name, count in rows]),
        *_exceptions("wrong", {one.model_type: ", ".join(one.wrong[:3]) for one in compared if one.wrong}),
        *_exceptions("refused", {one.model_type: one.refused for one in built if one.refused}),
        *_exceptions(
            "not compared",
            {
                one.model_type: "transformers changes parameters after it has loaded them"
                for one in written
                if not one.is_compared
            },
        ),
    ]
    return "\n".join(lines)


def _exceptions(what: str, reasons: dict[str, str]) -> Iterator[str]:
    if reasons:
        yield ""
        yield from _table((what, "why"), [(f"`{name}`", f"`{_short(reason)}`") for name, reason in reasons.items()])


def _short(reason: str) -> str:
    return textwrap.shorten(reason.replace("`", "").replace("|", "/"), 100)


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows)


def main() -> int:
    """Check all types with a conversion, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all with a conversion by default")
    parser.add_argument("--write", action="store_true", help="write docs/evidence/truth.md")
    given = parser.parse_args()
    found = sweep(given.types or publish_layouts.converted_types())
    text = document(found)
    if given.write:
        write_block(DOCUMENT, "publications", text)
    print(text)
    return int(any(one.wrong for one in found))


if __name__ == "__main__":
    sys.exit(main())
