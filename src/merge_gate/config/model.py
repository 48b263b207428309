"""Declares the keys of a configuration: one strict model per mapping, from which the JSON Schema is made.

Plain data of the YAML file goes in; models come out. `problems.py` words pydantic's errors. The docstring of a field
appears in editors and in the document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model
from pydantic.config import JsonDict
from pydantic.functional_validators import (
    AfterValidator,
    BeforeValidator,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, WithJsonSchema
from pydantic.types import StringConstraints
from pydantic_core import PydanticCustomError, ValidationError, core_schema
from typing_extensions import TypeAliasType

from merge_gate._internal.text import SIZE, is_inside, one_of
from merge_gate.judging.checks.check import Check
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.policies import DEFAULT, POLICIES
from merge_gate.records.config import ALL_WEIGHTS, FILE_KEYS
from merge_gate.records.features import WordKey, declared_keys
from merge_gate.records.terms import DTYPES, Quantization

_Record = TypeVar("_Record")

MAX_NAME = 200
MAX_TEXT = 4096
MAX_MEMBERS = 100
MAX_ADAPTERS = 10_000

TEXT = r"\S"
HEX_64 = r"^[0-9a-fA-F]{64}$"
DATE = r"^\d{4}-\d\d-\d\d$"
PEFT_TYPE = r"^[A-Za-z][A-Za-z0-9_]*$"
Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
METHODS_WITH = {
    "density": tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude"))),
    "majority_sign_method": tuple(name for name in METHODS if "ties" in name),
}
"""The methods that take a key: pruning needs `density`; electing a sign allows `majority_sign_method`."""

Dtype: TypeAlias = Literal[("auto", *DTYPES)]  # type: ignore[valid-type] # mypy cannot read words from a tuple
QuantizationWord: TypeAlias = Literal[tuple(map(str, Quantization))]  # type: ignore[valid-type] # or from an Enum


# --- models --------------------------------------------------------------------------------------------------------

VALID_PARTS = "valid parts"
"""The context of a validation that puts None in place of each invalid value, so that the rest can still be checked."""


def _or_none(value: Any, handler: Any, info: ValidationInfo) -> Any:
    try:
        return handler(value)
    except ValidationError:
        if info.context == VALID_PARTS:
            return None
        raise


OR_NONE = WrapValidator(_or_none)


class Model(BaseModel):
    """A mapping, without conversions and unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    needs_keys: ClassVar[bool] = False

    _keep_valid_parts = field_validator("*", mode="wrap")(_or_none)

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        if self.needs_keys and not self.model_fields_set:
            raise PydanticCustomError("empty", "Input should have a key")
        return self

    def record(self, cls: type[_Record], **more: Any) -> _Record:
        """Make a record of the fields that both have, and `more`. Keys that are not given have the record's default."""
        names = self.model_fields_set & {field.name for field in fields(cls)}  # type: ignore[arg-type] # it is a record
        return cls(**{name: _hashable(getattr(self, name)) for name in names} | more)


