"""What may stand in a configuration: one strict model per mapping, the source of the JSON Schema as well.

In: plain data from the YAML file. Out: pydantic's errors, models of what is right, and the JSON Schema. Knows neither
files nor lines: problems.py gives errors their place and words. Imported only when a configuration is read, since
pydantic takes as long to import as the rest of the command line together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from merge_gate.config.load import MAX_NAME, MAX_TEXT
from merge_gate.judging.table import CHECKS

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import core_schema

    from merge_gate.judging.check import Check

TEXT = r"\S"
HEX_64 = r"^[0-9a-fA-F]{64}$"
PEFT_TYPE = r"^[A-Za-z][A-Za-z0-9_]*$"
PATTERNS = {
    TEXT: "some text",
    HEX_64: "64 hexadecimal digits, as sha256sum prints them",
    PEFT_TYPE: "a PEFT type such as LORA",
}
"""The patterns of the models, and what each one asks for."""

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
PRUNING = tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude")))
"""The methods that prune: they need `density`."""
SIGN_ELECTING = tuple(name for name in METHODS if "ties" in name)
"""The methods that elect a sign: they take `majority_sign_method`."""

MAX_MEMBERS = 100

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SEVERITY_WORDS: list[str | bool] = ["error", "warning", "off", "on", False, True]


@dataclass(frozen=True, eq=False)
class Short:
    """Says in the JSON Schema that a value may be written shorter; `Model.long` makes it the long form."""

    schema: JsonSchemaValue

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [self.schema, handler(schema)]}


Text = Annotated[str, Field(pattern=TEXT, max_length=MAX_TEXT)]
Name = Annotated[str, Field(pattern=TEXT, max_length=MAX_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
SeverityWord = Annotated[Literal["error", "warning", "off", "on"], WithJsonSchema({"enum": SEVERITY_WORDS})]
Dtypes = Annotated[
    Annotated[list[Dtype], Field(min_length=1, json_schema_extra={"uniqueItems": True})],
    Short({"enum": list(get_args(Dtype))}),
]


class Model(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def long(cls, data: Any) -> Any:
        """The mapping that a short form stands for."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, data: Any) -> Any:
        return cls.long(data)

    @classmethod
    def part(cls, data: dict[str, Any]) -> Self | None:
        """A model of values that have been found right; None where one is missing that must be there."""
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        if any(field.is_required() and key not in data for key, field in fields.items()):
            return None
        inner = {key: _model_in(field.annotation) for key, field in fields.items()}
        values: dict[str, Any] = dict(data)
        for key, model in inner.items():
            if model is not None and isinstance(data.get(key), str | dict):
                values[key] = model.part(model.long(data[key]))
        return cls.model_construct(None, **values)


def _model_in(annotation: Any, through: tuple[type, ...] = ()) -> type[Model] | None:
    """The model that a field holds; where it is a list or mapping of models, None or, `through` these, the model."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    origin = get_origin(annotation)
    inner = () if origin in {list, dict} and origin not in through else get_args(annotation)
    return next((model for one in inner if (model := _model_in(one, through))), None)


def keys_at(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that the mapping at `loc` of a file may have."""
    model: type[Model] = FileEntry
    for step in loc:
        field = model.model_fields.get(str(step))
        model = (field and _model_in(field.annotation, through=(list, dict))) or model
    return [field.alias or name for name, field in model.model_fields.items()]


