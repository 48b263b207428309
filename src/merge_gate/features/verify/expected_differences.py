"""The differences that exporters are known to make in the files next to the weights, and why the meaning is the same.

In: a key of a file whose value differs. Out: the row that expects this difference, if any. A row names the file, the
key, who writes it, the reason, and its condition, which is a function here.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "absent"})()
"""The value of a key that is not there."""

_LARGEST_EXACT = 2**53
"""Larger numbers, such as a model_max_length of 1e30, are no ids, and JSON writers spell them either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the conditions of the rows depend on.

    Attributes:
        written: what the installed transformers writes for the expected files, by file.
        loaded: the values after transformers has loaded the expected files, with all defaults, by file.
        token_ids: `bos_token_id`, `eos_token_id`, and `pad_token_id` of the expected tokenizer.
        added_tokens: the added tokens of the expected tokenizer by their text, with `id` and flags.
        tokenizer_class: the name of the class that both tokenizers are loaded as; empty if they differ.
        has_own_tokenizer: whether the expected tokenizer is the adapter's.
        resized: rows of a stored tensor in the base and in the finished model, if they differ.
        is_untied: whether the merge unties the head.
        has_base_tensors_only: whether the finished model stores no tensor that the base does not store.
        config: the base's config.json.
    """

    written: Mapping[str, Any] = field(default_factory=dict)
    loaded: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Mapping[str, int | None] = field(default_factory=dict)
    added_tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer_class: str = ""
    has_own_tokenizer: bool = False
    resized: frozenset[tuple[int, int]] = frozenset()
    is_untied: bool = False
    has_base_tensors_only: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """A key whose value differs. `is_loaded`: it is the value after transformers has loaded the file."""

    file: str
    key: tuple[str, ...]
    expected: Any
    actual: Any
    whole: Mapping[str, Any]
    """The finished model's file."""
    is_loaded: bool = False

    def has(self, values: Any) -> bool:
        """Whether the actual value is the one at this key of an object."""
        return same(at(self.key, values), self.actual)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedDifference:
    """A row of the table. `file` and `key` are regular expressions; `shown` is what the documents call them.

    `condition` names a function, which holds only for values that change no result.
    """

    shown: str
    file: str
    key: str
    writer: str
    reason: str
    condition: str


def at(key: Iterable[str], values: Any) -> Any:
    """The value at this key of an object, or `ABSENT`."""
    for part in key:
        values = values.get(part, ABSENT) if isinstance(values, Mapping) else ABSENT
    return values


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal: the expected one, and the actual one.

    1 may replace 1.0. 1.0 may not replace 1, for a program may need an id or a size there, and true replaces neither.
    """
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    is_of_other_type = type(first) is int and isinstance(second, float) and first < _LARGEST_EXACT
    return bool(first == second) and not is_of_other_type


def flat(value: Any, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of an object and its inner objects, by their keys. `torch_dtype` is the older name of `dtype`."""
    if not isinstance(value, Mapping) or (not value and key):
        return {key: value}
    values: dict[tuple[str, ...], Any] = {}
    for name, inner in value.items():
        word = "dtype" if name == "torch_dtype" and "dtype" not in value else str(name)
        values |= flat(inner, (*key, word))
    return values


def expected_by(change: KeyChange, expectation: Expectation) -> str:
    """The row that expects a difference, as the documents call it; empty if none does."""
    key = ".".join(change.key)
    for row in ROWS:
        is_about = re.fullmatch(row.file, change.file) and re.fullmatch(row.key, key, re.DOTALL)
        if is_about and _CONDITIONS[row.condition](change, expectation):
            return row.shown
    return ""


# --- conditions ------------------------------------------------------------------------------------------------------


def _is_written(change: KeyChange, expectation: Expectation) -> bool:
    """A processor's key may be left out only if the file has it in another spelling, which shows its meaning."""
    written = expectation.written.get(change.file)
    if written is None or change.is_loaded or not change.has(written):
        return False
    is_left_out = change.actual is ABSENT and change.file.endswith("processor_config.json")
    return not is_left_out or flat(written).keys() <= flat(change.whole).keys()


def _is_default(change: KeyChange, expectation: Expectation) -> bool:
    is_there = change.actual is not ABSENT and not change.is_loaded
    return is_there and change.has(expectation.loaded.get(change.file, {}))


def _is_left_out(change: KeyChange, expectation: Expectation) -> bool:
    """What is loaded is compared as well, except the dtype and the classes."""
    is_absent = change.actual is ABSENT and not change.is_loaded and change.file in expectation.loaded
    return is_absent and not {*change.key} & {"dtype", "model_type", "architectures", "auto_map", "custom_pipelines"}


def _is_same_dtype(change: KeyChange, _: Expectation) -> bool:
    is_inner = len(change.key) > 1 and change.expected is ABSENT
    return is_inner and same(change.actual, change.whole.get("dtype", change.whole.get("torch_dtype")))


