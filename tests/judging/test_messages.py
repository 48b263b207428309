"""The messages of all checks: `messages.txt` is what people read, so look at each change of it.

UPDATE_GOLDENS=1 writes it again.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from merge_gate.judging.not_judged import accident
from merge_gate.records.files import AdapterFiles, StoredTensor
from merge_gate.records.measured import Evidence, FileTensor
from merge_gate.records.terms import Finding, Quantization
from tests.support.judging.cases import (
    ALL,
    FOURIERFT,
    HALF_MAX,
    LORA_A,
    LORA_B,
    MODULE,
    NAMED,
    base,
    broken,
    evidence,
    files,
    judge,
    lossy,
    merged,
    spec,
    tensor,
    unread,
)
from tests.support.judging.keys import BIASES, LORA_0_9, LORA_0_12, OLD
from tests.support.judging.releases import ALWAYS, CONVOLUTION, DORA, EMBEDDING, LORA_0_14

GOLDEN = Path(__file__).with_name("messages.txt")
SECOND = "model.layers.6.mlp"


def headers(*names: str) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(name=name, dtype="F32", shape=(2, 2)) for name in names)


def lost(config: dict[str, Any], *names: str) -> tuple[Evidence, AdapterFiles]:
    return evidence(missing=names), files(config=config)


def nonfinite(module: str, *, dtype: str = "bfloat16", **counts: int) -> Evidence:
    """A tensor of the adapter is not finite, and so is a merged one."""
    stats = tensor(f"{module}.weight", dtype=dtype, first_index=(1,), **(counts or {"posinf": 2}))
    return evidence(
        file_tensors=(FileTensor(stats=broken(LORA_B)),), merges=(merged(stats, module=module, dtype_max=3.4e38),)
    )


def pruned(peft_type: str) -> Evidence:
    """One module is changed, one has no rank, and one is left as it was."""
    name = f"base_model.model.{SECOND}.lora_A.weight"
    return evidence(
        peft_type=peft_type,
        targeted=(MODULE, SECOND, "lm_head"),
        file_tensors=(FileTensor(stats=tensor(LORA_A)), FileTensor(stats=tensor(name, shape=(0, 8), numel=0))),
        merges=(merged(), merged(module=SECOND, changed=False)),
    )


SITUATIONS: dict[str, tuple[Evidence | None, AdapterFiles]] = {
    "two tensors are missing": lost({}, LORA_A, LORA_B),
    "biases that an old release names otherwise": lost(OLD | {"bias": "all"}, *BIASES),
    "biases that a release lost on saving": lost(LORA_0_12, *BIASES),
    "four biases of a config that says no release": lost(LORA_0_12 | {"bias": "all"}, *BIASES * 4),
    "biases that nobody trained": lost(LORA_0_9, *BIASES),
    "biases of the release that keeps them": lost(LORA_0_9 | {"peft_version": "0.21.2"}, *BIASES),
    "biases of a config that says no release": lost(LORA_0_12 | {"bias": "all"}, *BIASES),
    "one tensor is lost on loading": (evidence(missing=(LORA_A,), dropped=(LORA_A,)), files()),
    "two of three are lost on loading": (
        evidence(missing=(LORA_A, LORA_B, "x.lora_A.weight"), dropped=(LORA_A, LORA_B)),
        files(),
    ),
    "four of four are lost on loading": (evidence(missing=tuple("abcd"), dropped=tuple("abcd")), files()),
    "two tensors of the base that the config does not name": (evidence(unnamed=("a.weight", "b.weight")), files()),
    "missing, of a model whose wrapper was saved": (
        evidence(missing=(LORA_A,)),
        files(tensors=headers("_orig_mod.base_model.model.q_proj.lora_A.weight")),
    ),
    "missing, and wrapped twice": (
        evidence(missing=(LORA_A,)),
        files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight", LORA_B)),
    ),
    "unexpected, and wrapped twice": (
        evidence(unexpected=("a.lora_A", "b.lora_B")),
        files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight")),
    ),
    "missing and unexpected, of a compiled model": (
        evidence(missing=(LORA_A,), unexpected=("base_model.model._orig_mod.q_proj.lora_A.weight",)),
        files(tensors=headers("base_model.model._orig_mod.q_proj.lora_A.weight")),
    ),
    "unexpected, of layers that were compiled one by one": (
        evidence(unexpected=("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight",)),
        files(tensors=headers("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight")),
    ),
    "unexpected, of a model that was merged before": (
        evidence(unexpected=("model.embed_tokens.weight",)),
        files(tensors=headers("model.embed_tokens.weight", "model.norm.weight")),
    ),
    "unexpected, and saved twice": (evidence(unexpected=("score.modules_to_save.weight",)), files()),
    "a class that the base is not": (
        evidence(base=base(loaded_as="BertModel"), instead_of="BertForMaskedLM"),
        files(config={"task_type": "MASKED_LM"}),
    ),
    "a revision of the base that the config does not name": (
        evidence(base=base(revision="c0ffee")),
        files(config={"base_model_name_or_path": "acme/llama", "revision": "v1"}),
    ),
    "the revision that was asked for": (
        evidence(base=base(revision="c0ffee")),
        files(config={"base_model_name_or_path": "acme/llama", "revision": "c0ffee"}),
    ),
    "an infinite buffer of the base": (
        evidence(base=base(nonfinite=(tensor("model.mask", neginf=3, is_buffer=True, first_index=(0, 1)),))),
        files(),
    ),
    "a NaN in a buffer of the base": (
        evidence(base=base(nonfinite=(tensor("model.mask", nan=1, is_buffer=True, first_index=(0, 1)),))),
        files(),
    ),
    "a tensor of nothing but NaN": (
        evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=60, posinf=1, neginf=3)),)),
        files(),
    ),
    "a NaN that the merge carries on": (nonfinite(MODULE), files()),
    "a NaN that the merge carries on into a part of the module": (
        evidence(
            file_tensors=(FileTensor(stats=broken(LORA_B)),),
            merges=(merged(broken(f"{MODULE}.inner.weight"), module=f"{MODULE}.inner"),),
        ),
        files(),
    ),
    "a NaN that the merge carries on into the whole of it": (
        evidence(
            file_tensors=(FileTensor(stats=broken(LORA_B)),),
            merges=(merged(broken("model.layers.5.fused"), module="model.layers.5"),),
        ),
        files(),
    ),
    "a NaN, and another elsewhere": (nonfinite("model.layers.55.q_proj"), files()),
    "an overflow in bfloat16": (
        evidence(merges=(merged(tensor(dtype="bfloat16", posinf=2, first_index=(3,)), dtype_max=3.4e38),)),
        files(),
    ),
    "an overflow in float16": (evidence(merges=(merged(broken(neginf=1)),)), files()),
    "a NaN of finite values": (evidence(merges=(merged(broken(nan=1, posinf=1)),)), files()),
    "two modules without effect": (
        evidence(targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND, changed=False))),
        files(),
    ),
    "no effect, since tensors are missing": (evidence(missing=(LORA_A,), merges=(merged(changed=False),)), files()),
    "one of two modules without effect, since its tensors are missing": (
        evidence(missing=(LORA_A,), targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND))),
        files(),
    ),
    "two of three modules without effect": (
        evidence(
            targeted=(MODULE, SECOND, "lm_head"),
            merges=(merged(), merged(module=SECOND, changed=False), merged(module="lm_head", changed=False)),
        ),
        files(),
    ),
    "a module that is changed in a part of it, and one that only begins alike": (
        evidence(targeted=(SECOND, "model.layers.6.ml"), merges=(merged(module=f"{SECOND}.up"),)),
        files(),
    ),
    "no effect by a zero that is no lora_B": (
        evidence(
            merges=(merged(changed=False),),
            file_tensors=(FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0)), FileTensor(stats=tensor(LORA_B))),
        ),
        files(),
    ),
    "no effect, and a constant lora_B": (
        evidence(
            merges=(merged(changed=False),),
            file_tensors=(FileTensor(stats=tensor(LORA_B, minimum=1.0, maximum=1.0)),),
        ),
        files(),
    ),
    "a module that AdaLoRA has pruned, and one that only is not changed": (pruned("ADALORA"), files()),
    "a module without rank that is not AdaLoRA's": (pruned("LORA"), files()),
    "no effect in float32": (evidence(base=base(dtype="float32"), merges=(merged(changed=False),)), files()),
    "a trained KaSA of which a module is not changed": (
        evidence(targeted=(MODULE, SECOND), merges=(merged(), merged(module=SECOND, changed=False))),
        files(config={"kasa_config": {"beta": 1e-4}}),
    ),
    "rounding, estimated, in two tensors of different size": (
        evidence(
            merges=(
                lossy(0.8, estimated=True),
                merged(
                    tensor("model.norm.weight", numel=192, dtype="bfloat16"),
                    module="model.norm",
                    base_norm=5.0,
                    delta_norm=2.0,
                    lost_norm=1.8,
                    unchanged_fraction=0.5,
                ),
                merged(tensor("all.weight"), module="all", delta_norm=0.5, lost_norm=0.0, unchanged_fraction=0.0),
                merged(tensor("rest.weight"), module="rest", delta_norm=1.0, lost_norm=0.6),
            )
        ),
        files(),
    ),
    "rounding, of a weight that is quantised again": (
        evidence(base=base(quantization=Quantization.BNB_4BIT), merges=(lossy(0.6),)),
        files(),
    ),
    "rounding, of most of them, quantised again": (
        evidence(
            base=base(quantization=Quantization.BNB_8BIT), merges=(lossy(0.9), lossy(0.9), lossy(0.0, delta_norm=100.0))
        ),
        files(),
    ),
    "rounding, without a count": (
        evidence(merges=(merged(base_norm=1.0, delta_norm=1.0, lost_norm=0.75),)),
        files(),
    ),
    "little headroom in three": (
        evidence(
            merges=(
                merged(tensor("a.weight", maximum=40_000.0), module="a"),
                merged(tensor("b.weight", minimum=-65_000.0), module="b"),
                merged(tensor("c.weight", dtype="bfloat16", maximum=2e38), module="c", dtype_max=3.4e38),
                merged(tensor("d.weight", maximum=HALF_MAX / 2), module="d"),
            )
        ),
        files(),
    ),
    "safe_merge refuses two, and one that is broken besides": (
        evidence(
            refused_by_safe_merge=(MODULE, "lm_head", SECOND, f"{SECOND}.up"),
            merges=(merged(), merged(broken("x.weight"), module=SECOND)),
        ),
        files(),
    ),
    "safe_merge refuses on a broken base": (
        evidence(refused_by_safe_merge=(MODULE,), base=base(nonfinite=(broken("model.norm.weight"),))),
        files(),
    ),
    "two large deltas, the larger one estimated": (
        evidence(
            merges=(
                merged(base_norm=1.0, delta_norm=20.0),
                merged(tensor("b.weight"), module="b", base_norm=2.0, delta_norm=88.0, estimated=True),
                merged(tensor("c.weight"), module="c", base_norm=2.0, delta_norm=float("inf")),
                merged(tensor("d.weight"), module="d", base_norm=2.0, delta_norm=20.0),
            )
        ),
        files(),
    ),
    "a delta that is too large for a typical weight": (
        evidence(merges=(merged(tensor(shape=(8, 8), numel=64), base_norm=0.0, delta_norm=6e6),), typical_rms=0.5),
        files(),
    ),
    "two large deltas of one size": (
        evidence(
            merges=(
                merged(base_norm=1.0, delta_norm=20.0),
                merged(tensor("b.weight"), module="b", base_norm=2.0, delta_norm=40.0),
            )
        ),
        files(),
    ),
    "nothing that is targeted": (evidence(targeted=(), merges=()), files()),
    "a base whose name only begins like the one used": (
        evidence(),
        files(config={"base_model_name_or_path": "acme/llamaX", "revision": "main"}),
    ),
    "the bias of lora_B": (evidence(), files(config=LORA_0_14)),
    "the bias of lora_B, by the root of the rank": (
        evidence(),
        files(config=LORA_0_14 | {"use_rslora": True, "r": 4, "lora_alpha": 6}),
    ),
    "DoRA on an embedding": (evidence(), files(config=DORA, tensors=EMBEDDING)),
    "OFT's series": (
        evidence(),
        files(config=ALWAYS | {"peft_type": "OFT", "exclude_modules": None, "use_cayley_neumann": True}),
    ),
    "a convolution of an old release": (
        evidence(), files(config=ALWAYS | {"peft_type": "LORA", "peft_version": "0.5.0"}, tensors=CONVOLUTION)
    ),
    "an old initialisation": (evidence(), files(config=ALWAYS | {"peft_type": "LORA", "init_lora_weights": "pissa"})),
    "two ties": (evidence(tied=(("lm_head.weight", "embed"), ("a.b.weight", "c"))), files()),
    "a layer that is never called": (evidence(unread=(unread(),)), files(config={"init_lora_weights": False})),
    "layers that are never called": (
        evidence(peft_type="FOURIERFT", unread=(unread(), unread(module="body.out_proj", share=0.25))),
        files(config=FOURIERFT),
    ),
}  # fmt: skip


def found(one: Evidence | None, of_files: AdapterFiles) -> tuple[Finding, ...]:
    return judge(spec(base=NAMED) if of_files.config.base_revision else spec(), of_files, one)


def shown(finding: Finding) -> str:
    rest = {
        field.name: getattr(finding, field.name)
        for field in dataclasses.fields(finding)
        if field.name not in {"check", "severity", "origin", "message", "hint"}
        and getattr(finding, field.name) != field.default
    }
    places = "".join(f"\n  {name} = {value!r}" for name, value in rest.items())
    return f"{finding.severity} {finding.check}, {finding.origin}\n  {finding.message}\n  > {finding.hint}{places}\n"


def told() -> str:
    parts = []
    for parameter in ALL:
        fire = parameter.values[1]
        if fire.evidence is not None and fire.evidence.refusal is not None:
            continue  # worded in test_refusals.py
        parts += [f"== {parameter.id}\n", *map(shown, judge(fire.spec, fire.files, fire.evidence))]
    for name, (one, of_files) in SITUATIONS.items():
        parts += [f"== {name}\n", *map(shown, found(one, of_files))]
    parts += ["== accidents\n", *(shown(accident("x", error)) for error in (MemoryError(), ValueError("v" * 300)))]
    return "\n".join(parts)


@pytest.mark.attempt("M6", "the keys of one module are missing", "no-effect points to keys-missing")
def test_messages_of_checks() -> None:
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text(told(), encoding="utf-8")
    assert told() == GOLDEN.read_text(encoding="utf-8")


def test_only_these_situations_have_no_finding() -> None:
    silent = [name for name, situation in SITUATIONS.items() if not found(*situation)]
    assert silent == ["biases that nobody trained", "the revision that was asked for"]
