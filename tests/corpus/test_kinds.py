"""Sixteen kinds of adapters that old gates failed, passed or misnamed, each in three dtypes.

What passes is merged by plain PEFT too, and has its bits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.gating import Gate, one_thread
from tests.support.merged import kept
from tests.support.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
CODE = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers_modules.acme.modeling_acme"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`source` is RELEASE/KIND of the corpus. `cause` None: it passes, with these warnings."""

    name: str
    source: str
    cause: str | None = None
    warned: tuple[str, ...] = ()
    change: Callable[[Path], None] = lambda _: None
    labels: int | None = None
    rows: int | None = None


def pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()


def named(**changes: object) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


CHANGED = ("meaning-changed",)
KINDS = (
    Kind(name="pickled head", source="0.9.0/lora-roberta-bias-all", change=pickled, labels=3),
    Kind(name="pickled vocabulary", source="0.13.2/lora-resized", change=pickled, rows=34),
    Kind(name="enlarged vocabulary", source="0.13.2/lora-resized", rows=34),
    Kind(name="bias all with a head", source="0.17.1/lora-roberta-bias-all", labels=3),
    Kind(name="bias lora_only, never trained", source="0.9.0/lora-bias-only"),
    Kind(name="bias lora_only, lost", source="0.20.0/lora-bias-only", cause="keys-missing"),
    Kind(name="names of an old bias", source="0.4.0/lora-bias-only", cause="keys-missing"),
    Kind(name="class of a base with code", source="0.17.1/lora-embedding", change=named(auto_mapping=CODE)),
    Kind(name="LoKr's scale", source="0.6.2/lokr", warned=CHANGED),
    Kind(name="lora_bias's scale", source="0.15.2/lora-bias-term", warned=CHANGED),
    Kind(name="DoRA on an embedding", source="0.13.2/dora-embedding", warned=CHANGED),
    Kind(name="OFT's series", source="0.17.1/oft-rank", warned=CHANGED),
    Kind(name="PiSSA that was ignored", source="0.3.0/lora-pissa", warned=CHANGED),
    Kind(name="OFT of before", source="0.9.0/oft", cause="not-mergeable"),
    Kind(name="OFT's other names", source="0.15.2/oft-block", cause="keys-missing"),
    Kind(name="BONE", source="0.15.2/bone", cause="not-mergeable"),
)


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with one_thread():
        yield Gate()


def merge_plainly(kind: Kind, adapter: Path, base: Path, dtype: str) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForCausalLM if kind.labels is None else transformers.AutoModelForSequenceClassification
    more = {} if kind.labels is None else {"num_labels": kind.labels}
    model = auto.from_pretrained(base, dtype=methods.DTYPES[dtype], **more)
    if kind.rows is not None:
        model.resize_token_embeddings(kind.rows, mean_resizing=False)
    return methods.values(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_judged_right_in_every_dtype(kind: Kind, dtype: str, gate: Gate, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(HERE / "adapters" / kind.source, adapter)
    base = HERE / "bases" / json.loads((adapter / "merged.json").read_text())["base"].partition("+")[0]
    kind.change(adapter)
    with kept() as seen:
        judgement = gate.judge(adapter, base, dtype=dtype, allow_pickle=True)
    if kind.cause is not None:
        assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, kind.cause), str(judgement)
        return
    assert judgement.verdict is Verdict.PASSED, str(judgement)
    assert ("meaning-changed" in judgement.warned) == (kind.warned == CHANGED), str(judgement)
    with methods.quiet():
        expected = merge_plainly(kind, adapter, base, dtype)
    assert seen
    assert methods.same({name: expected[name] for name in seen}, seen)


def test_there_are_sixteen_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) == 16
