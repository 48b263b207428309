"""Check tensor map and skeleton of every model type against a real load, and write the result: `make tensor-maps`.

Each type is saved as a tiny random model. Its map is recorded on headers alone and filled with the stored values, which
must give every parameter that `from_pretrained` gives, bit for bit. So must its skeleton, in two dtypes.
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

import peft
import torch
import transformers

from tests.support.engine import architectures, tensor_maps
from tests.support.gating import one_thread
from tests.support.generated import write_block

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "evidence/truth.md"
LONGEST_S = 120


def check_one(model_type: str) -> tensor_maps.Checked:
    """One type in a process of its own: some models end theirs."""
    with tempfile.TemporaryDirectory() as directory, one_thread():
        try:
            return tensor_maps.check(model_type, Path(directory))
        except Exception as error:  # noqa: BLE001 - a type that cannot be loaded is counted, not fatal
            return tensor_maps.Checked(model_type=model_type, skipped=f"{type(error).__name__}: {error}"[:200])


def sweep(model_types: Sequence[str]) -> list[tensor_maps.Checked]:
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=50) as pool:
        for number, model_type in enumerate(model_types, 1):
            try:
                checked = pool.apply_async(check_one, (model_type,)).get(LONGEST_S)
            except multiprocessing.TimeoutError:
                checked = tensor_maps.Checked(model_type=model_type, skipped=f"not done in {LONGEST_S} s")
            found.append(checked)
            said = "; ".join(checked.wrong) or checked.skipped or checked.loaded or "right"
            print(f"{number:4} of {len(model_types)}  {model_type}: {said}", file=sys.stderr, flush=True)
    return found


def document(found: list[tensor_maps.Checked]) -> str:
    mapped = [one for one in found if not one.skipped]
    wrong = [one for one in mapped if one.wrong]
    loaded = [one for one in mapped if one.loaded]
    computed = ", ".join(f"`{name}`" for name in tensor_maps.COMPUTED)
    tested = (
        f"{dt.datetime.now(dt.UTC).date()}, transformers {transformers.__version__}, PEFT {peft.__version__}, torch "
        f"{torch.__version__}. For {computed}, only names are compared: transformers computes values after the load."
    )
    counts = [
        ("tried", len(found)),
        ("a tiny model has a map", len(mapped)),
        ("the map gives every parameter of `from_pretrained`", len(mapped) - len(wrong)),
        ("the skeleton has the bits of `from_pretrained`, in bfloat16 and float16", len(mapped) - len(loaded)),
        ("with conversions", sum(bool(one.conversions) for one in mapped)),
    ]
    table_of_loaded = [
        "| loaded as usual | why |",
        "|---|---|",
        *(f"| `{one.model_type}` | {one.loaded} |" for one in loaded),
        "",
    ]
    table_of_wrong = [
        "| wrong | what |",
        "|---|---|",
        *(f"| `{one.model_type}` | {'; '.join(one.wrong[:3])} |" for one in wrong),
        "",
    ]
    lines = [
        textwrap.fill(tested, 120),
        "",
        "| model types | number |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in counts),
        "",
        *(table_of_wrong if wrong else ()),
        *(table_of_loaded if loaded else ()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Check all types, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="write docs/evidence/truth.md")
    given = parser.parse_args()
    found = sweep(given.types or architectures.model_types())
    text = document(found)
    if given.write:
        write_block(DOCUMENT, "tensor maps", text)
    print(text)
    return int(any(one.wrong for one in found))


if __name__ == "__main__":
    sys.exit(main())
