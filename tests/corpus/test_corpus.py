"""Adapters that old releases of PEFT saved: merged into what those releases merged, or the table says why not.

Sixteen kinds of them, which old gates failed, passed or misnamed, are merged by plain PEFT too, in three dtypes.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.corpus import hold
from tests.support.gating import Gate, one_thread
from tests.support.merged import kept
from tests.support.models import read_config, to_pickle, write_config

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
    judgement = held.judgement
    if (which := name(adapter)) in REFUSED:
        assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, REFUSED[which]), str(judgement)
        return
    assert held.passes, str(judgement)
    assert bool(held.differing) == (which in CHANGED | FORGOTTEN), held.differing
    assert ("meaning-changed" in judgement.warned) == (which in CHANGED), str(judgement)


def test_a_converted_bone_adapter_merges_as_its_release_did(tmp_path: Path, gate: Gate) -> None:
    """What scripts/convert-bone-to-miss.py of PEFT's repository does, which the hint names."""
    adapter = tmp_path / "bone"
    shutil.copytree(HERE / "adapters" / "0.15.2" / "bone", adapter)
    write_config(adapter, read_config(adapter) | {"peft_type": "MISS"})
    weights = adapter / "adapter_model.safetensors"
    save_file({name.replace(".bone_", ".miss_"): value for name, value in load_file(weights).items()}, weights)
    held = hold(adapter, HERE / "bases", gate)
    assert held.is_same, (str(held.judgement), held.differing)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`source` is RELEASE/KIND of the corpus; its cause and its warning are those of the tables above."""

    name: str
    source: str
    change: Callable[[Path], None] = lambda _: None
    labels: int | None = None
    rows: int | None = None


def with_code(adapter: Path) -> None:
    code = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers_modules.acme.modeling_acme"}
    write_config(adapter, read_config(adapter) | {"auto_mapping": code})


KINDS = (
    Kind(name="pickled head", source="0.9.0/lora-roberta-bias-all", change=to_pickle, labels=3),
    Kind(name="pickled vocabulary", source="0.13.2/lora-resized", change=to_pickle, rows=34),
    Kind(name="enlarged vocabulary", source="0.13.2/lora-resized", rows=34),
    Kind(name="bias all with a head", source="0.17.1/lora-roberta-bias-all", labels=3),
    Kind(name="bias lora_only, never trained", source="0.9.0/lora-bias-only"),
    Kind(name="bias lora_only, lost", source="0.20.0/lora-bias-only"),
    Kind(name="names of an old bias", source="0.4.0/lora-bias-only"),
    Kind(name="class of a base with code", source="0.17.1/lora-embedding", change=with_code),
    Kind(name="LoKr's scale", source="0.6.2/lokr"),
    Kind(name="lora_bias's scale", source="0.15.2/lora-bias-term"),
    Kind(name="DoRA on an embedding", source="0.13.2/dora-embedding"),
    Kind(name="OFT's series", source="0.17.1/oft-rank"),
    Kind(name="PiSSA that was ignored", source="0.3.0/lora-pissa"),
    Kind(name="OFT of before", source="0.9.0/oft"),
    Kind(name="OFT's other names", source="0.15.2/oft-block"),
    Kind(name="BONE", source="0.15.2/bone"),
)


def merge_plainly(kind: Kind, adapter: Path, base: Path, dtype: str) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForCausalLM if kind.labels is None else transformers.AutoModelForSequenceClassification
    more = {} if kind.labels is None else {"num_labels": kind.labels}
    model = auto.from_pretrained(base, dtype=methods.DTYPES[dtype], **more)
    if kind.rows is not None:
        model.resize_token_embeddings(kind.rows, mean_resizing=False)
    return methods.values(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True))


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_judged_right_in_every_dtype(kind: Kind, dtype: str, gate: Gate, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(HERE / "adapters" / kind.source, adapter)
    kind.change(adapter)
    base = HERE / "bases" / json.loads((adapter / "merged.json").read_text())["base"].partition("+")[0]
    with kept() as seen:
        judgement = gate.judge(adapter, base, dtype=dtype, allow_pickle=True)
    if kind.source in REFUSED:
        assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, REFUSED[kind.source]), str(judgement)
        return
    assert judgement.verdict is Verdict.PASSED, str(judgement)
    assert ("meaning-changed" in judgement.warned) == (kind.source in CHANGED), str(judgement)
    with methods.quiet():
        expected = merge_plainly(kind, adapter, base, dtype)
    assert seen
    assert methods.same({name: expected[name] for name in seen}, seen)
