"""The differences that exporters are known to make in the files next to the weights, and why the meaning is the same.

In: a key of a file whose value differs. Out: the row that expects this difference, or None. A row names the file, the
key, who writes it, and the reason. Its condition holds only for values that change no result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "absent"})()
"""The value of a key that is not there."""

DEFAULT_LEFT_OUT = "a key that is left out has its default, and transformers loads the same value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the conditions of the rows depend on.

    Attributes:
        written: what the installed transformers writes for the expected files, by file.
        loaded: the values after transformers has loaded the expected files, with all defaults, by file.
        token_ids: `bos_token_id`, `eos_token_id`, and `pad_token_id` of the expected tokenizer.
        added_tokens: the added tokens of the expected tokenizer by their text, with `id` and flags.
        same_class: whether both tokenizers are loaded as the same class.
        has_own_tokenizer: whether the expected tokenizer is the adapter's.
        resized: rows of a stored tensor in the base and in the finished model, if they differ.
        is_untied: whether the merge unties the head.
        names_labels: whether the base's config.json names labels.
        has_base_tensors_only: whether the finished model stores no tensor that the base does not store.
        architectures: the classes that may be named instead of the one that the adapter needs.
    """

    written: Mapping[str, Any] = field(default_factory=dict)
    loaded: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Mapping[str, int | None] = field(default_factory=dict)
    added_tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    same_class: bool = False
    has_own_tokenizer: bool = False
    resized: frozenset[tuple[int, int]] = frozenset()
    is_untied: bool = False
    names_labels: bool = True
    has_base_tensors_only: bool = False
    architectures: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key whose value differs. `is_loaded`: it is the value after transformers has loaded the file."""

    file: str
    key: tuple[str, ...]
    expected: Any
    actual: Any
    whole: Any
    """The finished model's file."""
    is_loaded: bool = False

    def has(self, values: Any) -> bool:
        """Whether the actual value is the one at this key of an object."""
        for part in self.key:
            values = values.get(part, ABSENT) if isinstance(values, Mapping) else ABSENT
        return same(self.actual, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedDifference:
    """A row of the table. `file` and `key` are regular expressions; `shown` is what the documents call them."""

    shown: str
    file: str
    key: str
    writer: str
    reason: str
    holds: Callable[[Change, Expectation], bool]


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal. 1 equals 1.0, and true equals neither."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    return bool(first == second)


def expected_by(change: Change, expectation: Expectation) -> ExpectedDifference | None:
    """The row that expects a difference."""
    key = ".".join(change.key)
    for row in ROWS:
        is_about = re.fullmatch(row.file, change.file) and re.fullmatch(row.key, key, re.DOTALL)
        if is_about and row.holds(change, expectation):
            return row
    return None


# --- conditions ------------------------------------------------------------------------------------------------------


def _is_written(change: Change, expectation: Expectation) -> bool:
    written = expectation.written.get(change.file)
    return written is not None and not change.is_loaded and change.has(written)


def _is_default(change: Change, expectation: Expectation) -> bool:
    is_there = change.actual is not ABSENT and not change.is_loaded
    return is_there and change.has(expectation.loaded.get(change.file, {}))


def _is_left_out(change: Change, _: Expectation) -> bool:
    """What transformers loads is compared as well, except the dtype and the class."""
    is_absent = change.actual is ABSENT and not change.is_loaded
    return is_absent and not {*change.key} & {"dtype", "architectures", "auto_map", "custom_pipelines"}


def _is_nothing(change: Change, _: Expectation) -> bool:
    return not change.is_loaded and {repr(change.expected), repr(change.actual)} <= {"absent", "None"}


def _is_text(change: Change, _: Expectation) -> bool:
    return change.actual is ABSENT or isinstance(change.actual, str | None)


def _is_flag(change: Change, _: Expectation) -> bool:
    return change.actual is ABSENT or isinstance(change.actual, bool)


def _is_resized(change: Change, expectation: Expectation) -> bool:
    return (change.expected, change.actual) in expectation.resized


def _is_same_dtype(change: Change, _: Expectation) -> bool:
    whole = change.whole if isinstance(change.whole, Mapping) else {}
    is_inner = len(change.key) > 1 and change.expected is ABSENT
    return is_inner and same(change.actual, whole.get("dtype", whole.get("torch_dtype")))


def _is_of_tokenizer(change: Change, expectation: Expectation) -> bool:
    number = expectation.token_ids.get(change.key[-1])
    return number is not None and same(change.actual, number) and change.expected in (ABSENT, None)


def _is_pad_of_tokenizer(change: Change, expectation: Expectation) -> bool:
    number = expectation.token_ids.get("pad_token_id")
    return number is not None and same(change.actual, number)


def _stops(value: Any) -> frozenset[int] | None:
    values = value if isinstance(value, list) else [value]
    return frozenset(values) if all(type(one) is int for one in values) else None


def _are_same_stops(change: Change, expectation: Expectation) -> bool:
    """The same ids, or also that of the adapter's own end token."""
    old, new = _stops(change.expected), _stops(change.actual)
    if old is None or new is None:
        return False
    own = expectation.token_ids.get("eos_token_id") if expectation.has_own_tokenizer else None
    return old == new or (old <= new and new - old == {own})


def _is_of_a_new_head(change: Change, expectation: Expectation) -> bool:
    """The names of labels that only the training knew: both directions agree."""
    whole = change.whole if isinstance(change.whole, Mapping) else {}
    names, numbers = whole.get("id2label"), whole.get("label2id")
    if expectation.names_labels or not isinstance(names, Mapping) or not isinstance(numbers, Mapping):
        return False
    return {str(name): str(key) for key, name in names.items()} == {key: str(one) for key, one in numbers.items()}


def _is_derived_problem(change: Change, _: Expectation) -> bool:
    return change.expected in (ABSENT, None) and change.actual == "single_label_classification"


def _is_own_class(change: Change, expectation: Expectation) -> bool:
    return any(same(change.actual, one) for one in expectation.architectures)


def _is_removed(change: Change, _: Expectation) -> bool:
    return change.actual is ABSENT or change.actual is None


def _is_added_token(change: Change, expectation: Expectation) -> bool:
    """An entry of `added_tokens_decoder`, which repeats the tokenizer's own added token."""
    decoder = change.whole.get("added_tokens_decoder") if isinstance(change.whole, Mapping) else None
    entry = decoder.get(change.key[1]) if isinstance(decoder, Mapping) and len(change.key) > 1 else None
    own = expectation.added_tokens.get(str(entry.get("content"))) if isinstance(entry, Mapping) else None
    if own is None or str(own["id"]) != change.key[1]:
        return isinstance(change.actual, dict) and not change.actual
    return isinstance(entry, Mapping) and same(dict(entry) | {"id": own["id"]}, dict(own))


def _is_older_rope(change: Change, _: Expectation) -> bool:
    place = change.whole
    for part in change.key[: -1 if change.key[-1] == "rope_theta" else change.key.index("rope_scaling")]:
        place = place.get(part, {}) if isinstance(place, Mapping) else {}
    return not change.is_loaded and isinstance(place, Mapping) and "rope_parameters" not in place


# --- the table -------------------------------------------------------------------------------------------------------

_CONFIG, _GENERATION, _TOKENIZER = r"config\.json", r"generation_config\.json", r"tokenizer_config\.json"
_SAVED = "transformers' `save_pretrained`"

ROWS: tuple[ExpectedDifference, ...] = (
    ExpectedDifference(
        shown="any JSON file: any key",
        file=r".*\.json",
        key=r".*",
        writer=f"{_SAVED}, which PEFT, mergekit, axolotl, and unsloth call",
        reason="the gate has transformers write the expected files again, and it writes this value",
        holds=_is_written,
    ),
    ExpectedDifference(
        shown="any JSON file: a default",
        file=r".*\.json",
        key=r".*",
        writer=f"{_SAVED}, other releases",
        reason="transformers loads this value from the expected file, which leaves it out or spells it otherwise",
        holds=_is_default,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json: a key that is left out",
        file=rf"{_CONFIG}|{_GENERATION}",
        key=r".*",
        writer=f"{_SAVED}, other releases",
        reason=DEFAULT_LEFT_OUT,
        holds=_is_left_out,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json, tokenizer_config.json: null",
        file=rf"{_CONFIG}|{_GENERATION}|{_TOKENIZER}",
        key=r".*",
        writer=f"{_SAVED}, other releases",
        reason="null and a key that is not there mean the same, and transformers loads the same value",
        holds=_is_nothing,
    ),
    ExpectedDifference(
        shown="any JSON file: `transformers_version`; `_name_or_path`",
        file=r".*\.json",
        key=r"transformers_version|(.*\.)?(_name_or_path|transformers_version)",
        writer=f"{_SAVED}; mlx-lm removes `_name_or_path`",
        reason="it says who saved the file, and from where",
        holds=_is_text,
    ),
    ExpectedDifference(
        shown="config.json: `unsloth_version`",
        file=_CONFIG,
        key=r"unsloth_version",
        writer="unsloth (patch_tokenizer)",
        reason="it says who saved the file",
        holds=_is_text,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json: `use_cache`",
        file=rf"{_CONFIG}|{_GENERATION}",
        key=r"(.*\.)?use_cache",
        writer="axolotl, and trainers with gradient checkpointing",
        reason="the cache of keys and values changes the speed, and no result",
        holds=_is_flag,
    ),
    ExpectedDifference(
        shown="config.json: `vocab_size`",
        file=_CONFIG,
        key=r"((text_config|llm_config)\.)?vocab_size",
        writer="PEFT, mergekit, `merge-gate run --publish`",
        reason="the stored embedding has as many rows, and its values are compared",
        holds=_is_resized,
    ),
    ExpectedDifference(
        shown="config.json: `tie_word_embeddings` false",
        file=_CONFIG,
        key=r"((text_config|llm_config)\.)?tie_word_embeddings",
        writer="PEFT, if the merge unties the head",
        reason="the merge that is expected has two tensors too",
        holds=lambda change, expectation: expectation.is_untied and change.actual is False,
    ),
    ExpectedDifference(
        shown="config.json: `dtype` of a part of the model",
        file=_CONFIG,
        key=r".+\.dtype",
        writer=_SAVED,
        reason="it repeats the dtype of the whole model",
        holds=_is_same_dtype,
    ),
    ExpectedDifference(
        shown="config.json: `architectures` of the base",
        file=_CONFIG,
        key=r"architectures",
        writer="`merge-gate run --publish`, for an adapter of a model without its head",
        reason="every tensor is stored in the base too, so the base's own class loads it",
        holds=_is_own_class,
    ),
    ExpectedDifference(
        shown="config.json: `id2label`, `label2id` of a head that the base lacks",
        file=_CONFIG,
        key=r"(id2label|label2id)(\..*)?",
        writer="trainers of classifiers",
        reason="neither the base nor the adapter names these labels; both directions agree",
        holds=_is_of_a_new_head,
    ),
    ExpectedDifference(
        shown="config.json: `problem_type` single_label_classification",
        file=_CONFIG,
        key=r"problem_type",
        writer="transformers, in a training step",
        reason="it is what transformers assumes without this key",
        holds=_is_derived_problem,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json: `pad_token_id` of the tokenizer",
        file=rf"{_CONFIG}|{_GENERATION}",
        key=r"(text_config\.)?pad_token_id",
        writer="axolotl, unsloth, TRL",
        reason="it is the id of the pad_token of the expected tokenizer",
        holds=_is_pad_of_tokenizer,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json: `bos_token_id` or `eos_token_id` that the base leaves out",
        file=rf"{_CONFIG}|{_GENERATION}",
        key=r"(text_config\.)?(bos|eos)_token_id",
        writer="axolotl, unsloth, TRL",
        reason="it is the id of the same token of the expected tokenizer",
        holds=_is_of_tokenizer,
    ),
    ExpectedDifference(
        shown="config.json, generation_config.json: `eos_token_id`",
        file=rf"{_CONFIG}|{_GENERATION}",
        key=r"(text_config\.)?eos_token_id",
        writer=f"{_SAVED}; TRL adds the adapter's own end token",
        reason="the ids are the same, or the end token of the adapter's own tokenizer is added, and none is lost",
        holds=_are_same_stops,
    ),
    ExpectedDifference(
        shown="generation_config.json: `_from_model_config`",
        file=_GENERATION,
        key=r"_from_model_config",
        writer=f"{_SAVED} of a model without generation_config.json",
        reason="it says where the other keys came from, and they are compared",
        holds=_is_flag,
    ),
    ExpectedDifference(
        shown="any JSON file: `auto_map`, `custom_pipelines` removed",
        file=r".*config\.json",
        key=r"(.*\.)?(auto_map|custom_pipelines)(\..*)?",
        writer="`merge-gate run --publish`",
        reason="code is not published, and no program runs code that is not named",
        holds=_is_removed,
    ),
    ExpectedDifference(
        shown="tokenizer_config.json: `added_tokens_decoder`",
        file=_TOKENIZER,
        key=r"added_tokens_decoder(\..*)?",
        writer="transformers 4",
        reason="each entry repeats an added token of the expected tokenizer, with its id and flags",
        holds=_is_added_token,
    ),
    ExpectedDifference(
        shown="tokenizer_config.json: `tokenizer_class`",
        file=_TOKENIZER,
        key=r"tokenizer_class",
        writer=f"{_SAVED}, other releases",
        reason="transformers loads both names as the same class",
        holds=lambda change, expectation: expectation.same_class and isinstance(change.actual, str),
    ),
    ExpectedDifference(
        shown="tokenizer_config.json: `backend`, `is_local`, `local_files_only`",
        file=_TOKENIZER,
        key=r"backend|is_local|local_files_only",
        writer="transformers 5",
        reason="it says how the tokenizer was loaded before it was saved",
        holds=lambda change, _: change.actual is ABSENT or change.actual == "tokenizers" or type(change.actual) is bool,
    ),
    ExpectedDifference(
        shown="config.json: `rope_theta`, `rope_scaling` without `rope_parameters`",
        file=_CONFIG,
        key=r"(.+\.)?(rope_theta|rope_scaling(\..*)?)",
        writer="transformers 4",
        reason="they are the older names, and transformers loads the same rope_parameters",
        holds=_is_older_rope,
    ),
)
"""Every expected difference. The first row whose condition holds names it."""
