"""Makes the JSON Schemas that the package stores: by the models of the configuration, and by the records of a report.

`make schemas` writes the files, and `merge-gate schema` prints them.
"""

import json
import os
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

import merge_gate
from merge_gate.config.load_config import BaselineFile
from merge_gate.config.model import FileEntry, Model
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

SCHEMAS = Path(merge_gate.__file__).parent / "schemas"


def stored(document: str, made: Json) -> Json:
    """The stored schema of a document, which is written first if the goldens are."""
    file = SCHEMAS / f"{document}.schema.json"
    if os.environ.get("UPDATE_GOLDENS"):
        file.write_text(json.dumps(made, indent=2) + "\n", encoding="ascii")
    return json.loads(file.read_text(encoding="ascii"))


# --- by pydantic's models --------------------------------------------------------------------------------------------


def config_schema() -> Json:
    """The JSON Schema (2020-12) of the configuration."""
    return _schema_of(FileEntry)


def baseline_schema() -> Json:
    """The JSON Schema (2020-12) of a baseline."""
    return _schema_of(BaselineFile)


def _schema_of(file: type[Model]) -> dict[str, Any]:
    schema = file.model_json_schema(by_alias=True, schema_generator=_Schema)
    one_line = json.dumps(schema).replace(r"\n", " ")  # the line breaks of docstrings mean nothing
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.loads(one_line)}


class _Schema(GenerateJsonSchema):
    """A schema without `null`, `default: null`, and generated titles: a key without a value is left out."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema["default"] is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        needs_some = {"minProperties": 1} if schema["cls"].needs_keys else {}
        return super().model_schema(schema) | {"additionalProperties": False} | needs_some

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


# --- by the records of report.json -----------------------------------------------------------------------------------

SHARED = {AdapterReport: "adapter", BaseReport: "base", Finding: "finding"}
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
        "$defs": {name: _record(cls) | _rules(cls) for cls, name in SHARED.items()},
    }


def _rules(cls: Any) -> Json:
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
        return {"$ref": f"#/$defs/{SHARED[kind]}"} if kind in SHARED else _record(kind)
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
