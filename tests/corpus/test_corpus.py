"""Adapters that old releases of PEFT saved: merged into what those releases merged, or the table says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from merge_gate.records.terms import Severity, Verdict
from tests.support.corpus import hold
from tests.support.gating import Gate, one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ADAPTERS = sorted(path.parent for path in HERE.glob("adapters/*/*/merged.json"))

CHANGED = {
    "0.13.2/dora-embedding", "0.15.2/lora-bias-term", "0.17.1/oft-rank", "0.3.0/lora-pissa", "0.4.0/lora-convolution",
    "0.6.2/lokr",
}  # fmt: skip
"""Merged into something else than then: a warning names it."""

REFUSED = {
    "0.2.0/lora-roberta-bias-all": "keys-missing",
    "0.3.0/lora-bias-all": "keys-missing",
    "0.4.0/lora-bias-only": "keys-missing",
    "0.11.1/lora-roberta-bias-only": "keys-missing",
    "0.15.2/bone": "not-mergeable",
    "0.15.2/oft-block": "keys-missing",
    "0.20.0/lora-bias-only": "keys-missing",
    "0.9.0/oft": "not-mergeable",
}
"""What today's PEFT cannot load whole, and the cause."""

FORGOTTEN = {"0.4.0/ia3"}
"""The release's own merge forgot something; nothing in the adapter shows it."""


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with one_thread():
        yield Gate()


def name(adapter: Path) -> str:
    return f"{adapter.parent.name}/{adapter.name}"


def test_the_corpus_has_eight_releases_that_the_tables_name() -> None:
    names = {name(adapter) for adapter in ADAPTERS}
    assert len({adapter.parent.name for adapter in ADAPTERS}) >= 8
    assert len(names) >= 50
    assert names > CHANGED | REFUSED.keys() | FORGOTTEN


@pytest.mark.parametrize("adapter", ADAPTERS, ids=name)
def test_it_is_merged_into_what_its_release_merged(adapter: Path, gate: Gate) -> None:
    held = hold(adapter, HERE / "bases", gate)
    warned = {f.check for f in held.judgement.findings if f.severity is Severity.WARNING}
    if (which := name(adapter)) in REFUSED:
        expected = (Verdict.FAILED, REFUSED[which])
        assert (held.judgement.verdict, held.judgement.cause) == expected, str(held.judgement)
        return
    assert held.passes, str(held.judgement)
    assert bool(held.differing) == (which in CHANGED | FORGOTTEN), held.differing
    assert ("meaning-changed" in warned) == (which in CHANGED), str(held.judgement)


def test_a_converted_bone_adapter_merges_as_its_release_did(tmp_path: Path, gate: Gate) -> None:
    """What scripts/convert-bone-to-miss.py of PEFT's repository does, which the hint names."""
    adapter = tmp_path / "bone"
    shutil.copytree(HERE / "adapters" / "0.15.2" / "bone", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "MISS"}))
    weights = adapter / "adapter_model.safetensors"
    save_file({name.replace(".bone_", ".miss_"): value for name, value in load_file(weights).items()}, weights)
    held = hold(adapter, HERE / "bases", gate)
    assert held.is_same, (str(held.judgement), held.differing)
