"""The report for programs: strict JSON (RFC 8259, no bare NaN or Infinity), and the schema it follows.

In: a `records.Report`. Out: `render`, the text of report.json, and `report_schema`, JSON Schema 2020-12. Knows
neither files nor the other formats. Every key is always there; what is not known is null.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from merge_gate.records import Origin, Quantization, Result, Severity, Verdict

if TYPE_CHECKING:
    from merge_gate.records import AdapterReport, BaseRef, BaseReport, Environment, Finding, Report

SCHEMA_VERSION = "1.0"

Json = dict[str, Any]

# Escaped although JSON does not ask for it: characters that hide or reorder text in a terminal, and the one sequence
# that a GitHub runner obeys anywhere in a log line. So `cat report.json` in a job is harmless; parsers see no change.
_UNSAFE = re.compile(
    "[\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
    r"|#(?=\[)"
)


def render(report: Report) -> str:
    """Return report.json. Never raises for what a record may hold: non-finite figures become strings."""
    text = json.dumps(_document(report), allow_nan=False, ensure_ascii=False, indent=2)
    return _UNSAFE.sub(lambda match: json.dumps(match[0]).strip('"') if match[0] != "#" else "\\u0023", text) + "\n"


def _document(report: Report) -> Json:
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": report.complete,
        "result": report.result.value,
        "counts": {verdict.value: report.count(verdict) for verdict in Verdict},
        "tool": {"name": "merge-gate", "version": _text(report.tool_version)},
        "environment": _environment(report.environment),
        "config": {"path": _text(report.config_path), "sha256": _text(report.config_sha256)},
        "bases": [_base(base) for base in report.bases],
        "adapters": [_adapter(adapter) for adapter in report.adapters],
    }


def _environment(environment: Environment) -> Json:
    return {
        "python": _text(environment.python),
        "torch": _text(environment.torch),
        "peft": _text(environment.peft),
        "transformers": _text(environment.transformers),
        "bitsandbytes": _text(environment.bitsandbytes),
        "device": _text(environment.device),
        "device_name": _text(environment.device_name),
    }


def _base_ref(base: BaseRef | BaseReport) -> Json:
    return {
        "model": _text(base.model),
        "revision": _text(base.revision),
        "dtype": _text(base.dtype),
        "quantization": base.quantization.value,
    }


def _base(base: BaseReport) -> Json:
    return {
        **_base_ref(base),
        "sha256": _text(base.sha256),
        "parameters": base.parameters,
        "findings": [_finding(finding) for finding in base.findings],
    }


def _adapter(adapter: AdapterReport) -> Json:
    coverage = adapter.coverage
    return {
        "name": _text(adapter.name),
        "source": _text(adapter.source),
        "revision": _text(adapter.revision),
        "base": _base_ref(adapter.base),
        "peft_type": _text(adapter.peft_type),
        "verdict": adapter.verdict.value,
        "cause": _text(adapter.cause),
        "findings": [_finding(finding) for finding in adapter.findings],
        "coverage": {
            "adapter_tensors": coverage.adapter_tensors,
            "applied": coverage.applied,
            "modules_merged": coverage.modules_merged,
            "parameters_checked": coverage.parameters_checked,
            "parameters_bounded": coverage.parameters_bounded,
            "parameters_total": coverage.parameters_total,
        },
        "files": [
            {"path": _text(file.path), "bytes": file.size_bytes, "sha256": _text(file.sha256)} for file in adapter.files
        ],
        "seconds": adapter.seconds if math.isfinite(adapter.seconds) else None,
        "seed": adapter.seed,
        "line": adapter.line,
        "column": adapter.column,
    }


def _finding(finding: Finding) -> Json:
    return {
        "check": _text(finding.check),
        "severity": finding.severity.value,
        "message": _text(finding.message),
        "hint": _text(finding.hint),
        "module": _text(finding.module),
        "tensor": _text(finding.tensor),
        "origin": finding.origin.value,
        "nan": finding.nan,
        "posinf": finding.posinf,
        "neginf": finding.neginf,
        "numel": finding.numel,
        "first_index": None if finding.first_index is None else list(finding.first_index),
        "measured": {_text(name): _figure(value) for name, value in finding.measured},
    }


def _text(text: str | None) -> str | None:
    """A file name may hold bytes that are not UTF-8 (surrogates in Python); strict parsers refuse them."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _figure(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# --- schema --------------------------------------------------------------------------------------------------------


