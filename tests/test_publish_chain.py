"""From the gate to a checked release, as a user runs it: publish, verify, and publish again."""

import json
from pathlib import Path

import pytest

from tests.support.command import merge_gate


@pytest.mark.slow
def test_what_is_published_is_verified_and_made_again(shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base("llama"), shelf.adapter("plain")
    names = ("--base", base, "--adapter", adapter)
    # 1. Publish.
    done = merge_gate("run", adapter, "--base", base, "--publish", "merged", cwd=tmp_path)
    assert done.code == 0, done.said
    model = tmp_path / "merged" / "plain"
    # 2. Verify it against base and adapter.
    verified = merge_gate("verify", model, *names, cwd=tmp_path)
    assert verified.code == 0, verified.said
    (entry,) = json.loads((tmp_path / "merge-gate-verify" / "report.json").read_text())["adapters"]
    assert "exact" in {found["check"] for found in entry["findings"]}
    # 3. Publish it again.
    again = merge_gate("run", adapter, "--base", base, "--publish", "again", cwd=tmp_path)
    assert again.code == 0, again.said
    assert listed(tmp_path / "again" / "plain") == listed(model)
    # 4. One bit less, and nothing of this holds.
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert merge_gate("verify", model, *names, cwd=tmp_path).code == 1
    assert merge_gate("verify", model, cwd=tmp_path).code == 1


def listed(model: Path) -> object:
    return json.loads((model / "merge-gate.json").read_text())["files"]
