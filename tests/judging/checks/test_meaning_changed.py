"""When meaning-changed fires, and what it says: its messages are in meaning-changed.txt."""

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.checks.meaning_changed import changes
from merge_gate.judging.peft_releases import Span
from tests.support.judging.cases import LOKR, Given, files
from tests.support.judging.every_check import EveryCheck
from tests.support.judging.releases import ALWAYS, CONVOLUTION, DORA, EMBEDDING, LINEAR, LORA_0_14
from tests.support.judging.releases import LOKR as SCALED


class TestMeaningChanged(EveryCheck):
    FIRES = (Given(files=files(config=LOKR | {"r": 2, "alpha": 4})),)
    SITUATIONS = {
        "the bias of lora_B": Given(files=files(config=LORA_0_14)),
        "the bias of lora_B, by the root of the rank": Given(
            files=files(config=LORA_0_14 | {"use_rslora": True, "r": 4, "lora_alpha": 6})
        ),
        "DoRA on an embedding": Given(files=files(config=DORA, tensors=EMBEDDING)),
        "OFT's series": Given(
            files=files(config=ALWAYS | {"peft_type": "OFT", "exclude_modules": None, "use_cayley_neumann": True})
        ),
        "a convolution of an old release": Given(
            files=files(config=ALWAYS | {"peft_type": "LORA", "peft_version": "0.5.0"}, tensors=CONVOLUTION)
        ),
        "an old initialisation": Given(
            files=files(config=ALWAYS | {"peft_type": "LORA", "init_lora_weights": "pissa"})
        ),
    }
    QUIET = (Given(files=files(config=LOKR | {"r": 2, "alpha": 2})),)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        (SCALED, (), ["lokr-scale"]),
        (SCALED | {"alpha": 2}, (), []),
        (SCALED | {"exclude_modules": None}, (), []),
        (SCALED | {"peft_version": "0.21.2"}, (), []),
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
def test_what_changed_is_known_by_the_config(config, tensors, expected) -> None:
    found = changes(recorded(config), tensors)
    assert [change.name for change, _ in found] == expected


def test_a_change_names_its_factor_and_its_releases() -> None:
    ((change, span),) = changes(recorded(SCALED), ())
    assert "2" in change.effect.split()
    assert str(span) == str(Span(oldest=0, newest=13))


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
    found = [change.effect for change, _ in changes(recorded(SCALED | changed), ())]
    assert len(found) == bool(times)
    assert all(times in words.split() for words in found)


@pytest.mark.parametrize(
    ("version", "concerned"), [("0.5.0", False), ("0.6.0", True), ("0.13.2", True), ("0.14.0", False)]
)
def test_the_first_and_the_last_release_concerned(version: str, concerned: bool) -> None:
    assert bool([*changes(recorded(SCALED | {"peft_version": version}), ())]) == concerned


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_of_later_releases(scheme: str) -> None:
    config = ALWAYS | {"peft_type": "LORA", "init_lora_weights": scheme}
    assert [change.name for change, _ in changes(recorded(config), ())] == ["old-initialization"]
    assert not [*changes(recorded(config | {"init_lora_weights": f"x{scheme}"}), ())]
    assert not [*changes(recorded(config | {"init_lora_weights": "gaussian"}), ())]


def test_all_changes_that_concern_a_config_are_listed() -> None:
    config = LORA_0_14 | {"use_dora": True}
    assert [change.name for change, _ in changes(recorded(config), EMBEDDING)] == ["lora-bias-scale", "dora-embedding"]
    assert not [*changes(recorded(config | {"peft_type": "LOHA"}), EMBEDDING)]
