"""A run as large as a fleet's: adapters of 32 layers and seven target modules, of every kind of outcome."""

import dataclasses

from merge_gate.records.measured import TensorMerge
from merge_gate.records.report import AdapterReport, Coverage, Report
from merge_gate.records.terms import Verdict
from tests.support import reports
from tests.support.reports import CRASH, HALF, NAN, OVERFLOW, PARAMETERS, ROUNDING, adapter, report

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
WHOLE = Coverage(
    adapter_tensors=448, applied=448, modules_merged=224, parameters_checked=PARAMETERS, parameters_total=PARAMETERS
)


def merged(dtype: str = "bfloat16", **broken: str) -> tuple[TensorMerge, ...]:
    """32 layers of seven target modules, no two figures alike."""
    (one, _) = reports.tensors(1, dtype)
    return tuple(
        dataclasses.replace(
            one,
            module=f"model.layers.{layer}.{target}",
            stats=dataclasses.replace(
                one.stats,
                name=f"model.layers.{layer}.{target}.weight",
                maximum=0.1234567 * (layer + 1),
                nan=17 if broken.get("nan") == f"{layer}.{target}" else 0,
                posinf=12 if broken.get("inf") == f"{layer}.{target}" else 0,
                first_index=(311, 2040) if f"{layer}.{target}" in broken.values() else None,
            ),
            delta_norm=0.0123456 * (layer + 1) * (place + 1),
            lost_norm=0.000123456 * (place + 1),
        )
        for layer in range(32)
        for place, target in enumerate(TARGETS)
    )


def kind_of(index: int) -> AdapterReport:
    name, whole = f"team-{index:03d}", {"coverage": WHOLE, "line": index + 5}
    match index % 7:
        case 1:
            broken = merged(nan="5.self_attn.q_proj")
            found = (NAN, ROUNDING)
            return adapter(name, Verdict.FAILED, cause=NAN.check, findings=found, tensors=broken, **whole)
        case 3:
            broken = merged("float16", inf="17.mlp.up_proj")
            return adapter(
                name, Verdict.FAILED, cause=OVERFLOW.check, findings=(OVERFLOW,), base=HALF, tensors=broken, **whole
            )
        case 4:
            return adapter(name, Verdict.ERROR, cause="not-judged", findings=(CRASH,), line=index + 5)
        case 5:
            return adapter(name, findings=(ROUNDING,), tensors=merged(), **whole)
        case _:
            return adapter(name, tensors=merged(), **whole)


def fleet(count: int) -> Report:
    return report(*map(kind_of, range(count)))