class BaseEntry(Model):
    """The base that adapters are merged into."""

    model: Text | None = Field(
        None,
        description="A directory (relative to this file), or a Hub id where no such directory exists. Without it, each "
        "adapter's own adapter_config.json names its base.",
    )
    revision: Text | None = Field(
        None,
        description="Hub commit, tag or branch; only with a Hub id. A commit is the safest. Put it in quotes where it "
        "could be a number. Default: the Hub's default branch.",
    )
    dtype: Dtypes | None = Field(
        None,
        description="The dtype to merge in: auto (as stored), float32, bfloat16, float16, or a list of them without "
        "repetition: each is checked and has its own entry in the report. Default: auto.",
    )
    quantization: Literal["none", "bnb-8bit", "bnb-4bit"] | None = Field(
        None, description="How the base is quantised before the merge: none, bnb-8bit or bnb-4bit. Default: none."
    )

    @classmethod
    def long(cls, data: Any) -> Any:
        """A name alone is the model's, one dtype a list of one."""
        data = {"model": data} if isinstance(data, str) else data
        is_one = isinstance(data, dict) and isinstance(data.get("dtype"), str)
        return data | {"dtype": [data["dtype"]]} if is_one else data


Base = Annotated[BaseEntry, Short({"type": "string", "pattern": TEXT, "description": "A directory or a Hub id."})]


class CheckEntry(Model):
    """One check, with its limit."""

    severity: SeverityWord | None = None
    limit: Annotated[Number, Field(gt=0)] | None = None

    @classmethod
    def long(cls, data: Any) -> Any:
        """A severity alone, and YAML's `off` and `on`, which are booleans unless quoted."""
        data = {"severity": data} if isinstance(data, str | bool) else data
        is_switch = isinstance(data, dict) and isinstance(data.get("severity"), bool)
        return data | {"severity": "on" if data["severity"] else "off"} if is_switch else data


Checks = dict[str, Annotated[CheckEntry, Short({"enum": SEVERITY_WORDS})]]


class LimitsEntry(Model):
    """What one adapter may cost."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    seconds: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="How long the worker may take over one adapter; one that takes longer is not judged. Default: a "
        "limit that grows with the base.",
    )


class ExpectEntry(Model):
    """What must be so of the adapter."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    peft_type: Annotated[str, Field(pattern=PEFT_TYPE, max_length=MAX_NAME)] | None = Field(
        None, description="The PEFT type, such as LORA; upper and lower case are the same."
    )
    r: Annotated[int, Field(ge=1)] | None = Field(None, description="The adapter's rank.")
    lora_alpha: Number | None = Field(None, description="The adapter's alpha.")
    base: Text | None = Field(None, description="The base that adapter_config.json names.")
    sha256: (
        Annotated[
            dict[Text, Annotated[str, Field(pattern=HEX_64, description="64 hexadecimal digits.")]],
            Field(min_length=1),
        ]
        | None
    ) = Field(None, description="SHA-256 digests of files, by name relative to the adapter's directory.")


class CombineEntry(Model):
    """A weighted combination of listed adapters."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {"method": {"enum": list(PRUNING)}}},
                    "then": {"required": ["density"]},
                    "else": {"properties": {"density": False}},
                },
                {
                    "if": {"properties": {"method": {"enum": list(SIGN_ELECTING)}}},
                    "else": {"properties": {"majority_sign_method": False}},
                },
            ]
        }
    )

    method: Method = Field(description=f"The method of PEFT's add_weighted_adapter: {', '.join(METHODS)}.")
    adapters: Annotated[
        list[Name], Field(min_length=1, max_length=MAX_MEMBERS, json_schema_extra={"uniqueItems": True})
    ] = Field(
        description="The names of the adapters to combine, at most 100: each is listed under adapters, on the same "
        "base, and is not a combination."
    )
    weights: Annotated[list[Number], Field(min_length=1, max_length=MAX_MEMBERS)] = Field(
        description="One weight per adapter, in their order."
    )
    density: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        description="The share of values that pruning keeps, above 0, at most 1. Needed by the methods ties, dare and "
        "magnitude_prune, not allowed with the others.",
    )
    majority_sign_method: Literal["total", "frequency"] | None = Field(
        None,
        description="How a sign is elected: by total or by frequency. Only with ties and dare_ties methods. Default: "
        "total.",
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        0, description="Seed of the random methods (dare_*), recorded in the report. Default: 0."
    )


class AdapterEntry(Model):
    """One adapter, several by a glob, or a combination."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["path"], "properties": {"combine": False}},
                {"required": ["combine", "name"], "properties": {"path": False, "revision": False, "expect": False}},
            ]
        }
    )

    name: Name | None = Field(
        None,
        description="Name in the report, at most 200 characters. Every name is unique. Needed with combine, not "
        "allowed with a glob. Default: the last part of the path or Hub id.",
    )
    path: Text | None = Field(
        None,
        description="A directory (relative to this file), a glob over directories, or a Hub id owner/name.",
    )
    combine: CombineEntry | None = Field(
        None, description="Judge a weighted combination of other listed adapters; in place of path."
    )
    revision: Text | None = Field(
        None, description="Hub commit, tag or branch; only with a Hub id. Default: the Hub's default branch."
    )
    base: Base | None = Field(None, description="The base of this adapter; what is not given comes from the default.")
    checks: Checks | None = Field(None, description="Checks of this adapter, laid over the file's.")
    limits: LimitsEntry | None = Field(None, description="Limits of this adapter, laid over the file's.")
    expect: ExpectEntry | None = Field(
        None, description="What must be so of this adapter; anything else is expectation-failed. Not with combine."
    )

    @classmethod
    def long(cls, data: Any) -> Any:
        """Text alone is the path."""
        return {"path": data} if isinstance(data, str) else data


