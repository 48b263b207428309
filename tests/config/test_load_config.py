"""The configuration: what is read, every way in which it can be wrong, and that schema and documentation agree."""

# ruff: noqa: E501 (a problem stands in one line, as it is printed)

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft.tuners.lora.model import LoraModel

from merge_gate._internal.errors import ConfigError
from merge_gate.config.load_config import MAX_BYTES, load_config
from merge_gate.config.model import (
    METHODS,
    AdapterEntry,
    BaseEntry,
    CombineEntry,
    Dtype,
    ExpectEntry,
    FileEntry,
    LimitsEntry,
)
from merge_gate.config.yaml_document import read_yaml
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.policies import POLICIES, Policy
from merge_gate.records.config import AdapterSpec, Config, Problem
from merge_gate.records.terms import DTYPES, Access, Quantization, Severity
from tests.support.config.invalid import COMBINE, DIGEST, DIRECTORIES, HEAD, KNOWN, LIST, ROOT, WRONG
from tests.support.generated import held
from tests.support.properties import examples
from tests.support.schemas import baseline_schema, config_schema, stored

DOCS = ROOT / "docs/reference/configuration.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.yml"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the adapters and bases that the documents here name."""
    for name in DIRECTORIES:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapters/weights.safetensors").touch()
    return tmp_path


def load(place: Path, text: str | bytes) -> Config:
    file = place / "merge-gate.yml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(str(file))


def problems(place: Path, text: str | bytes) -> list[str]:
    """The problems as `line:column: message (hint)`."""
    with pytest.raises(ConfigError) as caught:
        load(place, text)
    prefix = f"{place}/merge-gate.yml:"
    assert all(str(problem).startswith(prefix) for problem in caught.value.problems)
    return [str(problem).removeprefix(prefix) for problem in caught.value.problems]


def one(place: Path, entry: str) -> AdapterSpec:
    return load(place, f"version: 1\nadapters:\n  - {entry}\n").adapters[0]


def severity(spec: AdapterSpec, check: str) -> Severity:
    return next(setting.severity for setting in spec.checks if setting.check == check)


# --- what is read: tests/config/messages.txt has more ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("off", Severity.OFF), ("'off'", Severity.OFF), ("Off", Severity.OFF), ("no", Severity.OFF),
        ("false", Severity.OFF), ("on", Severity.WARNING), ("'on'", Severity.WARNING), ("true", Severity.WARNING),
        ("error", Severity.ERROR), ("warning", Severity.WARNING), ("{severity: off}", Severity.OFF),
        ("{severity: on}", Severity.WARNING), ("{severity: error}", Severity.ERROR), ("{limit: 0.2}", Severity.OFF),
    ],
)  # fmt: skip
def test_severities_quoted_or_not(place: Path, word: str, expected: Severity) -> None:
    text = "version: 1\nadapters: [{path: ./adapters/support, checks: {headroom: %s}}]\nchecks: {headroom: off}\n"
    assert severity(load(place, text % word).adapters[0], "headroom") is expected


def test_paths_are_relative_to_the_file(place: Path, cwd) -> None:
    (place / "merge-gate.yml").write_text("version: 1\nadapters: [./adapters/support, adapters/../adapters/billing/]\n")
    os.chdir(place / "models")
    config = load_config("../merge-gate.yml")
    assert [spec.path for spec in config.adapters] == [str(place / "adapters/support"), str(place / "adapters/billing")]
    assert (config.path, config.label) == ("../merge-gate.yml", "../merge-gate.yml")


def test_home_and_absolute_paths_and_globs(place: Path, variables) -> None:
    variables["HOME"] = str(place)
    assert one(place, "~/adapters/support").path == str(place / "adapters/support")
    assert one(place, f"{place}/adapters/support").name == "support"
    assert one(place, "'~/adapters/team-[a]'").path == str(place / "adapters/team-a")
    assert one(place, f"'{place}/adapters/team-?'").source == f"{place}/adapters/team-a"


def test_a_directory_with_brackets_in_its_name_is_no_glob(place: Path) -> None:
    (place / "adapters/r[16]").mkdir()
    assert one(place, "'./adapters/r[16]'").name == "r[16]"


def test_a_directory_whose_name_is_not_utf_8_is_found_by_a_glob(place: Path) -> None:
    os.mkdir(os.fsencode(place / "adapters") + b"/team-caf\xe9")  # noqa: PTH102
    config = load(place, HEAD + "  - ./adapters/team-*\n")
    assert [os.fsencode(spec.name) for spec in config.adapters] == [b"team-a", b"team-b", b"team-caf\xe9"]


def test_a_name_that_is_too_long_is_refused_at_its_place(place: Path) -> None:
    (place / ("n" * 201)).mkdir()
    found = problems(place, HEAD + f"  - base: ./models/base\n    path: ./{'n' * 201}\n")
    assert [problem.split(": ")[0] for problem in found] == ["4:11"]
    (place / ("n" * 200)).mkdir()
    assert one(place, f"./{'n' * 200}").name == "n" * 200


def test_a_file_has_a_digest_and_every_check_a_setting(place: Path) -> None:
    config = load(place, LIST)
    assert config.sha256 == hashlib.sha256(LIST.encode()).hexdigest()
    assert [setting.check for setting in config.adapters[0].checks] == list(CHECKS)
    hash(config)
    assert load(place, b"\xef\xbb\xbf" + LIST.encode()).adapters == config.adapters, "after a byte order mark"


@pytest.mark.parametrize("switch", ["allow-pickle", "trust-remote-code"])
def test_a_switch_is_off_until_it_is_switched_on(switch: str, place: Path) -> None:
    field = switch.replace("-", "_")
    assert getattr(load(place, LIST), field) is False
    assert getattr(load(place, LIST + f"{switch}: false\n"), field) is False
    assert getattr(load(place, LIST + f"{switch}: true\n"), field) is True


def test_a_glob_starts_in_a_directory_whose_name_looks_like_one(place: Path) -> None:
    odd = place / "odd[1]"
    (odd / "team-a").mkdir(parents=True)
    assert one(odd, "./team-*").path == str(odd / "team-a")


def with_baseline(place: Path, text: str) -> Config:
    (place / "known.yml").write_text(text, encoding="utf-8")
    return load(place, LIST + "baseline: known.yml\n")


def test_a_baseline_is_read(place: Path) -> None:
    (one,) = with_baseline(place, KNOWN + "    also: [headroom]\n").baseline
    assert (one.adapter, one.cause, one.also) == (DIGEST, "no-effect", ("headroom",))
    assert (one.reason, one.owner, one.until, one.line) == ("a stub", "team-a", "2026-12-31", 3)


def test_a_file_that_is_not_utf_8_is_named(place: Path) -> None:
    with_baseline(place, KNOWN)
    (place / "known.yml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"known\.yml:1:1"):
        load_config(str(place / "merge-gate.yml"))


# --- what is wrong, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRONG)
def test_a_problem_names_its_place(place: Path, case: str) -> None:
    text, expected = WRONG[case]
    found = problems(place, text)
    assert expected in [problem.split(": ")[0] for problem in found]
    assert all("Input should" not in problem and "pydantic" not in problem for problem in found)


SEVERAL = {"tag of another kind", "another base", "revision beyond floats"}


@pytest.mark.parametrize("case", sorted(set(WRONG) - SEVERAL))
def test_one_mistake_is_one_problem(place: Path, case: str) -> None:
    """No problem has another in its wake."""
    found = problems(place, WRONG[case][0])
    assert len(found) == 1, found


def test_all_problems_at_once_in_the_order_of_the_file(place: Path) -> None:
    text = """\
