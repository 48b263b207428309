"""What may stand in a configuration: one strict model per mapping, the source of the JSON Schema as well.

In: plain data from the YAML file. Out: models with a hole where something is wrong, so that the rest can be looked at
further; what stands in the holes; the JSON Schema. Knows neither files nor lines: problems.py gives errors their place
and words. A field's docstring is what editors and docs/configuration.md say of it.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.config import JsonDict
from pydantic.functional_validators import BeforeValidator, WrapValidator, field_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, WithJsonSchema
from pydantic.types import StringConstraints
from pydantic_core import PydanticCustomError, ValidationError, core_schema

from merge_gate.config.yaml_document import Loc
from merge_gate.judging.checks.check import Check
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.terms import DTYPES, Quantization
from merge_gate.text import one_of


class _IsRecord(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Record = TypeVar("_Record", bound=_IsRecord)

MAX_NAME = 200
MAX_TEXT = 4096
MAX_MEMBERS = 100
MAX_ADAPTERS = 10_000

TEXT = r"\S"
HEX_64 = r"^[0-9a-fA-F]{64}$"
DATE = r"^\d{4}-\d\d-\d\d$"
PEFT_TYPE = r"^[A-Za-z][A-Za-z0-9_]*$"
PATTERNS = {
    TEXT: "some text",
    HEX_64: "64 hexadecimal digits, as sha256sum prints them",
    DATE: "a day such as 2026-12-31",
    PEFT_TYPE: "a PEFT type such as LORA",
}
"""The patterns of the models, and what each one asks for."""

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
METHODS_WITH = {
    "density": tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude"))),
    "majority_sign_method": tuple(name for name in METHODS if "ties" in name),
}
"""The methods that take a key: those that prune need `density`, those that elect a sign may have the other."""

Dtype: TypeAlias = Literal[("auto", *DTYPES)]  # type: ignore[valid-type] # mypy reads no words from a tuple
QuantizationWord: TypeAlias = Literal[tuple(map(str, Quantization))]  # type: ignore[valid-type] # nor from an Enum


# --- models with holes ---------------------------------------------------------------------------------------------


class Wrong:
    """Stands in a model where something is wrong, and is false. `errors` are pydantic's."""

    def __init__(self, errors: list[Any]) -> None:
        self.errors = errors

    def __bool__(self) -> bool:
        return False


NEEDED: Any = Wrong([{"type": "missing", "loc": ()}])
"""The default of a key that must be there."""


def or_hole(value: Any, handler: Any) -> Any:
    """The value as `handler` makes it, or a hole."""
    try:
        return handler(value)
    except ValidationError as error:
        return Wrong(error.errors(include_url=False))


class Model(BaseModel):
    """No conversions. What is wrong, missing or unknown is not raised: `wrong` yields it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    kind: ClassVar[str] = "key"
    """What its keys are called."""
    if_empty: ClassVar[str] = ""
    """What to do where it is empty and may not be."""

    _keep = field_validator("*", mode="wrap")(or_hole)

    def record(self, cls: type[_Record], **more: Any) -> _Record:
        """The record of what stands here under its fields' names, and `more`; the rest has the record's default."""
        said = {name: getattr(self, name, None) for name in cls.__dataclass_fields__}
        return cls(**{name: _hashable(value) for name, value in said.items() if value is not None} | more)


def _hashable(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value


def wrong(value: Any, loc: Loc = ()) -> Iterator[tuple[Loc, Mapping[str, Any]]]:
    """Everything that is wrong in `value`, which stands at `loc`: its place and pydantic's error."""
    if isinstance(value, Wrong):
        yield from (((*loc, *error["loc"]), error) for error in value.errors)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from wrong(item, (*loc, index))
    elif isinstance(value, Model):
        keys = {name: field.alias or name for name, field in type(value).model_fields.items()}
        for key in value.model_extra or ():
            yield (*loc, key), {"type": "unknown", "known": keys.values(), "kind": value.kind}
        for name, key in keys.items():
            if (held := getattr(value, name)) is not None:
                yield from wrong(held, (*loc, key))
        if value.if_empty and not value.model_fields_set:
            yield loc, {"type": "empty", "hint": value.if_empty}


@dataclass(frozen=True, eq=False)
class Short:
    """A value may be written shorter: what stands for the mapping's `key` alone, or for a list of one (None).

    `wanted` says in words what must stand there. `schema` is that of the short form, `long_schema` that of the long
    one where it is not the type's own.
    """

    key: str | None
    wanted: str
    schema: JsonSchemaValue
    long_schema: JsonSchemaValue | None = None
    kinds: tuple[type, ...] = (str,)

    def _long(self, data: Any) -> Any:
        if isinstance(data, self.kinds):
            return [data] if self.key is None else {self.key: data}
        if isinstance(data, list if self.key is None else dict):
            return data
        raise PydanticCustomError("kind", "{wanted}", {"wanted": self.wanted})

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._long, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> JsonSchemaValue:
        return {"anyOf": [self.schema, self.long_schema or handler(schema)]}


