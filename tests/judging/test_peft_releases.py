"""Which release wrote a config, and what has changed its meaning since: by version, by keys that are there or not."""

from __future__ import annotations

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.peft_releases import NEWEST, Span, written_by
from tests.support.judging.releases import ALWAYS, LORA_0_9
from tests.support.wording import Wording


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


@pytest.mark.parametrize(
    "span",
    [
        Span(oldest=9, newest=9),
        Span(oldest=9, newest=NEWEST),
        Span(oldest=0, newest=NEWEST),
        Span(oldest=9, newest=12),
        Span(oldest=0, newest=12),
    ],
)
def test_a_span_in_words(span: Span, wording: Wording) -> None:
    wording(span)


KEYS = {
    "init_lora_weights": 3, "layers_to_transform": 4, "alpha_pattern": 6, "megatron_core": 7, "use_rslora": 8,
    "use_dora": 9, "layer_replication": 10, "lora_bias": 14, "corda_config": 15, "use_qalora": 16,
    "target_parameters": 17, "peft_version": 18, "use_bdlora": 19, "velora_config": 20, "kasa_config": 21,
}  # fmt: skip


@pytest.mark.parametrize("release", sorted(set(KEYS.values())))
def test_each_release_is_known_by_the_keys_that_it_brought(release: int) -> None:
    """`peft_version` without a version in it is a key as any other."""
    keys = {key: None for key, since in (KEYS | {"exclude_modules": 14}).items() if since <= release}
    later = [since for since in KEYS.values() if since > release]
    got = written_by(recorded(ALWAYS | {"peft_type": "LORA"} | keys))
    assert got == Span(oldest=release, newest=min(later) - 1 if later else NEWEST)


def test_a_key_of_one_type_says_nothing_of_another() -> None:
    config = ALWAYS | {"peft_type": "LOKR", "use_dora": False, "exclude_modules": None, "peft_version": None}
    assert written_by(recorded(config)) == Span(oldest=18, newest=NEWEST)
