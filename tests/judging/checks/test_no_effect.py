"""When no-effect fires, and what it says: its messages are in no-effect.txt."""

from typing import Any

import pytest

from merge_gate.records.config import Combine
from merge_gate.records.measured import Evidence, FileTensor
from merge_gate.records.terms import Severity
from tests.support.judging.cases import (
    HALF_MAX,
    LORA_A,
    LORA_B,
    MODULE,
    Given,
    base,
    evidence,
    files,
    hint_of,
    judge,
    merged,
    reason,
    spec,
    tensor,
)
from tests.support.judging.every_check import EveryCheck
from tests.support.wording import Wording

SECOND = "model.layers.6.mlp"


def zero_b(**changes: Any) -> Evidence:
    """lora_B is zero."""
    zero = FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0))
    return evidence(file_tensors=(FileTensor(stats=tensor(LORA_A)), zero), **changes)


KASA = files(config={"kasa_config": {"beta": 1e-4}})


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
        Given(evidence(merges=(merged(changed=False),))),
        Given(zero_b(merges=(merged(changed=False),))),
        Given(zero_b(), KASA),
        Given(evidence(merges=(merged(changed=False),)), files(config={"lora_alpha": 0})),
        Given(
            evidence(targeted=(MODULE, "layers.6"), merges=(merged(), merged(module="layers.6", changed=False))),
            severity=Severity.WARNING,
        ),
        Given(
            zero_b(targeted=(MODULE, "head"), merges=(merged(), merged(tensor("head.weight"), module="head"))),
            KASA,
            severity=Severity.WARNING,
        ),
        Given(padded(), PADDING, severity=Severity.NOTE),
        Given(padded(), severity=Severity.WARNING),
        Given(padded(0.5), PADDING, severity=Severity.WARNING),
    )
    SITUATIONS = {
        "two modules without effect": Given(
            evidence(targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND, changed=False)))
        ),
        "no effect, since tensors are missing": Given(evidence(missing=(LORA_A,), merges=(merged(changed=False),))),
        "one of two modules without effect, since its tensors are missing": Given(
            evidence(
                missing=(LORA_A,), targeted=(MODULE, SECOND), merges=(merged(changed=False), merged(module=SECOND))
            )
        ),
        "two of three modules without effect": Given(
            evidence(
                targeted=(MODULE, SECOND, "lm_head"),
                merges=(merged(), merged(module=SECOND, changed=False), merged(module="lm_head", changed=False)),
            )
        ),
        "a module that is changed in a part of it, and one that only begins alike": Given(
            evidence(targeted=(SECOND, "model.layers.6.ml"), merges=(merged(module=f"{SECOND}.up"),))
        ),
        "no effect by a zero that is no lora_B": Given(
            evidence(
                merges=(merged(changed=False),),
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0)),
                    FileTensor(stats=tensor(LORA_B)),
                ),
            )
        ),
        "no effect, and a constant lora_B": Given(
            evidence(
                merges=(merged(changed=False),),
                file_tensors=(FileTensor(stats=tensor(LORA_B, minimum=1.0, maximum=1.0)),),
            )
        ),
        "a module that AdaLoRA has pruned, and one that only is not changed": Given(pruned("ADALORA")),
        "a module without rank that is not AdaLoRA's": Given(pruned("LORA")),
        "no effect in float32": Given(evidence(base=base(dtype="float32"), merges=(merged(changed=False),))),
        "a trained KaSA of which a module is not changed": Given(
            evidence(targeted=(MODULE, SECOND), merges=(merged(), merged(module=SECOND, changed=False))), KASA
        ),
        "little headroom in three": Given(
            evidence(
                merges=(
                    merged(tensor("a.weight", maximum=40_000.0), module="a"),
                    merged(tensor("b.weight", minimum=-65_000.0), module="b"),
                    merged(tensor("c.weight", dtype="bfloat16", maximum=2e38), module="c", dtype_max=3.4e38),
                    merged(tensor("d.weight", maximum=HALF_MAX / 2), module="d"),
                )
            )
        ),
        "nothing that is targeted": Given(evidence(targeted=(), merges=())),
    }
    QUIET = (
        Given(evidence(targeted=("lm", MODULE), merges=(merged(), merged(module="lm.head")))),
        Given(evidence(refusal=reason("layer_left_unmerged", module="m"), merges=())),
        Given(evidence(targeted=("lm_head", MODULE), shared=(("lm_head", MODULE),))),
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


@pytest.mark.attempt("M6", "the keys of one module are missing", "no-effect points to keys-missing")
def test_a_merge_without_effect_points_to_tensors_that_lack() -> None:
    lost = evidence(missing=(LORA_A, LORA_B), merges=(merged(changed=False),))
    assert "keys-missing" in hint_of("no-effect", lost)
    assert "keys-missing" not in hint_of("no-effect", evidence(merges=(merged(changed=False),)))
