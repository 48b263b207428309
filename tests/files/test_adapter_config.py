"""adapter_config.json as a record: each value where the later stages look for it, and as PEFT reads the same text."""

import hashlib
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from merge_gate.files.adapter_config import MOST_PATTERN_CHARACTERS, pattern_problem, patterns_of
from merge_gate.files.preflight import base_of, preflight
from merge_gate.records.files import AdapterConfig, AdapterFiles, Pattern
from tests.support.files.adapter_files import CONFIG, CONFIG_NAME, SHAPES, WEIGHTS_NAME, look, make, weights
from tests.support.properties import examples

EVERYTHING = {
    "peft_type": "LORA", "peft_version": "0.21.2", "task_type": "SEQ_CLS", "base_model_name_or_path": "acme/base",
    "revision": "v1", "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"}, "r": 4,
    "alpha": 2.5, "lora_alpha": 8, "bias": "lora_only", "init_lora_weights": "pissa", "lora_bias": True,
    "use_cayley_neumann": True, "use_dora": True, "use_rslora": True,
}  # fmt: skip


def recorded(directory: Path, config: Any) -> AdapterConfig:
    return preflight(str(make(directory, config)), allow_pickle=False).config


def test_every_value_is_where_the_later_stages_look_for_it(tmp_path: Path) -> None:
    assert recorded(tmp_path, EVERYTHING) == AdapterConfig(
        digest=hashlib.sha256(json.dumps(EVERYTHING).encode()).hexdigest(),
        keys=frozenset(EVERYTHING),
        values=tuple((key, json.dumps(value)[:60]) for key, value in EVERYTHING.items()),
        patterns=(),
        peft_type="LORA",
        peft_version="0.21.2",
        task_type="SEQ_CLS",
        base_name="acme/base",
        base_revision="v1",
        base_class="BertModel",
        r=4,
        alpha=2.5,
        lora_alpha=8,
        bias="lora_only",
        init_lora_weights="pissa",
        lora_bias=True,
        use_cayley_neumann=True,
        use_dora=True,
        use_rslora=True,
    )


FALSE = {"lora_bias": False, "use_cayley_neumann": False, "use_dora": False, "use_rslora": False}
NOT_SAID: dict[str, dict[str, Any]] = {
    "absent": {},
    "null": dict.fromkeys(EVERYTHING),
    "empty": dict.fromkeys(EVERYTHING, "") | FALSE | {"r": None, "alpha": None, "lora_alpha": None, "auto_mapping": {}},
    "of another kind": {key: [1] for key in EVERYTHING} | FALSE,
    "true for a number": dict.fromkeys(EVERYTHING, True) | FALSE,
}


@pytest.mark.parametrize("case", NOT_SAID)
def test_what_a_config_does_not_say_is_none(case: str, tmp_path: Path) -> None:
    config = NOT_SAID[case]
    found = recorded(tmp_path, config)
    assert found == AdapterConfig(digest=found.digest, keys=frozenset(config), values=found.values)
    assert len(found.digest) == 64


def test_only_what_is_set_is_among_the_values(tmp_path: Path) -> None:
    config = CONFIG | {"a": None, "b": False, "c": "", "d": [], "e": {}, "f": "x" * 99, "g": 0.5, "h": [None]}
    values = dict(recorded(tmp_path, config).values)
    assert not set("abcde") & values.keys()
    assert values["f"] == '"' + "x" * 59
    assert (values["g"], values["h"]) == ("0.5", "[null]")


def test_the_digest_is_that_of_what_the_file_says(tmp_path: Path) -> None:
    """Not of its spaces; the order of its keys counts, since the worker forms patterns in it."""
    spaced = recorded(tmp_path / "b", json.dumps(CONFIG, indent=4).encode())
    assert spaced.digest == recorded(tmp_path / "a", CONFIG).digest
    assert spaced.digest != recorded(tmp_path / "c", CONFIG | {"r": 5}).digest


KEYS = (
    *EVERYTHING, "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "target_parameters", "megatron_config", "megatron_core", "lora_dropout",
    "fan_in_fan_out", "inference_mode", "tokenizer_kwargs", "base_model_class", "parent_library", "trust_remote_code",
)  # fmt: skip
_NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_LEAVES = st.none() | st.booleans() | _NUMBERS | st.text(max_size=8) | st.sampled_from(["LORA", "none", "q(", ".*"])
_TEXTS = st.sampled_from(KEYS) | st.text(max_size=5)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3), max_leaves=6
)
_OBJECTS = st.dictionaries(_TEXTS, _VALUES, max_size=8)
_SETTINGS = settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    (directory / WEIGHTS_NAME).write_bytes(weights(SHAPES))
    return directory


def whole(files: AdapterFiles) -> AdapterFiles:
    """It travels to the worker, and what is said of it is short enough for a report."""
    assert pickle.loads(pickle.dumps(files)) == files
    hash(files)
    assert all(finding.message.isprintable() and finding.hint for finding in files.findings)
    return files