def _is_of_tokenizer(change: KeyChange, expectation: Expectation) -> bool:
    """Only the id of the pad token may replace another one."""
    number, is_pad = expectation.token_ids.get(change.key[-1]), change.key[-1] == "pad_token_id"
    return number is not None and same(number, change.actual) and (is_pad or change.expected in (ABSENT, None))


def _are_same_stops(change: KeyChange, expectation: Expectation) -> bool:
    """The same ids, or also that of the adapter's own end token. Programs that take only one take the first."""
    old, new = (ids if isinstance(ids, list) else [ids] for ids in (change.expected, change.actual))
    if not old or not new or any(type(token_id) is not int for token_id in (*old, *new)):
        return False
    own = expectation.token_ids.get("eos_token_id") if expectation.has_own_tokenizer else None
    return {*old} <= {*new} <= {*old, own} and new[0] in (old[0], own)


def _is_of_a_new_head(change: KeyChange, expectation: Expectation) -> bool:
    """The names of labels that only the training knew: both directions agree."""
    names, numbers = change.whole.get("id2label"), change.whole.get("label2id")
    has_head = "id2label" in expectation.config or expectation.has_base_tensors_only
    if has_head or not isinstance(names, Mapping) or not isinstance(numbers, Mapping):
        return False
    return {str(name): str(key) for key, name in names.items()} == {key: str(number) for key, number in numbers.items()}


def _is_added_token(change: KeyChange, expectation: Expectation) -> bool:
    """An entry of `added_tokens_decoder`, which repeats the tokenizer's own added token."""
    decoder = change.whole.get("added_tokens_decoder")
    entry = decoder.get(change.key[1]) if isinstance(decoder, Mapping) and len(change.key) > 1 else None
    own = expectation.added_tokens.get(str(entry.get("content"))) if isinstance(entry, Mapping) else None
    if own is None or str(own["id"]) != change.key[1]:
        return isinstance(change.actual, dict) and not change.actual
    return isinstance(entry, Mapping) and same(dict(entry) | {"id": own["id"]}, dict(own))


def _is_same_class(change: KeyChange, expectation: Expectation) -> bool:
    """Other releases load other names as other classes. Only the names of one class in releases 4 and 5 are equal."""
    names = (expectation.tokenizer_class if change.expected is ABSENT else change.expected, change.actual)
    old, new = (str(name).replace("TokenizersBackend", "PreTrainedTokenizer").removesuffix("Fast") for name in names)
    return bool(expectation.tokenizer_class) and old == new


def _is_older_rope(change: KeyChange, expectation: Expectation) -> bool:
    """What is loaded is compared as well, but releases differ in which rope_theta comes first: there is only one."""
    outer = tuple(takewhile(lambda part: part not in {"rope_theta", "rope_scaling"}, change.key))
    if change.is_loaded or change.actual is ABSENT or outer == change.key:
        return False
    if change.key == (*outer, "rope_theta"):
        return same(at((change.file, *outer, "rope_parameters", "rope_theta"), expectation.loaded), change.actual)
    return change.key[-1] != "rope_theta" and at((*outer, "rope_parameters"), change.whole) is ABSENT


_CONDITIONS: Mapping[str, Callable[[KeyChange, Expectation], bool]] = {
    "is_written": _is_written,
    "is_default": _is_default,
    "is_left_out": _is_left_out,
    "is_nothing": lambda key, _: not key.is_loaded and {repr(key.expected), repr(key.actual)} <= {"absent", "None"},
    "is_text": lambda key, _: key.actual is ABSENT or isinstance(key.actual, str | None),
    "is_flag": lambda key, _: key.actual is ABSENT or isinstance(key.actual, bool),
    "is_resized": lambda key, expectation: (key.expected, key.actual) in expectation.resized,
    "is_untied": lambda key, expectation: expectation.is_untied and key.actual is False,
    "is_same_dtype": _is_same_dtype,
    "is_own_class": lambda key, expectation: (
        expectation.has_base_tensors_only and same(key.actual, expectation.config.get("architectures", ABSENT))
    ),
    "is_of_a_new_head": _is_of_a_new_head,
    "is_derived_problem": lambda key, _: key.expected in (ABSENT, None) and key.actual == "single_label_classification",
    "is_of_tokenizer": _is_of_tokenizer,
    "are_same_stops": _are_same_stops,
    "is_removed": lambda key, _: key.actual is ABSENT or key.actual is None,
    "is_added_token": _is_added_token,
    "is_same_class": _is_same_class,
    "is_backend": lambda key, _: key.actual in (ABSENT, "tokenizers"),
    "is_older_rope": _is_older_rope,
}

_TABLE = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
ROWS = tuple(ExpectedDifference(**row) for row in csv.DictReader(_TABLE))
"""Every expected difference, from expected_differences.csv. The first row whose condition holds names it."""
