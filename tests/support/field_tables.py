"""The tables of docs/reference/report.md: the fields of the records, as the schema has them."""

import os
from pathlib import Path
from typing import Any, get_origin

from merge_gate.report.formats.fields import FIGURES, Declared, columns, declared, is_record, optional, words
from tests.support.schemas import SHARED

DOCS = Path(__file__).parents[2] / "docs"


def held_table(page: str, block: str, table: str) -> None:
    """The table below `<!-- block -->` in a page of docs is what was made."""
    path, head, end = DOCS / page, f"<!-- {block} -->\n", "<!-- end -->"
    before, after = path.read_text(encoding="utf-8").split(head)
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(f"{before}{head}\n{table}\n\n{end}{after.split(end, 1)[1]}", encoding="utf-8")
        return
    assert after.split(end, 1)[0].strip() == table, "look at the difference, then run with UPDATE_GOLDENS=1"


def field_table(cls: Any) -> str:
    """The fields of a record as a Markdown table: key, type, sentence. Nested records appear in place, once."""
    rows = [f"| `{name}` | {_kind_in_words(field)} | {meaning} |" for name, field, meaning in _listed(cls, "", {})]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _listed(cls: Any, prefix: str, places: dict[Any, str]) -> list[tuple[str, Declared, str]]:
    """Names, fields, and sentences. `places` has the first place of each nested record."""
    listed = []
    for field in declared(cls):
        name = f"{prefix}{field.key}"
        inner, _ = optional(field.kind)
        is_list = get_origin(field.kind) is tuple and not field.as_rows
        if is_list and is_record(field.item) and field.item not in SHARED:
            inner, place = field.item, f"{name}[]"
        else:
            place = name
        if not is_record(inner):
            listed.append((name, field, _sentence(field)))
        elif inner in places:
            listed.append((name, field, f"{_sentence(field)} Fields as in `{places[inner]}`."))
        else:
            places[inner] = place
            listed += [(name, field, _sentence(field)), *_listed(inner, f"{place}.", places)]
    return listed


def column_table(cls: Any) -> str:
    """The columns of a table of rows, in their order."""
    rows = [f"| `{field.key}` | {_kind_in_words(field)} | {field.description} |" for field in columns(cls)]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def _sentence(field: Declared) -> str:
    inner = field.item if get_origin(field.kind) is tuple else field.kind
    see = f" See [below](#{_anchor(inner)})." if inner in SHARED or field.as_rows else ""
    return field.description + see


def _anchor(cls: Any) -> str:
    name = SHARED.get(cls)
    return "a-merged-tensor" if name is None else f"an-{name}" if name[0] in "aeiou" else f"a-{name}"


_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number or null", FIGURES: "object of numbers"}


def _kind_in_words(field: Declared) -> str:
    inner, may_be_null = optional(field.kind)
    if get_origin(inner) is tuple and inner != FIGURES:
        name = "table" if field.as_rows else "array"
    elif is_record(inner):
        name = "object"
    elif inner not in _NAMES:
        name = ", ".join(f"`{word}`" for word in words(inner))
    else:
        name = _NAMES[inner]
    return f"{name} or null" if may_be_null and "null" not in name else name
