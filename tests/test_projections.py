"""VeRA without saved projections: their seed is stated under `expect`, or a note says that nothing proves it."""

from pathlib import Path

import pytest
from peft import VeraConfig

from tests.support import methods
from tests.support.command import entries, merge_gate
from tests.support.models import Shelf, read_config, save_adapter, write_config


@pytest.mark.parametrize(("words", "code", "finding"), [
    ((), 0, ("not-reproducible", "note")),
    (("--expect", "projection_prng_key=8"), 0, None),
    (("--expect", "projection_prng_key=7"), 1, ("expectation-failed", "error")),
])  # fmt: skip
def test_an_edited_key(words: tuple[str, ...], code: int, finding, shelf: Shelf, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "save_projection": False}
    with methods.quiet():
        save_adapter(shelf.base("llama"), tmp_path / "a", VeraConfig(projection_prng_key=7, **settings))
    write_config(tmp_path / "a", read_config(tmp_path / "a") | {"projection_prng_key": 8})
    answer = merge_gate("run", "a", "--base", shelf.base("llama"), *words, cwd=tmp_path)
    assert answer.code == code, answer.said
    (entry,) = entries(tmp_path / "merge-gate-report")
    found = [one for one in entry["findings"] if one["check"] in {"not-reproducible", "expectation-failed"}]
    assert [(one["check"], one["severity"]) for one in found] == ([finding] if finding else [])
    assert all("projection_prng_key" in one["message"] for one in found)