def _hashable(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value


class ShortForm:
    """Allows the value of a mapping's `key` alone, instead of the mapping; or an item alone, if `key` is None.

    `schema` is the JSON Schema of the short form.
    """

    def __init__(self, key: str | None, schema: JsonSchemaValue) -> None:
        self.key, self.schema = key, schema

    def _long(self, data: Any) -> Any:
        if self.key is None:
            return data if isinstance(data, list) else [data]
        return data if isinstance(data, dict) else {self.key: data}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._long, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> JsonSchemaValue:
        return {"anyOf": [self.schema, handler(schema)]}


def _short_text(key: str, description: str, pattern: str = TEXT) -> ShortForm:
    return ShortForm(key, {"type": "string", "pattern": pattern, "description": description})


# --- types ---------------------------------------------------------------------------------------------------------

Version = Annotated[int, Field(ge=1, le=1), WithJsonSchema({"type": "integer", "const": 1})]
Text = Annotated[str, Field(pattern=TEXT, max_length=MAX_TEXT)]
Name = Annotated[str, Field(pattern=TEXT, max_length=MAX_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Digest = Annotated[str, StringConstraints(pattern=HEX_64, to_lower=True), Field(description="64 hexadecimal digits.")]


def _inside(name: str) -> str:
    if is_inside(name):
        return name
    raise PydanticCustomError("outside", "Input should be a file inside the directory, relative to it, written with /")


Digests = Annotated[dict[Annotated[Text, AfterValidator(_inside)], Digest], Field(min_length=1)]
BaseDigests = Annotated[Digests, _short_text(ALL_WEIGHTS, "The digest of all weight files.", HEX_64)]
UNIQUE = Field(json_schema_extra={"uniqueItems": True})
Dtypes = Annotated[
    Annotated[list[Dtype], Field(min_length=1), UNIQUE],
    ShortForm(None, {"enum": list(get_args(Dtype))}),
]
_WORD = BeforeValidator(lambda word: ("off", "on")[word] if isinstance(word, bool) else word)  # as YAML reads both
SeverityWord = Annotated[Literal["error", "warning", "off", "on"], _WORD]


def _with_keys(model: type[Model], rows: Mapping[str, WordKey]) -> Any:
    """The model with these keys."""
    keys: dict[str, Any] = {}
    for key, row in rows.items():
        words: Any = Literal[tuple(map(str, row.words))]
        if "off" in get_args(words):
            words = Annotated[words, _WORD, WithJsonSchema({"enum": [*get_args(words), False]})]
        keys[key] = (words | None, Field(None, description=row.description.format(one_of(row.words))))
    return create_model(f"{model.__name__}Keys", __base__=model, **keys)


# --- the mappings, from the inside out -----------------------------------------------------------------------------


class _BaseEntry(Model):
    model: Text | None = None
    """A directory (relative to this file), or a Hub id if no such directory exists. hub:owner/name is always a Hub id.
    Without it, each adapter's adapter_config.json names its base."""
    revision: Text | None = None
    """Hub commit, tag or branch; only with a Hub id. A commit is the safest. Put it in quotes if it could be a
    number. Default: the Hub's default branch."""
    sha256: BaseDigests | None = None
    """The SHA-256 of the base: the digest that the report shows as bases[].sha256, or a mapping of files to digests,
    by name relative to the base's directory. With another base, expectation-failed fires."""
    dtype: Dtypes | None = None
    """The dtype to merge in: auto (as stored), float32, bfloat16, float16, or a list without repetition. Each dtype
    is checked and has its own entry in the report. Default: auto."""
    quantization: QuantizationWord | None = Field(
        None, description=f"How the base is quantized before the merge: {one_of(Quantization)}. Default: none."
    )


class BaseEntry(_with_keys(_BaseEntry, declared_keys("BASE_KEYS"))):  # type: ignore[misc] # mypy cannot see a made class
    """The base that adapters are merged into."""

    names: Annotated[list[Text], Field(min_length=1, max_length=MAX_MEMBERS), UNIQUE] | None = None
    """Other names of the same base, such as the Hub id of a local copy. An adapter_config.json that gives one of them
    does not fire base-mismatch."""


Base = Annotated[BaseEntry, _short_text("model", "A directory or a Hub id.")]


class CheckEntry(Model):
    """One check, with its severity."""

    needs_keys = True

    severity: SeverityWord | None = None


class FixedCheckEntry(CheckEntry):
    """One check that cannot be off."""

    severity: Annotated[Literal["error", "on"], _WORD] | None = None


def _setting(model: type[CheckEntry], limits: Mapping[str, JsonSchemaValue], *, can_be_off: bool) -> Any:
    """The type of a check's value: its severity alone, or a mapping, with a limit if the check has one."""
    words = ["error", "warning", "off", "on", False, True] if can_be_off else ["error", "on", True]
    severity = {"enum": words, "description": "error fails the adapter, warning does not, off is silent."}
    properties = {"severity": severity, **limits}
    long = {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": properties}
    return Annotated[model, ShortForm("severity", {}), WithJsonSchema({"anyOf": [{"enum": words}, long]})]


_WITHOUT_LIMIT = {
    True: TypeAliasType("Severity", _setting(CheckEntry, {}, can_be_off=True)),
    False: TypeAliasType("FixedSeverity", _setting(FixedCheckEntry, {}, can_be_off=False)),
}
"""The types of checks without a limit. They are named, so that the JSON Schema has each once."""


def _check_field(row: Check) -> Any:
    setting: Any = _WITHOUT_LIMIT[row.can_be_off]
    if row.limit is not None:
        number: Any = Annotated[Positive, Field(le=1)] if row.limit_is_share else Positive
        schema = {"type": "number", "exclusiveMinimum": 0} | ({"maximum": 1} if row.limit_is_share else {})
        keys: Any = {"limit": (number | None, None)}
        limits = {"limit": schema | {"description": f"Fires above this. Default: {row.limit}."}}
        if row.error_limit is not None:
            default = "none" if row.error_limit == math.inf else f"{row.error_limit:g}"
            keys["error_limit"] = (number | None, Field(None, alias="error-limit"))
            limits["error-limit"] = schema | {"description": f"A warning above this is an error. Default: {default}."}
        if row.wiped is not None:
            keys["wiped"] = (Literal["error", "warning"] | None, None)
            words = {"enum": ["error", "warning"]}
            limits["wiped"] = words | {
                "description": f"A weight matrix that the merge turns into zeros. Default: {row.wiped}."
            }
        model = create_model("LimitedCheckEntry", __base__=CheckEntry, **keys)
        setting = _setting(model, limits, can_be_off=row.can_be_off)
    return (setting | None, Field(None, description=f"{row.summary} Default: {row.severity}."))


Checks: Any = create_model("Checks", __base__=Model, **{name: _check_field(row) for name, row in CHECKS.items()})


class LimitsEntry(Model):
    """Limits on the judging of one adapter."""

    needs_keys = True

    seconds: Positive | None = None
    """How many seconds the worker may spend on one adapter. An adapter that needs longer is not judged. Default: a
    limit that grows with the base."""


class ExpectEntry(Model):
    """Facts that the adapter must match."""

    needs_keys = True

    peft_type: Annotated[str, StringConstraints(pattern=PEFT_TYPE, max_length=MAX_NAME, to_upper=True)] | None = None
    """The PEFT type, such as LORA; upper and lower case are the same."""
    r: Annotated[int, Field(ge=1)] | None = None
    """The adapter's rank."""
    lora_alpha: Number | None = None
    """The adapter's alpha."""
    projection_prng_key: int | None = None
    """The seed of the projections (VeRA), which no file proves if they are not saved."""
    base: Text | None = None
    """The base that adapter_config.json names."""
    sha256: Digests | None = None
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

    method: Method = Field(description=f"The method of PEFT's add_weighted_adapter: {', '.join(METHODS)}.")
    adapters: Annotated[list[Name], Field(min_length=1, max_length=MAX_MEMBERS), UNIQUE]
    """The names of the adapters to combine, at most 100. Each is listed under adapters, has the same base, and is not
    a combination."""
    weights: Annotated[list[Number], Field(min_length=1, max_length=MAX_MEMBERS)]
    """One weight per adapter, in their order."""
    density: Annotated[Positive, Field(le=1)] | None = None
    """The share of values that pruning keeps, above 0 and at most 1. The methods ties, dare and magnitude_prune need
    it; the others do not allow it."""
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
    """Name in the report, unique, at most 200 characters. Required with combine, not allowed with a glob. Default:
    the last part of the path or Hub id."""
    path: Text | None = None
    """A directory (relative to this file), a glob over directories, or a Hub id: owner/name or hub:owner/name."""
    combine: CombineEntry | None = None
    """Judge a weighted combination of other listed adapters, instead of a path."""
    revision: Text | None = None
    """Hub commit, tag or branch; only with a Hub id. Default: the Hub's default branch."""
    base: Base | None = None
    """The base of this adapter. Keys that are not given come from the file's base."""
    checks: Checks | None = None
    """Checks of this adapter. They override the file's checks."""
    limits: LimitsEntry | None = None
    """Limits of this adapter. They override the file's limits."""
    expect: ExpectEntry | None = None
    """Facts that this adapter must match; otherwise expectation-failed fires. Not with combine."""


Adapter = Annotated[AdapterEntry, _short_text("path", "A directory, a glob or a Hub id."), OR_NONE]


class PublishEntry(Model):
    """Where merged models are published, and how."""

    directory: Text
    """The directory of all models (relative to this file). Each adapter that passes gets a directory in it."""
    dtype: Literal[("preserve", *DTYPES)] = "preserve"  # type: ignore[valid-type] # as above
    """preserve keeps the dtype of each stored tensor. With a dtype, every floating tensor is cast to it, and
    the merge in that dtype is judged. Default: preserve."""
    max_shard_size: Annotated[str, Field(pattern=SIZE)] | None = Field(None, alias="max-shard-size")
    """The most bytes of tensors in one file, such as 5GB. Default: the files of the base."""


class _FileEntry(Model):
    version: Version
    """Version of this format: 1."""
    base: Base | None = None
    """The base of all adapters that do not name their own."""
    adapters: Annotated[list[Adapter], Field(min_length=1, max_length=MAX_ADAPTERS)]
    """The adapters to judge, at most 10,000 entries. A glob is one entry."""
    policy: Literal[tuple(POLICIES)] = DEFAULT  # type: ignore[valid-type] # as above
    """A preset of strictness: default or release, which makes warnings errors and refuses what is not pinned. The keys
    of checks override it. Default: default."""
    checks: Checks | None = None
    """Severity of each check (error, warning or off), or a mapping with severity and limit."""
    limits: LimitsEntry | None = None
    """Limits on the judging of each adapter."""
    publish: Annotated[PublishEntry, _short_text("directory", "A directory.")] | None = None
    """Publish the merged model of each adapter that passes. Default: publish nothing."""


class FileEntry(_with_keys(_FileEntry, FILE_KEYS)):  # type: ignore[misc] # as above
    """Configuration of merge-gate."""

    model_config = ConfigDict(title="merge-gate configuration")

    allow_pickle: bool = Field(False, alias="allow-pickle")
    """Load pickled weights (.bin), with weights_only. Default: false, which refuses them."""
    trust_remote_code: bool = Field(False, alias="trust-remote-code")
    """Run Python code that comes with the base. Default: false. Only for bases that you trust."""
    baseline: Text | None = None
    """A YAML file (relative to this file) of known failures that do not fail the run until their last day.
    `merge-gate report baseline` writes a first version. Default: none."""
