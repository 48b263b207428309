"""When no-effect fires, and what it says: its messages are in no-effect.txt."""

from __future__ import annotations

import dataclasses

import pytest

from merge_gate.records.config import Combine
from merge_gate.records.measured import Evidence, FileTensor
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import (
    HALF_MAX,
    LORA_A,
    LORA_B,
    MODULE,
    Fire,
    base,
    evidence,
    files,
    hint_of,
    judge,
    merged,
    of,
    reason,
    spec,
    tensor,
)
from tests.support.judging.every_check import EveryCheck
from tests.support.wording import Wording

SECOND = "model.layers.6.mlp"


def pruned(peft_type: str) -> Evidence:
    """One module is changed, one has no rank, and one is left as it was."""
    name = f"base_model.model.{SECOND}.lora_A.weight"
    return evidence(
        peft_type=peft_type,
        targeted=(MODULE, SECOND, "lm_head"),
        file_tensors=(FileTensor(stats=tensor(LORA_A)), FileTensor(stats=tensor(name, shape=(0, 8), numel=0))),
        merges=(merged(), merged(module=SECOND, changed=False)),
    )


def padded(value: float = 0.0) -> Evidence:
    """One module is changed, and one has factors of this value, whose merge changes nothing."""
    names = (f"base_model.model.{SECOND}.lora_{side}.weight" for side in "AB")
    return evidence(
        targeted=(MODULE, SECOND),
        file_tensors=(
            FileTensor(stats=tensor(LORA_A)),
            *(FileTensor(stats=tensor(name, minimum=value, maximum=value)) for name in names),
        ),
        merges=(merged(), merged(module=SECOND, changed=False)),
    )


PADDING = files(padding=frozenset({SECOND}))


class TestNoEffect(EveryCheck):
    FIRES = (
        Fire((), Origin.ADAPTER, evidence(merges=(merged(changed=False),))),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(
                merges=(merged(changed=False),),
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                ),
            ),
        ),
        Fire(
            ("KaSA",),
            Origin.ADAPTER,
            evidence(
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                )
            ),
            files(config={"kasa_config": {"beta": 1e-4}}),
        ),
        Fire((), Origin.ADAPTER, evidence(merges=(merged(changed=False),)), files(config={"lora_alpha": 0})),
        Fire(
            ("layers.6",),
            Origin.ADAPTER,
            evidence(targeted=(MODULE, "layers.6"), merges=(merged(), merged(module="layers.6", changed=False))),
            severity=Severity.WARNING,
            places={"module": "layers.6"},
        ),
        Fire(
            ("layers.5",),
            Origin.ADAPTER,
            evidence(
                targeted=(MODULE, "head"),
                merges=(merged(), merged(tensor("head.weight"), module="head")),
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                ),
            ),
            files(config={"kasa_config": {"beta": 1e-4}}),
            severity=Severity.WARNING,
        ),
        Fire((SECOND,), Origin.ADAPTER, padded(), PADDING, severity=Severity.NOTE, places={"module": SECOND}),
        Fire((SECOND,), Origin.ADAPTER, padded(), severity=Severity.WARNING, places={"module": SECOND}),
        Fire((SECOND,), Origin.ADAPTER, padded(0.5), PADDING, severity=Severity.WARNING, places={"module": SECOND}),
    )
    SITUATIONS = (
        (
            "two modules without effect",
            (
                evidence(
                    targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND, changed=False))
                ),
                files(),
            ),
        ),
        (
            "no effect, since tensors are missing",
            (evidence(missing=(LORA_A,), merges=(merged(changed=False),)), files()),
        ),
        (
            "one of two modules without effect, since its tensors are missing",
            (
                evidence(
                    missing=(LORA_A,), targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND))
                ),
                files(),
            ),
        ),
        (
            "two of three modules without effect",
            (
                evidence(
                    targeted=(MODULE, SECOND, "lm_head"),
                    merges=(merged(), merged(module=SECOND, changed=False), merged(module="lm_head", changed=False)),
                ),
                files(),
            ),
        ),
        (
            "a module that is changed in a part of it, and one that only begins alike",
            (evidence(targeted=(SECOND, "model.layers.6.ml"), merges=(merged(module=f"{SECOND}.up"),)), files()),
        ),
        (
            "no effect by a zero that is no lora_B",
            (
                evidence(
                    merges=(merged(changed=False),),
                    file_tensors=(
                        FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0)),
                        FileTensor(stats=tensor(LORA_B)),
                    ),
                ),
                files(),
            ),
        ),
        (
            "no effect, and a constant lora_B",
            (
                evidence(
                    merges=(merged(changed=False),),
                    file_tensors=(FileTensor(stats=tensor(LORA_B, minimum=1.0, maximum=1.0)),),
                ),
                files(),
            ),
        ),
        ("a module that AdaLoRA has pruned, and one that only is not changed", (pruned("ADALORA"), files())),
        ("a module without rank that is not AdaLoRA's", (pruned("LORA"), files())),
        ("no effect in float32", (evidence(base=base(dtype="float32"), merges=(merged(changed=False),)), files())),
        (
            "a trained KaSA of which a module is not changed",
            (
                evidence(targeted=(MODULE, SECOND), merges=(merged(), merged(module=SECOND, changed=False))),
                files(config={"kasa_config": {"beta": 1e-4}}),
            ),
        ),
        (
            "little headroom in three",
            (
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
        ),
        ("nothing that is targeted", (evidence(targeted=(), merges=()), files())),
    )
    QUIET = (
        (evidence(targeted=("lm", MODULE), merges=(merged(), merged(module="lm.head"))), files(), spec()),
        (evidence(refusal=reason("layer_left_unmerged", module="m"), merges=()), files(), spec()),
        (evidence(targeted=("lm_head", MODULE), shared=(("lm_head", MODULE),)), files(), spec()),
    )


def test_a_module_that_shares_an_unchanged_tensor_is_unchanged() -> None:
    sharing = evidence(targeted=("lm_head", MODULE), shared=(("lm_head", "model.embed_tokens"),))
    (finding,) = judge(spec(), files(), sharing)
    assert (finding.check, finding.severity, finding.module) == ("no-effect", Severity.WARNING, "lm_head")


def test_a_combination_without_effect_is_due_to_its_weights(wording: Wording) -> None:
    combine = Combine(method="cat", adapters=("a", "b"), weights=(1.0, -1.0))
    one = evidence(merges=(merged(changed=False),))
    (finding,) = judge(spec(combine=combine), files(), one)
    assert finding.check == "no-effect"
    assert "weights" in finding.hint
    wording(finding.hint)


def test_a_module_whose_rank_adalora_has_pruned_away_is_not_idle() -> None:
    gone = "model.layers.6.self_attn.q_proj"
    pruned = FileTensor(stats=tensor(f"base_model.model.{gone}.lora_A", shape=(0, 8), numel=0))
    adapter = evidence(peft_type="ADALORA", targeted=(MODULE, gone), file_tensors=(pruned,))
    assert not of("no-effect", judge(spec(), files(), adapter))
    assert of("no-effect", judge(spec(), files(), dataclasses.replace(adapter, peft_type="LORA")))


@pytest.mark.attempt("M6", "the keys of one module are missing", "no-effect points to keys-missing")
def test_a_merge_without_effect_points_to_tensors_that_lack() -> None:
    lost = evidence(missing=(LORA_A, LORA_B), merges=(merged(changed=False),))
    assert "keys-missing" in hint_of("no-effect", lost)
    assert "keys-missing" not in hint_of("no-effect", evidence(merges=(merged(changed=False),)))
