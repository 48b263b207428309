"""Which release wrote a config, and what has changed its meaning since: by version, by keys that are there or not."""

from __future__ import annotations

from typing import Any

import pytest

from merge_gate.judging.releases import NEWEST, Span, changes, written_by
from merge_gate.records.files import TensorHeader
from merge_gate.sources.adapter_config import recorded

ALWAYS = {"base_model_name_or_path": "acme/base", "inference_mode": True, "task_type": None}
EARLY = ALWAYS | {
    "init_lora_weights": True,
    "layers_to_transform": None,
    "alpha_pattern": {},
    "megatron_core": "megatron.core",
}
LORA_0_9 = EARLY | {"peft_type": "LORA", "use_rslora": False, "use_dora": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LORA", "peft_version": "0.18.1"}, Span(oldest=18, newest=18)),
        ({"peft_type": "LORA", "peft_version": "0.21.3.dev0@abc"}, Span(oldest=21, newest=21)),
        (ALWAYS | {"peft_type": "LORA"}, Span(oldest=0, newest=2)),
        (LORA_0_9, Span(oldest=9, newest=9)),
        (LORA_0_9 | {"layer_replication": None}, Span(oldest=10, newest=13)),
        (ALWAYS | {"peft_type": "LOKR", "r": 2}, Span(oldest=0, newest=13)),
        (ALWAYS | {"peft_type": "LOKR", "exclude_modules": None}, Span(oldest=14, newest=17)),
        (ALWAYS | {"peft_type": "LORA", "kasa_config": None}, Span(oldest=0, newest=NEWEST)),  # no release wrote that
        ({"peft_type": "LORA", "r": 4}, Span(oldest=0, newest=NEWEST)),  # not PEFT's own
        ({"peft_type": "LORA", "peft_version": 3}, Span(oldest=0, newest=NEWEST)),
    ],
)
def test_the_config_dates_itself(config: dict[str, Any], expected: Span) -> None:
    assert written_by(recorded(config)) == expected


LOKR = ALWAYS | {"peft_type": "LOKR", "r": 2, "alpha": 4}
DORA = LORA_0_9 | {"layer_replication": None, "use_dora": True}
EMBEDDING = (TensorHeader(name="base_model.model.embed_tokens.lora_embedding_A", dtype="F32", shape=(2, 4)),)
LORA_0_14 = LORA_0_9 | {"layer_replication": None, "exclude_modules": None, "lora_bias": True, "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        (LOKR, (), ["lokr-scale"]),
        (LOKR | {"alpha": 2}, (), []),
        (LOKR | {"exclude_modules": None}, (), []),
        (LOKR | {"peft_version": "0.21.2"}, (), []),
        (LORA_0_14, (), ["lora-bias-scale"]),
        (LORA_0_14 | {"lora_bias": False}, (), []),
        (DORA, EMBEDDING, ["dora-embedding"]),
        (DORA, (), []),
        (ALWAYS | {"peft_type": "OFT", "exclude_modules": None, "use_cayley_neumann": True}, (), ["oft-series"]),
        (ALWAYS | {"peft_type": "OFT", "exclude_modules": None, "use_cayley_neumann": False}, (), []),
        (ALWAYS | {"peft_type": "LORA", "init_lora_weights": "pissa"}, (), ["old-initialisation"]),
        (LORA_0_14 | {"init_lora_weights": "pissa", "lora_bias": False}, (), []),
    ],
)
def test_what_changed_is_known_by_the_config(
    config: dict[str, Any], tensors: tuple[TensorHeader, ...], expected: list[str]
) -> None:
    found = changes(recorded(config), tensors)
    assert [change.name for change, _, _ in found] == expected


def test_the_words_say_by_how_much() -> None:
    ((_, words, span),) = changes(recorded(LOKR), ())
    assert "2 times as much" in words
    assert str(span) == "PEFT up to 0.13"
