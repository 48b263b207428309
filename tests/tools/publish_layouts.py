"""Publish a change of every model type that transformers converts, and write the result: `make publish-layouts`.

Each type is saved as a tiny random model. Every second weight gets other values, which are written through
transformers' reverse conversion. `from_pretrained` of the result must give exactly these values, and no others.
"""

import datetime as dt
import sys
import textwrap
from collections.abc import Iterator

import torch
import transformers

from tests.support.engine import publish_layouts
from tests.support.engine.publish_layouts import Checked
from tests.support.sweeps import sweep, table, write


def document(found: list[Checked]) -> str:
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
        *table(("", "count"), [(name, f"{count:,}") for name, count in rows]),
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
        yield from table((what, "why"), [(f"`{name}`", f"`{_short(reason)}`") for name, reason in reasons.items()])


def _short(reason: str) -> str:
    return textwrap.shorten(reason.replace("`", "").replace("|", "/"), 100)


if __name__ == "__main__":
    sys.exit(
        write(
            __doc__,
            "publications",
            lambda types: sweep(publish_layouts.check, Checked, types or publish_layouts.converted_types(), "exact"),
            document,
        )
    )