version: 2
bse: x
base:
  model: ./models/bas
  dtype: [bf16, float32]
adapters:
  - ./adapters/suport
  - path: ./adapters/support
    revision: 1e5
    revison: x
    checks: {no-efect: warning, merged-nonfinite: off}
  - ./adapters/support
  - name: both
    combine: {method: ties, adapters: [support, nobody], weights: [1]}
  -
checks: {headroom: {limit: -1}}
version: 1
"""
    places = [problem.split(": ")[0] for problem in problems(place, text)]
    assert places == [
        "1:10", "2:1", "4:10", "5:11", "7:5", "9:15", "10:5", "11:14", "11:51", "12:5", "14:23", "14:67", "15:4",
        "16:28", "17:1",
    ]  # fmt: skip


def test_a_mistake_hides_no_other_in_its_entry(place: Path) -> None:
    text = HEAD + "  - ./a/x\n  - {name: q, combine: {metod: ties, adapters: [x, x], weights: [1], seed: -1}}\n"
    places = [problem.split(": ")[0] for problem in problems(place, text)]
    assert places == ["4:24", "4:25", "4:52", "4:65", "4:76"]


def test_aliases_cannot_lead_deeper_than_lists_can(place: Path) -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}}}\n" for n in range(1, 2000))
    merges = "m: &m0 {a: 1}\n" + "".join(f"m: &m{n} {{<<: *m{n - 1}}}\n" for n in range(1, 2000)) + "z: *m1999\n"
    for text in (chain, merges):
        assert any("aliases" in problem and "32" in problem for problem in problems(place, text))


def test_an_unknown_member_waits_for_entries_that_are_unreadable(place: Path) -> None:
    found = problems(place, COMBINE + "{method: cat, adapters: [suport], weights: [1]}\n  - ./adapters/suport\n")
    assert [problem.split(": ")[0] for problem in found] == ["7:5"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_largest_file_is_read(place: Path) -> None:
    text = LIST.encode() + b"#"
    assert load(place, text + b"#" * (MAX_BYTES - len(text))).adapters


def test_aliases_cannot_explode(place: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    bomb += "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{x: *m{n - 1}, y: *m{n - 1}}}\n" for n in range(1, 25))
    assert "100,000" in problems(place, bomb)[0]


def test_hostile_directory_names_are_escaped(place: Path) -> None:
    (place / "adapters/team-\n::error::x").mkdir()
    found = problems(place, HEAD + "  - ./adapters/team-*\n")
    assert len(found) == 1
    assert found[0].startswith("3:5: ")
    assert '"./adapters/team-\\n::error::x"' in found[0]


# --- anything at all -------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *FileEntry.model_fields, *AdapterEntry.model_fields, *BaseEntry.model_fields, *CombineEntry.model_fields,
        *ExpectEntry.model_fields, *CHECKS, *METHODS, "allow-pickle", "off", "on", "severity", "limit", "auto",
        "./adapters/support", "./adapters/*", "acme/x", "~", "\x00", "\ud800", "\u202e", "<<", "*", "",
    ]
)  # fmt: skip
SCALARS = WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4))
WHOLE = st.fixed_dictionaries(
    {"version": st.just(1) | SCALARS, "adapters": st.lists(DATA, max_size=3) | DATA},
    optional={"base": DATA, "checks": DATA, "allow-pickle": SCALARS, "zzz": DATA},
)
FUZZ = settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(place: Path, text: bytes) -> tuple[Problem, ...]:
    try:
        assert load(place, text).adapters
    except ConfigError as error:
        return error.problems or (Problem(message="", path="", line=0, column=0),)
    return ()


def read_or_refuse(place: Path, text: bytes) -> None:
    """Either it is valid, or there are problems with words and a place inside the text. Nothing else is raised."""
    lines = text.count(b"\n") + text.count(b"\r") + text.count(b"\xc2\x85") + text.count(b"\xe2\x80") + 2
    for problem in outcome(place, text):
        assert 1 <= problem.line <= lines
        assert problem.column >= 1
        assert problem.message
        assert "Input should" not in str(problem)
        str(problem).encode()


@FUZZ
@given(text=st.text())
@example("&a [*a]")
@example("{? {a: b} : c}")
@example("!!set {a}")
@example("!<tag:yaml.org,2002:int> [")
@example("!!float _")
@example("%YAML 9.9\n---\na")
@example("'\\")
def test_any_text_is_read_or_refused(place: Path, text: str) -> None:
    read_or_refuse(place, text.encode("utf-8", "surrogatepass"))


@FUZZ
@given(data=st.binary())
def test_any_bytes_are_read_or_refused(place: Path, data: bytes) -> None:
    read_or_refuse(place, data)


@FUZZ
@given(text=st.text(alphabet=st.sampled_from("[]{}:,-?&*!|>'\"%@`#~<ab01. \n\t"), max_size=60))
def test_any_yaml_punctuation_is_read_or_refused(place: Path, text: str) -> None:
    read_or_refuse(place, b"version: 1\nadapters:\n" + text.encode())


@FUZZ
@given(data=WHOLE)
def test_any_values_are_read_or_refused(place: Path, data: object) -> None:
    """JSON is YAML, so that any structure can be written down."""
    read_or_refuse(place, json.dumps(data).encode())


# --- the schema, the table and the documentation ---------------------------------------------------------------------


def plain(text: str) -> object:
    document = read_yaml(text, "merge-gate.yml")
    assert not document.problems
    return document.data


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(("document", "made"), [("config", config_schema), ("baseline", baseline_schema)])
def test_the_stored_schema_is_the_current_one(document: str, made: Callable[[], object]) -> None:
    assert stored(document, made()) == made(), "look at the difference, then run make schemas"


def test_every_key_of_the_schema_is_described() -> None:
    def undescribed(schema: object, where: str = "") -> list[str]:
        if isinstance(schema, list):
            return [name for item in schema for name in undescribed(item, where)]
        if not isinstance(schema, dict):
            return []
        properties = schema.get("properties", {})
        here = [
            f"{where}.{key}"
            for key, value in properties.items()
            if isinstance(value, dict) and value.keys() != {"enum"} and "description" not in value
        ]
        return here + [name for key, value in schema.items() for name in undescribed(value, f"{where}.{key}")]

    assert undescribed(config_schema()) == []


def objects(schema: object) -> list[dict]:
    found = [schema] if isinstance(schema, dict) and schema.get("type") == "object" else []
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return found + [item for value in inner for item in objects(value)]


def test_no_mapping_of_the_schema_takes_unknown_keys() -> None:
    mappings = objects(config_schema())
    assert len(mappings) > 10
    for mapping in mappings:
        assert mapping.get("additionalProperties") is False or "properties" not in mapping


BEYOND_SCHEMA = {
    "error limit below the limit",
    # directories, names and digests of the file system and of other entries
    "path below its entry", "no directory", "no directory, nothing near", "no parent", "windows path", "home", "home of nobody",
    "mistyped, not the Hub", "no Hub id", "too many parts", "variable", "backslashes", "revision in the name", "URL", "a file", "no match", "only files match",
    "two stars", "too long for the system", "glob too long for the system", "name of a glob", "revision of a glob", "revision of a directory", "duplicate name",
    "the same twice", "duplicate in a glob", "duplicate given name", "name of the root", "no base",
    "base revision alone", "base revision of a directory", "outside", "absolute", "blank file", "unknown member",
    "pin outside", "unpinned adapter", "unpinned adapter without a revision", "unpinned base", "unpinned base of an adapter",
    "itself", "weights", "another base",
    # a number without a fraction is an integer in JSON Schema
    "version as float", "rank as float",
}  # fmt: skip
YAML_ONLY = [case for case in WRONG if case not in BEYOND_SCHEMA]


@pytest.mark.parametrize("case", YAML_ONLY)
def test_the_schema_refuses_what_the_loader_refuses(validator: jsonschema.Draft202012Validator, case: str) -> None:
    try:
        document = read_yaml(WRONG[case][0], "merge-gate.yml")
    except ConfigError:
        return  # not YAML: no editor gets as far as the schema
    # JSON has no infinities: what the loader calls not finite never reaches a JSON Schema
    infinite = re.search(r"\b(Infinity|NaN)\b", json.dumps(document.data, default=str)) is not None
    assert document.problems or infinite or not validator.is_valid(document.data)


@pytest.mark.parametrize("case", sorted(BEYOND_SCHEMA))
def test_what_only_the_loader_can_see(validator: jsonschema.Draft202012Validator, case: str) -> None:
    """The list above stays true: where the schema learns to see one of these, it leaves the list."""
    assert validator.is_valid(plain(WRONG[case][0]))


SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
DOCUMENTS = [path.read_text() for path in EXAMPLES] + SNIPPETS


assert len(DOCUMENTS) >= 10


@pytest.mark.parametrize("text", DOCUMENTS)
def test_examples_and_documentation_are_valid(place, validator, text) -> None:
    validator.validate(plain(text))
    assert load(place, text).adapters


def policies_table() -> str:
    """What `release` sets, from the fields of its policy: a new field needs a row."""
    release = POLICIES["release"]
    rows = [
        (f"`{check}`", str(CHECKS[check].severity), "error", f"`checks: {{{check}: …}}`")
        for check in CHECKS
        if check in release.errors
    ]
    words = {
        "of_base": ("a warning with the origin `base`", "warning", "error", "the severity of its check"),
        "needs_pins": (
            "an adapter or a base on the Hub without a full commit (for a base, `sha256` does not replace it)",
            "fetched",
            "refused, exit code 2; if adapter_config.json names the base, the verdict is `error`",
            "`revision`",
        ),
        "needs_known_variables": (
            "an unknown variable `MERGE_GATE_…`",
            "warning on standard error",
            "refused, exit code 2",
            "",
        ),
    }
    rows += [words[field.name] for field in fields(Policy) if field.name != "errors" and getattr(release, field.name)]
    table = ["| what | `default` | `release` | overridden by |", "|---|---|---|---|"]
    return "\n".join([*table, *(f"| {' | '.join(row)} |" for row in rows)])


def test_the_documented_table_of_policies_is_the_real_one() -> None:
    held(DOCS, "policies", policies_table())


KINDS = {"string": "text", "integer": "whole number", "array": "list", "object": "mapping"}


def kinds(schema: dict) -> list[str]:
    """The types of a value in words, each once."""
    if "const" in schema:
        return [f"`{schema['const']}`"]
    if "enum" in schema:
        return ["text"]
    inner = [kind for one in schema.get("anyOf", ()) for kind in kinds(one)]
    return list(dict.fromkeys(inner)) or [KINDS.get(schema.get("type", "object"), schema.get("type", "mapping"))]


def keys_table(model: type) -> str:
    whole = config_schema()
    schema = whole if model is FileEntry else whole["$defs"][model.__name__]
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for key, facts in schema["properties"].items():
        needed = "Required. " if key in schema.get("required", ()) else ""
        rows.append(f"| `{key}` | {' or '.join(kinds(facts))} | {needed}{facts['description']} |")
    return "\n".join(rows)


@pytest.mark.parametrize("model", [FileEntry, BaseEntry, AdapterEntry, CombineEntry, ExpectEntry, LimitsEntry])
def test_every_key_is_documented_as_a_table_of_the_models(model: type) -> None:
    held(DOCS, f"keys of {model.__name__}", keys_table(model))


def test_the_tables_rules() -> None:
    assert [check for check, row in CHECKS.items() if not row.can_be_off] == [
        "base-incomplete",
        "base-inconsistent",
        "base-format",
        "base-nonfinite",
        "merged-nonfinite",
    ]
    always = ", ".join(f"`{check}`" for check, row in CHECKS.items() if not row.can_be_off)
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"{always.replace(', `merged', ', and `merged')} are always errors" in page
    limits = {check: row.limit for check, row in CHECKS.items() if row.limit is not None}
    limits.pop("activation-headroom", None)  # of a feature
    assert limits == {"rounding-loss": 0.4, "headroom": 0.5, "delta-norm": 10.0}
    error_limits = {check: row.error_limit for check, row in CHECKS.items() if row.error_limit is not None}
    assert error_limits == {"rounding-loss": 0.8, "delta-norm": 1000.0}
    assert all(row.summary.endswith(".") for row in CHECKS.values())
    with pytest.raises(TypeError):
        CHECKS["new"] = CHECKS["headroom"]  # type: ignore[index]


def test_the_words_are_those_of_the_other_stages() -> None:
    assert get_args(Dtype) == ("auto", *DTYPES)
    quantizations = config_schema()["$defs"]["BaseEntry"]["properties"]["quantization"]["enum"]
    assert quantizations == [member.value for member in Quantization]
    assert config_schema()["$defs"]["BaseEntry"]["properties"]["access"]["enum"] == [member.value for member in Access]
    assert set(METHODS) == set(get_args(get_type_hints(LoraModel.add_weighted_adapter)["combination_type"]))