# --- types ---------------------------------------------------------------------------------------------------------

Version = Annotated[int, Field(ge=1, le=1), WithJsonSchema({"type": "integer", "const": 1})]
Text = Annotated[str, Field(pattern=TEXT, max_length=MAX_TEXT)]
Name = Annotated[str, Field(pattern=TEXT, max_length=MAX_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Digest = Annotated[str, StringConstraints(pattern=HEX_64, to_lower=True), Field(description="64 hexadecimal digits.")]
UNIQUE = Field(json_schema_extra={"uniqueItems": True})
Dtypes = Annotated[
    Annotated[list[Dtype], Field(min_length=1), UNIQUE],
    Short(None, "a dtype or a list of dtypes", {"enum": list(get_args(Dtype))}),
]
SeverityWord = Annotated[
    Literal["error", "warning", "off", "on"],
    BeforeValidator(lambda word: ("off", "on")[word] if isinstance(word, bool) else word),  # YAML reads both so
]


def _source(key: str, what: str) -> Short:
    schema = {"type": "string", "pattern": TEXT, "description": what}
    return Short(key, "text (a directory or a Hub id) or a mapping", schema)


# --- the mappings, from the inside out -----------------------------------------------------------------------------


class BaseEntry(Model):
    """The base that adapters are merged into."""

    model: Text | None = None
    """A directory (relative to this file), or a Hub id where no such directory exists. Without it, each adapter's
    own adapter_config.json names its base."""
    revision: Text | None = None
    """Hub commit, tag or branch; only with a Hub id. A commit is the safest. Put it in quotes where it could be a
    number. Default: the Hub's default branch."""
    dtype: Dtypes | None = None
    """The dtype to merge in: auto (as stored), float32, bfloat16, float16, or a list of them without repetition:
    each is checked and has its own entry in the report. Default: auto."""
    quantization: QuantizationWord | None = Field(
        None, description=f"How the base is quantised before the merge: {one_of(Quantization)}. Default: none."
    )


Base = Annotated[BaseEntry, _source("model", "A directory or a Hub id.")]


class CheckEntry(Model):
    """One check, with its limit."""

    if_empty = "give it a severity or a limit"

    severity: SeverityWord | None = None
    limit: Positive | None = None


def _check_field(row: Check) -> Any:
    """A check's own key: its severity alone, or a mapping, with a limit only where the check has one."""
    words = ["error", "warning", "off", "on", False, True] if row.can_be_off else ["error", "on", True]
    severity = {"enum": words, "description": "error fails the adapter, warning does not, off is silent."}
    limit = {"type": "number", "exclusiveMinimum": 0, "description": f"Fires above this. Default: {row.limit}."}
    both = {"severity": severity} | ({"limit": limit} if row.limit is not None else {})
    long = {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": both}
    wanted = "error, warning or off, or a mapping with severity and limit"
    entry = Annotated[CheckEntry, Short("severity", wanted, {"enum": words}, long, (str, bool))]
    return (entry | None, Field(None, description=f"{row.summary} Default: {row.severity}."))


Checks: Any = create_model("Checks", __base__=Model, **{name: _check_field(row) for name, row in CHECKS.items()})
Checks.kind = "check"


class LimitsEntry(Model):
    """What one adapter may cost."""

    if_empty = "give it seconds, or remove it"

    seconds: Positive | None = None
    """How long the worker may take over one adapter; one that takes longer is not judged. Default: a limit that grows
    with the base."""


class ExpectEntry(Model):
    """What must be so of the adapter."""

    if_empty = "state something, or remove it"

    peft_type: Annotated[str, StringConstraints(pattern=PEFT_TYPE, max_length=MAX_NAME, to_upper=True)] | None = None
    """The PEFT type, such as LORA; upper and lower case are the same."""
    r: Annotated[int, Field(ge=1)] | None = None
    """The adapter's rank."""
    lora_alpha: Number | None = None
    """The adapter's alpha."""
    base: Text | None = None
    """The base that adapter_config.json names."""
    sha256: Annotated[dict[Text, Digest], Field(min_length=1)] | None = None
    """SHA-256 digests of files, by name relative to the adapter's directory."""


def _only_with(key: str) -> JsonDict:
    return {"if": {"properties": {"method": {"enum": [*METHODS_WITH[key]]}}}, "else": {"properties": {key: False}}}


class CombineEntry(Model):
    """A weighted combination of listed adapters."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _only_with("density") | {"then": {"required": ["density"]}},
                _only_with("majority_sign_method"),
            ]
        }
    )

    method: Method = Field(NEEDED, description=f"The method of PEFT's add_weighted_adapter: {', '.join(METHODS)}.")
    adapters: Annotated[list[Name], Field(min_length=1, max_length=MAX_MEMBERS), UNIQUE] = NEEDED
    """The names of the adapters to combine, at most 100: each is listed under adapters, on the same base, and is not a
    combination."""
    weights: Annotated[list[Number], Field(min_length=1, max_length=MAX_MEMBERS)] = NEEDED
    """One weight per adapter, in their order."""
    density: Annotated[Positive, Field(le=1)] | None = None
    """The share of values that pruning keeps, above 0, at most 1. Needed by the methods ties, dare and
    magnitude_prune, not allowed with the others."""
    majority_sign_method: Literal["total", "frequency"] | None = None
    """How a sign is elected: by total or by frequency. Only with ties and dare_ties methods. Default: total."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the random methods (dare_*), recorded in the report. Default: 0."""


_FROM_PATH: JsonDict = {"required": ["path"], "properties": {"combine": False}}
_FROM_COMBINE: JsonDict = {
    "required": ["combine", "name"],
    "properties": {"path": False, "revision": False, "expect": False},
}


class AdapterEntry(Model):
    """One adapter, several by a glob, or a combination."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_FROM_PATH, _FROM_COMBINE]})

    name: Name | None = None
    """Name in the report, at most 200 characters. Every name is unique. Needed with combine, not allowed with a
    glob. Default: the last part of the path or Hub id."""
    path: Text | None = None
    """A directory (relative to this file), a glob over directories, or a Hub id owner/name."""
    combine: CombineEntry | None = None
    """Judge a weighted combination of other listed adapters; in place of path."""
    revision: Text | None = None
    """Hub commit, tag or branch; only with a Hub id. Default: the Hub's default branch."""
    base: Base | None = None
    """The base of this adapter; what is not given comes from the default."""
    checks: Checks | None = None
    """Checks of this adapter, laid over the file's."""
    limits: LimitsEntry | None = None
    """Limits of this adapter, laid over the file's."""
    expect: ExpectEntry | None = None
    """What must be so of this adapter; anything else is expectation-failed. Not with combine."""


Adapter = Annotated[AdapterEntry, _source("path", "A directory, a glob or a Hub id."), WrapValidator(or_hole)]


class FileEntry(Model):
    """Configuration of merge-gate."""

    model_config = ConfigDict(title="merge-gate configuration")

    version: Version = NEEDED
    """Version of this format: 1."""
    base: Base | None = None
    """The base of all adapters that do not name their own."""
    adapters: Annotated[list[Adapter], Field(min_length=1, max_length=MAX_ADAPTERS)] = NEEDED
    """The adapters to judge, at most 10,000 entries; a glob is one."""
    checks: Checks | None = None
    """Severity of each check (error, warning or off), or a mapping with severity and limit."""
    limits: LimitsEntry | None = None
    """What each adapter may cost."""
    allow_pickle: bool = Field(False, alias="allow-pickle")
    """Load pickled weights (.bin), with weights_only. Default: false, they are refused."""
    trust_remote_code: bool = Field(False, alias="trust-remote-code")
    """Run Python code that comes with the base. Default: false. Only for bases that you trust."""
    baseline: Text | None = None
    """A YAML file (relative to this file) of known failures that do not fail the run until their last day;
    `merge-gate report baseline` writes a first one. Default: none."""


_INSIDE = {"base": BaseEntry, "checks": Checks, "limits": LimitsEntry, "expect": ExpectEntry, "combine": CombineEntry}


def place_of_key(key: str, known: Container[str]) -> str:
    """Which of the known keys has a mapping in which `key` may stand; empty where none has."""
    return next((outer for outer, inside in _INSIDE.items() if outer in known and key in inside.model_fields), "")


# --- the JSON Schema -----------------------------------------------------------------------------------------------


class _Schema(GenerateJsonSchema):
    """An absent key is the only way to say nothing: no `null`, no `default: null`, no generated titles."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema["default"] in (None, NEEDED):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: ARG002
        return field["schema"].get("default") is NEEDED

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        needs_some = {"minProperties": 1} if schema["cls"].if_empty else {}
        return super().model_schema(schema) | {"additionalProperties": False} | needs_some

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the configuration, for editors and other programs."""
    schema = FileEntry.model_json_schema(by_alias=True, schema_generator=_Schema)
    one_line = json.dumps(schema).replace(r"\n", " ")  # a docstring's line breaks are not the sentence's
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.loads(one_line)}
