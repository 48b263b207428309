"""The JSON Schema of report.json, and the tables of its fields for docs/reference/report.md.

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
    properties = {field.key: {**_field(field), "description": field.description} for field in declared(cls)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _field(field: Declared) -> Json:
    if field.key == "schema_version":
        return {"type": "string", "pattern": r"^1\.[0-9]+$"}
    return _table(field.item) if field.as_rows else _kind(field.kind)


def _kind(kind: Any) -> Json:
    inner, may_be_null = optional(kind)
    if may_be_null:
        schema = _kind(inner)
        if "enum" in schema:
            return {"enum": [*schema["enum"], None]}
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
    """Rows whose cells have the order of `columns`; a later 1.x adds columns at the end."""
    keys = [field.key for field in columns(cls)]
    head = {"type": "array", "items": {"type": "string"}, "prefixItems": [{"const": key} for key in keys]}
    row = {"type": "array", "prefixItems": [_kind(field.kind) for field in columns(cls)], "minItems": len(keys)}
    rows = {"type": "array", "items": row}
    return {
        "type": "object",
        "properties": {"columns": {**head, "minItems": len(keys)}, "rows": rows},
        "required": ["columns", "rows"],
    }


# --- tables for the docs -------------------------------------------------------------------------------------------


def field_table(cls: Any) -> str:
    """The fields of a record as a Markdown table: key, type, sentence. Nested records appear in place."""
    rows = [f"| `{name}` | {_kind_in_words(field)} | {_sentence(field)} |" for name, field in _listed(cls, "")]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _listed(cls: Any, prefix: str) -> list[tuple[str, Declared]]:
    listed = []
    for field in declared(cls):
        name = f"{prefix}{field.key}"
        listed.append((name, field))
        inner, _ = optional(field.kind)
        if is_record(inner):
            listed += _listed(inner, f"{name}.")
        is_list = get_origin(field.kind) is tuple and not field.as_rows
        if is_list and is_record(field.item) and field.item not in _SHARED:
            listed += _listed(field.item, f"{name}[].")
    return listed


def column_table(cls: Any) -> str:
    """The columns of a table of rows, in their order."""
    rows = [f"| `{field.key}` | {_kind_in_words(field)} | {field.description} |" for field in columns(cls)]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def _sentence(field: Declared) -> str:
    inner = field.item if get_origin(field.kind) is tuple else field.kind
    see = f" See [below](#{_anchor(inner)})." if inner in _SHARED or field.as_rows else ""
    return field.description + see


def _anchor(cls: Any) -> str:
    name = _SHARED.get(cls)
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