Adapter = Annotated[
    AdapterEntry, Short({"type": "string", "pattern": TEXT, "description": "A directory, a glob or a Hub id."})
]


class FileEntry(Model):
    """Configuration of merge-gate."""

    model_config = ConfigDict(title="merge-gate configuration")

    version: Annotated[int, Field(ge=1, le=1), WithJsonSchema({"type": "integer", "const": 1})] = Field(
        description="Version of this format: 1."
    )
    base: Base | None = Field(None, description="The base of all adapters that do not name their own.")
    adapters: Annotated[list[Adapter], Field(min_length=1)] = Field(description="The adapters to judge.")
    checks: Checks | None = Field(
        None, description="Severity of each check (error, warning or off), or a mapping with severity and limit."
    )
    limits: LimitsEntry | None = Field(None, description="What each adapter may cost.")
    allow_pickle: bool = Field(
        False,
        alias="allow-pickle",
        description="Load pickled weights (.bin), with weights_only. Default: false, they are refused.",
    )
    trust_remote_code: bool = Field(
        False,
        alias="trust-remote-code",
        description="Run Python code that comes with the base. Default: false. Only for bases that you trust.",
    )


class _Schema(GenerateJsonSchema):
    """An absent key is the only way to say nothing: no `null`, no `default: null`, no generated titles."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def build_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the configuration."""
    schema = FileEntry.model_json_schema(by_alias=True, schema_generator=_Schema)
    definitions = schema["$defs"]
    del definitions["CheckEntry"]
    definitions["Checks"] = _checks_schema()
    for owner in (schema, definitions["AdapterEntry"]):
        checks = owner["properties"]["checks"]
        owner["properties"]["checks"] = {"description": checks["description"], "$ref": "#/$defs/Checks"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _checks_schema() -> dict[str, Any]:
    """Return one described key per check, with a limit only where the check has one."""
    properties = {check: _check_schema(default) for check, default in CHECKS.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _check_schema(default: Check) -> dict[str, Any]:
    words = SEVERITY_WORDS if default.can_be_off else ["error", "on", True]
    severity = {"enum": words, "description": "error fails the adapter, warning does not, off is silent."}
    limit = {"type": "number", "exclusiveMinimum": 0, "description": f"Fires above this. Default: {default.limit}."}
    long = {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "properties": {"severity": severity} | ({"limit": limit} if default.limit is not None else {}),
    }
    return {"description": f"{default.summary} Default: {default.severity}.", "anyOf": [{"enum": words}, long]}
