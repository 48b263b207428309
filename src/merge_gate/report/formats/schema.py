"""The JSON Schema of report.json, and the tables of its fields for docs/report.md.

In: the records, by fields.py. Out: JSON Schema 2020-12, and Markdown. Knows no report.
"""

from __future__ import annotations

from typing import Any, get_args, get_origin

from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import Finding, Verdict
from merge_gate.report.formats.fields import (
    FIGURES,
    NONFINITE,
    Declared,
    Json,
    columns,
    declared,
    is_record,
    optional,
    words,
)

_SHARED = {AdapterReport: "adapter", BaseReport: "base", Finding: "finding"}
"""Records that the schema defines once, and their names there."""

_PLAIN: Json = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": ["number", "null"]},
}


def report_schema() -> Json:
    """Return the JSON Schema of report.json. Objects stay open: a later 1.x adds keys and renames none."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:merge-gate:report:1",
        "title": "merge-gate report",
        "description": "What merge-gate found in one run.",
        **_record(Report),
        "$defs": {name: _record(cls) | _rules(cls) for cls, name in _SHARED.items()},
    }


def _rules(cls: Any) -> Json:
    """What holds between the fields of one record."""
    if cls is not AdapterReport:
        return {}
    passed = {"properties": {"verdict": {"const": Verdict.PASSED.value}}, "required": ["verdict"]}
    return {"if": passed, "then": {"properties": {"cause": {"type": "null"}}}}


def _record(cls: Any) -> Json:
    properties = {one.key: {**_field(one), "description": one.description} for one in declared(cls)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _field(one: Declared) -> Json:
    if one.key == "schema_version":
        return {"type": "string", "pattern": r"^1\.[0-9]+$"}
    return _table(one.item) if one.as_rows else _kind(one.kind)


def _kind(kind: Any) -> Json:
    inner, may_be_null = optional(kind)
    if may_be_null:
        schema = _kind(inner)
        return schema if isinstance(schema["type"], list) else {**schema, "type": [schema["type"], "null"]}
    if is_record(kind):
        return {"$ref": f"#/$defs/{_SHARED[kind]}"} if kind in _SHARED else _record(kind)
    if kind == FIGURES:
        figure = {"anyOf": [{"type": "number"}, {"enum": list(NONFINITE)}]}
        return {"type": "object", "additionalProperties": figure}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _kind(get_args(kind)[0])}
    return _PLAIN[kind] if kind in _PLAIN else {"enum": words(kind)}


def _table(cls: Any) -> Json:
    """Rows whose cells stand in the order of `columns`; a later 1.x adds columns at the end."""
    keys = [one.key for one in columns(cls)]
    head = {"type": "array", "items": {"type": "string"}, "prefixItems": [{"const": key} for key in keys]}
    row = {"type": "array", "prefixItems": [_kind(one.kind) for one in columns(cls)], "minItems": len(keys)}
    rows = {"type": "array", "items": row}
    return {
        "type": "object",
        "properties": {"columns": {**head, "minItems": len(keys)}, "rows": rows},
        "required": ["columns", "rows"],
    }


# --- tables for the docs -------------------------------------------------------------------------------------------


def field_table(cls: Any) -> str:
    """The fields of a record as a Markdown table: key, type, sentence. Records inside of it stand in their place."""
    rows = [f"| `{name}` | {_said(one)} | {_sentence(one)} |" for name, one in _listed(cls, "")]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _listed(cls: Any, prefix: str) -> list[tuple[str, Declared]]:
    listed = []
    for one in declared(cls):
        name = f"{prefix}{one.key}"
        listed.append((name, one))
        inner, _ = optional(one.kind)
        if is_record(inner):
            listed += _listed(inner, f"{name}.")
        elif get_origin(one.kind) is tuple and is_record(one.item) and one.item not in _SHARED and not one.as_rows:
            listed += _listed(one.item, f"{name}[].")
    return listed


def column_table(cls: Any) -> str:
    """The columns of a table of rows, in their order."""
    rows = [f"| `{one.key}` | {_said(one)} | {one.description} |" for one in columns(cls)]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def _sentence(one: Declared) -> str:
    inner = one.item if get_origin(one.kind) is tuple else one.kind
    return f"{one.description} See [below](#{_anchor(inner)})." if inner in _SHARED or one.as_rows else one.description


def _anchor(cls: Any) -> str:
    name = _SHARED.get(cls)
    return "a-merged-tensor" if name is None else f"an-{name}" if name[0] in "aeiou" else f"a-{name}"


_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number or null", FIGURES: "object of numbers"}


def _said(one: Declared) -> str:
    inner, may_be_null = optional(one.kind)
    if get_origin(inner) is tuple and inner != FIGURES:
        name = "table" if one.as_rows else "array"
    elif is_record(inner):
        name = "object"
    elif inner not in _NAMES:
        name = ", ".join(f"`{word}`" for word in words(inner))
    else:
        name = _NAMES[inner]
    return f"{name} or null" if may_be_null and "null" not in name else name