@_SETTINGS
@given(config=_OBJECTS, ascii_only=st.booleans())
def test_any_object_is_a_record_or_a_finding(config: dict[str, Any], ascii_only: bool, place: Path) -> None:
    raw = json.dumps(config, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    (place / CONFIG_NAME).write_bytes(raw)
    files = whole(look(place))
    assert files.config.keys == set(config) or files.findings
    name = config.get("base_model_name_or_path")
    if files.config.keys:
        assert base_of(str(place)) == (name if isinstance(name, str) and name else None)


@_SETTINGS
@given(raw=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_record_or_a_finding(raw: bytes, place: Path) -> None:
    (place / CONFIG_NAME).write_bytes(raw)
    assert whole(look(place)).findings, "nothing so short is a whole config"


SAME = {
    "task_type": "task_type", "base_model_name_or_path": "base_name", "revision": "base_revision",
    "peft_version": "peft_version", "r": "r", "lora_alpha": "lora_alpha", "bias": "bias",
    "init_lora_weights": "init_lora_weights", "lora_bias": "lora_bias", "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}  # fmt: skip
"""PEFT's attribute, and the record's."""

_OF_PEFT = st.fixed_dictionaries(
    {"peft_type": st.just("LORA")},
    optional={
        **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), st.text(max_size=6) | _VALUES),
        "task_type": st.sampled_from(["CAUSAL_LM", "SEQ_CLS", "TOMORROW"]) | _VALUES,
        **dict.fromkeys(("r", "lora_alpha"), st.integers(-1, 9) | _VALUES),
        "bias": st.sampled_from(["none", "all"]) | _VALUES,
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa"]) | _VALUES,
        **dict.fromkeys(("lora_bias", "use_dora", "use_rslora"), st.booleans() | _VALUES),
        "target_modules": st.sampled_from(["q", ["q", "v"]]) | _VALUES,
    },
)


@_SETTINGS
@given(config=_OF_PEFT)
def test_what_is_recorded_is_what_peft_reads(config: dict[str, Any], place: Path) -> None:
    (place / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    files = whole(look(place))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = PeftConfig.from_pretrained(str(place))
    except Exception:  # noqa: BLE001 - what PEFT does not take, it says in many ways, and the merge reports it
        return
    assert read.peft_type.value == files.config.peft_type
    for theirs, ours in SAME.items():
        got, expected = getattr(files.config, ours), getattr(read, theirs)
        if theirs not in config or files.findings:
            continue
        said_otherwise = theirs in {"peft_version", "init_lora_weights"}  # PEFT's own version; a flag
        assert got == expected if got else not expected or said_otherwise, theirs


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"target_modules": ".*q|v"}, [("target_modules", ".*q|v", ".*q|v")]),
        ({"exclude_modules": "(a)"}, [("exclude_modules", "(a)", "(a)")]),
        ({"feedforward_modules": "a*"}, [("feedforward_modules", "a*", "a*")]),
        ({"target_modules": [".*q"]}, []),  # in a list they are plain names
        ({"modules_to_save": ".*q"}, []),
        ({"layers_pattern": "h+"}, [("layers_pattern", "h+", r"(?:^|.*?\.)h+\.(?P<idx>\d+)\.")]),
        ({"layers_pattern": ["h", 3, "b*"]}, [("layers_pattern", "b*", r"(?:^|.*?\.)b*\.(?P<idx>\d+)\.")]),
        ({"layers_pattern": 7}, []),
        ({"rank_pattern": {"^a.*": 4, "q": 8}}, [("a key of rank_pattern", "^a.*", r"(.*\.)?(^a.*)$")]),
        ({"alpha_pattern": {"a|b": 4}}, [("a key of alpha_pattern", "a|b", r"(.*\.)?(a|b)$")]),
        ({"alpha_pattern": ["a|b"]}, []),
        ({"target_modules": "model.layers_1.q-proj"}, []),  # a name, and a valid expression that ends at once
        ({"rank_pattern": {r"^model\.q$": 1}}, []),
        ({"rank_pattern": {"a+": 1}, "target_modules": "b+"}, ["a+", "b+"]),
    ],
)
def test_expressions_are_found_where_peft_reads_them(config: dict[str, Any], found: list[Any]) -> None:
    got = list(patterns_of(config))
    if found and isinstance(found[0], str):
        assert [pattern.text for pattern in got] == found
    else:
        assert [(pattern.place, pattern.text, pattern.expression) for pattern in got] == found


def pattern(text: str) -> Pattern:
    return Pattern(place="target_modules", text=text, expression=text)


@pytest.mark.parametrize("text", ["a", "(a+)+", "[[a]", "a" * MOST_PATTERN_CHARACTERS])
def test_a_valid_expression_is_no_problem_and_no_warning(text: str) -> None:
    """`[[` warns of sets to come, which does not matter here."""
    re.purge()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert pattern_problem(pattern(text)) is None
    assert not seen


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "missing ), unterminated subpattern at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
        ("a" * (MOST_PATTERN_CHARACTERS + 1), "it has 100,001 characters, expected at most 100,000"),
    ],
)
def test_an_expression_that_is_not_taken_says_why(text: str, why: str) -> None:
    assert pattern_problem(pattern(text)) == why


def test_nesting_without_end_is_a_problem_and_no_crash() -> None:
    assert pattern_problem(pattern("(" * 20_000 + ")" * 20_000))
