"""Keys of adapter_config.json that PEFT does not know: which of them are misspelled."""

from __future__ import annotations

import json
from string import ascii_lowercase
from typing import TYPE_CHECKING

import pytest

from merge_gate.engine.adapter.peft_config import read_config
from merge_gate.files.preflight import preflight
from merge_gate.records.refusals import Refused

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"lora_alfa": 64}, (("lora_alfa", "lora_alpha"),)),
        ({"Lora_Alpha": 64, "odd": 1}, (("Lora_Alpha", "lora_alpha"),)),
        ({"lora_alfa": 64, "lora_alpha": 16}, ()),
        ({"alpha": 64}, ()),
        ({"lora_alph" + "a" * 200: 64}, ()),
    ],
    ids=["a letter", "capitals", "the known one is set too", "another trainer's", "long"],
)
def test_a_misspelled_key_is_told_from_an_unknown_one(
    tmp_path: Path, settings: dict[str, int], near: tuple[tuple[str, str], ...]
) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused) as caught:
        read_config(preflight(str(tmp_path), allow_pickle=False))
    assert caught.value.refusal.kind == "ignored_settings"
    assert caught.value.refusal.fields["near"] == near


def test_a_file_with_many_unknown_keys_does_not_cost_time(tmp_path: Path) -> None:
    misspelled = {f"lora_alph{first}{second}": 1 for first in ascii_lowercase for second in ascii_lowercase}
    config = {"peft_type": "LORA", "r": 4, **misspelled}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused) as caught:
        read_config(preflight(str(tmp_path), allow_pickle=False))
    assert caught.value.refusal.kind == "ignored_settings"
    assert len(caught.value.refusal.fields["near"]) == 20
