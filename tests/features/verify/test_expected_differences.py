"""Each row of the table of expected differences expects what it says, and not another value of the same key."""

import shutil
from pathlib import Path

import pytest

from merge_gate.features.verify.expected_differences import ROWS, Expectation
from merge_gate.records.terms import Severity
from tests.support.verify.accounting import account, saved_by_transformers_4, saved_by_transformers_5
from tests.support.verify.file_changes import (
    CONFIG,
    GENERATION,
    SETTINGS,
    Change,
    both,
    edited,
    older_config,
    reordered,
)

COPIED = Expectation(has_base_tensors_only=True)
TENSORS = Expectation(resized=frozenset({(64, 72)}), is_untied=True, has_base_tensors_only=True)
"""What the tensors of a merge may show: rows were added, and the head was untied."""

LABELS = {"0": "a", "1": "b"}
EDITS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "any JSON file: a default": (
        SETTINGS, {"clean_up_tokenization_spaces": False}, {"clean_up_tokenization_spaces": True},
    ),
    "config.json, generation_config.json, tokenizer.json: a key that is left out": (
        CONFIG, {"mlp_bias": ...}, {"max_position_embeddings": ...},
    ),
    "any JSON file: `transformers_version`; `_name_or_path`": (
        CONFIG, {"transformers_version": "4.0.0"}, {"transformers_version": {"evil": 1}},
    ),
    "config.json: `unsloth_version`": (CONFIG, {"unsloth_version": "1"}, {"unsloth_version": ["x"]}),
    "config.json: `vocab_size`": (CONFIG, {"vocab_size": 72}, {"vocab_size": 71}),
    "config.json: `tie_word_embeddings` false": (
        CONFIG, {"tie_word_embeddings": False}, {"tie_word_embeddings": False},
    ),
    "config.json: `dtype` of a part of the model": (
        CONFIG, {"part": {"dtype": "bfloat16"}}, {"part": {"dtype": "float16"}},
    ),
    "config.json: `architectures` of the base": (CONFIG, {}, {"architectures": ["LlamaForTokenClassification"]}),
    "config.json: `id2label`, `label2id` of a head that the base lacks": (
        CONFIG,
        {"id2label": LABELS, "label2id": {"a": 0, "b": 1}},
        {"id2label": LABELS, "label2id": {"a": 1, "b": 0}},
    ),
    "config.json: `problem_type` single_label_classification": (
        CONFIG, {"problem_type": "single_label_classification"}, {"problem_type": "regression"},
    ),
    "config.json, generation_config.json: `pad_token_id` of the tokenizer": (
        CONFIG, {"pad_token_id": 2}, {"pad_token_id": 3},
    ),
    "config.json, generation_config.json: `bos_token_id` or `eos_token_id` that the base leaves out": (
        GENERATION, {"bos_token_id": 0}, {"bos_token_id": 3},
    ),
    "config.json, generation_config.json: `eos_token_id`": (
        GENERATION, {"eos_token_id": [61, 62, 61]}, {"eos_token_id": 62},
    ),
    "generation_config.json: `_from_model_config`": (
        GENERATION, {"_from_model_config": False}, {"_from_model_config": [1]},
    ),
    "any JSON file: `auto_map`, `custom_pipelines` removed": (
        CONFIG, {"auto_map": ...}, {"auto_map": {"AutoModelForCausalLM": "modeling_own.Evil"}},
    ),
    "tokenizer_config.json: `tokenizer_class`": (
        SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "BertTokenizer"},
    ),
    "tokenizer_config.json: `backend`": (SETTINGS, {"backend": ...}, {"backend": True}),
    "tokenizer_config.json: `is_local`, `local_files_only`": (SETTINGS, {"is_local": False}, {"is_local": "evil"}),
}  # fmt: skip
CHANGES: dict[str, tuple[Change, Change]] = {
    "any JSON file: any key": (
        both(saved_by_transformers_5, reordered),
        both(saved_by_transformers_5, edited(SETTINGS, model_max_length=9)),
    ),
    "config.json, generation_config.json, tokenizer_config.json: null": (
        edited(CONFIG, evil=None),
        edited(GENERATION, temperature=None),
    ),
    "config.json, generation_config.json: `use_cache`": (
        edited(CONFIG, use_cache=False),
        edited(GENERATION, use_cache="evil"),
    ),
    "tokenizer_config.json: `added_tokens_decoder`": (
        saved_by_transformers_4,
        both(saved_by_transformers_4, edited(SETTINGS, added_tokens_decoder__1__rstrip=True)),
    ),
    "config.json: `rope_theta`, `rope_scaling`": (older_config, both(older_config, edited(CONFIG, rope_theta=5.0))),
    **{row: (edited(name, **right), edited(name, **wrong)) for row, (name, right, wrong) in EDITS.items()},
}
"""For each row: a difference that it expects, and one in the same key that changes the meaning."""

FACTS = {
    "config.json: `vocab_size`": TENSORS,
    "config.json: `tie_word_embeddings` false": TENSORS,
    "config.json: `id2label`, `label2id` of a head that the base lacks": Expectation(),
}
BASES: dict[str, Change] = {
    "config.json: `tie_word_embeddings` false": edited(CONFIG, tie_word_embeddings=True),
    "config.json: `id2label`, `label2id` of a head that the base lacks": edited(CONFIG, id2label=..., label2id=...),
    "config.json, generation_config.json: `bos_token_id` or `eos_token_id` that the base leaves out": edited(
        GENERATION, bos_token_id=...
    ),
    "any JSON file: any key": saved_by_transformers_4,
}
"""Changes of the base, and of its copy, for the rows that need one."""


@pytest.mark.parametrize("row", [row.shown for row in ROWS])
def test_each_row_expects_its_difference_and_not_the_opposite(row: str, base: Path, tmp_path: Path) -> None:
    of_row = shutil.copytree(base, tmp_path / "base")
    BASES.get(row, lambda _: None)(of_row)
    needs = "LlamaModel" if "architectures" in row else ""
    for change, is_right in zip(CHANGES[row], (True, False), strict=True):
        merged = shutil.copytree(of_row, tmp_path / f"right-{is_right}")
        change(merged)
        facts = FACTS.get(row, COPIED) if is_right or "tie_" not in row else COPIED
        found, seen = account(merged, of_row, facts=facts, needs=needs)
        odd = [f"{one.check}: {one.message}" for one in found if one.severity is Severity.ERROR]
        assert bool(odd) != is_right, odd
        if is_right:
            assert row in {one.row for one in seen.differences}


def test_the_table_has_a_test_for_each_row() -> None:
    assert CHANGES.keys() == {row.shown for row in ROWS}
    assert len(CHANGES) == len(ROWS)
