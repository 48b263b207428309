"""Which release wrote a config, and what has changed its meaning since: by version, by keys that are there or not."""

from __future__ import annotations

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.checks.meaning_changed import changes
from merge_gate.judging.peft_releases import NEWEST, Span, written_by
from merge_gate.records.files import StoredTensor
from tests.support.judging.releases import (
    ALWAYS,
    CONVOLUTION,
    DORA,
    EMBEDDING,
    LINEAR,
    LOKR,
    LORA_0_9,
    LORA_0_14,
)
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
        (ALWAYS | {"peft_type": "LORA", "init_lora_weights": "pissa"}, (), ["old-initialization"]),
        (LORA_0_14 | {"init_lora_weights": "pissa", "lora_bias": False}, (), []),
        (ALWAYS | {"peft_type": "LORA", "peft_version": "0.6.0"}, CONVOLUTION, []),
        (ALWAYS | {"peft_type": "LORA", "peft_version": "0.5.0"}, CONVOLUTION, ["lora-convolution"]),
        (ALWAYS | {"peft_type": "LORA", "peft_version": "0.5.0"}, LINEAR, []),
    ],
)
def test_what_changed_is_known_by_the_config(
    config: dict[str, Any], tensors: tuple[StoredTensor, ...], expected: list[str]
) -> None:
    found = changes(recorded(config), tensors)
    assert [change.name for change, _ in found] == expected


def test_a_change_names_its_factor_and_its_releases() -> None:
    ((change, span),) = changes(recorded(LOKR), ())
    assert "2" in change.effect.split()
    assert str(span) == str(Span(oldest=0, newest=13))


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


@pytest.mark.parametrize(
    ("changed", "times"),
    [
        ({"r": 4, "alpha": 6}, "1.5"),
        ({"r": 4, "alpha": 8, "use_rslora": True}, "4"),
        ({"r": 9, "alpha": 6, "use_rslora": True}, "2"),
        ({"r": 4, "alpha": 4}, None),
        ({"r": 4, "alpha": 2, "use_rslora": True}, None),
        ({"r": 0, "alpha": 4}, None),
        ({"r": 1, "alpha": 4}, "4"),
        ({"r": 4, "alpha": None}, None),
        ({"r": None, "alpha": 4}, None),
    ],
)
def test_the_factor_of_a_change(changed: dict[str, Any], times: str | None) -> None:
    found = [change.effect for change, _ in changes(recorded(LOKR | changed), ())]
    assert len(found) == bool(times)
    assert all(times in words.split() for words in found)


@pytest.mark.parametrize(
    ("version", "concerned"), [("0.5.0", False), ("0.6.0", True), ("0.13.2", True), ("0.14.0", False)]
)
def test_the_first_and_the_last_release_concerned(version: str, concerned: bool) -> None:
    assert bool([*changes(recorded(LOKR | {"peft_version": version}), ())]) == concerned


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_of_later_releases(scheme: str) -> None:
    config = ALWAYS | {"peft_type": "LORA", "init_lora_weights": scheme}
    assert [change.name for change, _ in changes(recorded(config), ())] == ["old-initialization"]
    assert not [*changes(recorded(config | {"init_lora_weights": f"x{scheme}"}), ())]
    assert not [*changes(recorded(config | {"init_lora_weights": "gaussian"}), ())]


def test_all_changes_that_concern_a_config_are_listed() -> None:
    config = LORA_0_14 | {"use_dora": True}
    assert [change.name for change, _ in changes(recorded(config), EMBEDDING)] == [
        "lora-bias-scale",
        "dora-embedding",
    ]
    assert not [*changes(recorded(config | {"peft_type": "LOHA"}), EMBEDDING)]