def report_schema() -> Json:
    """Return the JSON Schema of report.json. Objects stay open: a later 1.x adds keys and renames none."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:merge-gate:report:1",
        "title": "merge-gate report",
        **_object(
            "What merge-gate found in one run.",
            {
                "schema_version": {
                    **_string("Version of this format. Readers accept any 1.x."),
                    "pattern": r"^1\.[0-9]+$",
                },
                "complete": {
                    "type": "boolean",
                    "description": "False while the run goes on, and for ever if it was killed.",
                },
                "result": _enum(
                    Result, "The run's result. An unfinished run, or one that judged nothing, never passes."
                ),
                "counts": _object(
                    "Adapters by verdict.",
                    {verdict.value: _count(f"Adapters with the verdict {verdict.value}.") for verdict in Verdict},
                ),
                "tool": _object(
                    "What wrote this.", {"name": {"const": "merge-gate"}, "version": _string("Its version.")}
                ),
                "environment": _environment_schema(),
                "config": _object(
                    "The configuration file.",
                    {"path": _string("As named on the command line."), "sha256": _string("Digest of its bytes, hex.")},
                ),
                "bases": _array("Every base that was loaded, once.", _ref("base")),
                "adapters": _array("One entry per adapter, base and dtype, in the order of the file.", _ref("adapter")),
            },
        ),
        "$defs": {"base": _base_schema(), "adapter": _adapter_schema(), "finding": _finding_schema()},
    }


def _environment_schema() -> Json:
    packages = ("torch", "peft", "transformers", "bitsandbytes")
    return _object(
        "What the run ran on.",
        {
            "python": _string("Version of Python."),
            **{name: _string(f"Version of {name}; null where absent or not needed.", null=True) for name in packages},
            "device": _string("cpu, cuda:0, …"),
            "device_name": _string("The device's own name; may be empty."),
        },
    )


def _base_ref_schema() -> Json:
    return {
        "model": _string("Directory or Hub id as written; null where none could be found out.", null=True),
        "revision": _string("Commit of a Hub id; null for a directory.", null=True),
        "dtype": _string("The dtype that was checked, in torch's words."),
        "quantization": _enum(Quantization, "How the base was quantised when it was loaded."),
    }


def _base_schema() -> Json:
    return _object(
        "A base, measured once before any merge.",
        {
            **_base_ref_schema(),
            "sha256": _string("Digest of its weights, hex; null where it was not taken.", null=True),
            "parameters": _count("Elements of all parameters and persistent buffers."),
            "findings": _array("What is wrong with the base itself.", _ref("finding")),
        },
    )


def _adapter_schema() -> Json:
    schema = _object(
        "One adapter on one base in one dtype.",
        {
            "name": _string("Its name in the configuration."),
            "source": _string("Path as written, or Hub id."),
            "revision": _string("Commit of a Hub id; null for a directory.", null=True),
            "base": _object("The base it was merged into.", _base_ref_schema()),
            "peft_type": _string("PEFT's name of the method (LORA, …); null where it could not be read.", null=True),
            "verdict": _enum(Verdict, "What is said of the adapter. Only `passed` clears it."),
            "cause": _string(
                "Id of the check that decided; null when passed or when nothing could be judged.", null=True
            ),
            "findings": _array("All findings, whichever is the cause.", _ref("finding")),
            "coverage": _object(
                "How much was checked. A passed adapter has parameters_checked equal to parameters_total.",
                {
                    "adapter_tensors": _count("Tensors in the adapter's file."),
                    "applied": _count("Of these, tensors that the merge used."),
                    "modules_merged": _count("Modules of the base that were merged and measured."),
                    "parameters_checked": _count("Elements of the merged model that were checked."),
                    "parameters_bounded": _count(
                        "Of these, elements that were not merged one by one, since no value of base and adapter is "
                        "large enough for a sum that overflows; 0 with --exhaustive."
                    ),
                    "parameters_total": _count("Elements that the merged model has."),
                },
            ),
            "files": _array(
                "The files that were read.",
                _object(
                    "One file.",
                    {
                        "path": _string("Relative to the adapter's directory."),
                        "bytes": _count("Size in bytes."),
                        "sha256": _string("Digest, hex."),
                    },
                ),
            ),
            "seconds": {"type": ["number", "null"], "description": "Time the adapter took; null if not measured."},
            "seed": {"type": ["integer", "null"], "description": "Seed of a random combination; null else."},
            "line": _count("Line of the adapter's entry in the configuration file, from 1."),
            "column": _count("Column of the entry, from 1."),
        },
    )
    passed: Json = {"properties": {"verdict": {"const": Verdict.PASSED.value}}, "required": ["verdict"]}
    return {**schema, "if": passed, "then": {"properties": {"cause": {"type": "null"}}}}


def _finding_schema() -> Json:
    null_count = {"type": ["integer", "null"], "minimum": 0}
    return _object(
        "One thing worth saying.",
        {
            "check": _string("Id of the check."),
            "severity": {
                "enum": [Severity.ERROR.value, Severity.WARNING.value],
                "description": "An error fails the adapter, a warning does not.",
            },
            "message": _string("What is wrong, where, what was found and what was expected."),
            "hint": _string("What to do about it; may be empty."),
            "module": _string("Module of the base.", null=True),
            "tensor": _string("Tensor, named as in the file or the model it is from.", null=True),
            "origin": _enum(Origin, "Where the cause lies."),
            "nan": {**null_count, "description": "NaN values in the tensor."},
            "posinf": {**null_count, "description": "Values of +Infinity."},
            "neginf": {**null_count, "description": "Values of -Infinity."},
            "numel": {**null_count, "description": "Elements of the tensor."},
            "first_index": {
                "type": ["array", "null"],
                "items": {"type": "integer", "minimum": 0},
                "description": "Index of the first non-finite element, row-major.",
            },
            "measured": {
                "type": "object",
                "additionalProperties": {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]},
                "description": "Figures behind the finding, by name. Non-finite ones are strings.",
            },
        },
    )


def _object(description: str, properties: Json) -> Json:
    return {"type": "object", "description": description, "properties": properties, "required": list(properties)}


def _array(description: str, items: Json) -> Json:
    return {"type": "array", "description": description, "items": items}


def _string(description: str, *, null: bool = False) -> Json:
    return {"type": ["string", "null"] if null else "string", "description": description}


def _count(description: str) -> Json:
    return {"type": "integer", "minimum": 0, "description": description}


def _enum(values: type[Result | Verdict | Origin | Quantization], description: str) -> Json:
    return {"enum": [value.value for value in values], "description": description}


def _ref(name: str) -> Json:
    return {"$ref": f"#/$defs/{name}"}
