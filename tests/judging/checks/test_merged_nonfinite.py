"""When merged-nonfinite fires, and what it says: its messages are in merged-nonfinite.txt."""

from merge_gate.records.measured import Evidence, FileTensor
from tests.support.judging.cases import (
    LORA_B,
    MODULE,
    WEIGHT,
    Given,
    base,
    broken,
    evidence,
    files,
    judge,
    merged,
    spec,
    tensor,
)
from tests.support.judging.every_check import EveryCheck


def nonfinite(module: str, *, dtype: str = "bfloat16", **counts: int) -> Evidence:
    """A tensor of the adapter is not finite, and so is a merged one."""
    stats = tensor(f"{module}.weight", dtype=dtype, first_index=(1,), **(counts or {"posinf": 2}))
    return evidence(
        file_tensors=(FileTensor(stats=broken(LORA_B)),), merges=(merged(stats, module=module, dtype_max=3.4e38),)
    )


class TestMergedNonfinite(EveryCheck):
    FIRES = (Given(evidence(merges=(merged(broken(posinf=3)),))), Given(evidence(merges=(merged(broken()),))))
    SITUATIONS = {
        "a NaN that the merge carries on": Given(nonfinite(MODULE)),
        "a NaN that the merge carries on into a part of the module": Given(
            evidence(
                file_tensors=(FileTensor(stats=broken(LORA_B)),),
                merges=(merged(broken(f"{MODULE}.inner.weight"), module=f"{MODULE}.inner"),),
            )
        ),
        "a NaN that the merge carries on into the whole of it": Given(
            evidence(
                file_tensors=(FileTensor(stats=broken(LORA_B)),),
                merges=(merged(broken("model.layers.5.fused"), module="model.layers.5"),),
            )
        ),
        "a NaN, and another elsewhere": Given(nonfinite("model.layers.55.q_proj")),
        "an overflow in bfloat16": Given(
            evidence(merges=(merged(tensor(dtype="bfloat16", posinf=2, first_index=(3,)), dtype_max=3.4e38),))
        ),
        "a NaN, and another in a tensor that is not used": Given(
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B), used=False),), merges=(merged(broken()),))
        ),
        "an overflow in float16": Given(evidence(merges=(merged(broken(neginf=1)),))),
        "a NaN of finite values": Given(evidence(merges=(merged(broken(nan=1, posinf=1)),))),
    }
    QUIET = (Given(evidence(merges=(merged(broken()),), base=base(nonfinite=(broken(),)))),)


def test_a_tensor_broken_in_the_base_is_not_the_mergers_fault() -> None:
    both = evidence(base=base(nonfinite=(broken(),)), merges=(merged(broken()), merged(broken("other.weight"))))
    findings = judge(spec(), files(), both)
    assert [(finding.check, finding.tensor) for finding in findings] == [
        ("base-nonfinite", WEIGHT),
        ("merged-nonfinite", "other.weight"),
    ]
