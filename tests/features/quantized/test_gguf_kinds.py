"""Right and wrong merges in GGUF files are named: a sample in `make test`, some in `make sweeps`, and all by night."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from gguf import GGMLQuantizationType as Type

from merge_gate.features.quantized.gguf_release import GgufRelease
from tests.support.quantized.gguf_files import resize, roundtrip, write_llama
from tests.support.quantized.releases import FAULTS, Bench

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.terms import Finding

TYPES = (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
SHARES = (0.1, 0.03, 0.01, 0.003)
METHODS = ("lora", "dora", "ia3")
SAMPLE = {(Type.Q4_0, "lora", 0.03, fault) for fault in FAULTS} | {(Type.Q8_0, "dora", 0.01, "right")}
CASES = [(kind, method, share, fault) for kind in TYPES for method in METHODS for share in SHARES for fault in FAULTS]


def marks(case: tuple[Type, str, float, str]) -> list[pytest.MarkDecorator]:
    if case in SAMPLE:
        return []
    return [pytest.mark.slow if case[:3] == (Type.Q8_0, "lora", 0.03) else pytest.mark.nightly]


def released(bench: Bench, fault: str, method: str, share: float, kind: Type, path: Path) -> list[Finding]:
    tensors = bench.faulty(fault, method, share, partial(roundtrip, kind=kind))
    write_llama(path, tensors, bench.model().config, kind, Type.Q8_0)
    with path.open("rb") as file:
        release = GgufRelease(file, bench.model())
        found = bench.findings(release, method, share, has_candidate=fault == "other")
    return [one for one in found if one.check != "strength"]


@pytest.mark.parametrize(
    ("kind", "method", "share", "fault"),
    [pytest.param(*case, marks=marks(case)) for case in CASES],
    ids=str,
)
def test_each_release_has_its_kind(
    bench: Bench, fault: str, method: str, share: float, kind: Type, tmp_path: Path
) -> None:
    first = released(bench, fault, method, share, kind, tmp_path / "model.gguf")[0]
    is_kept = fault == "codes" and dict(first.measured)["factor"] > 0.9  # large deltas survive in many bits
    assert first.check == FAULTS[fault] or is_kept, first.message


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("rows", [1 << 28, 300])
def test_a_tensor_of_another_size_is_read_only_if_it_is_near(
    bench: Bench, name: str, rows: int, tmp_path: Path
) -> None:
    path, tensors = tmp_path / "model.gguf", bench.faulty("right", "lora", 0.03, partial(roundtrip, kind=Type.Q8_0))
    tensors[name] = tensors.pop(name)  # the last one
    write_llama(path, tensors, bench.model().config, Type.Q8_0, Type.Q8_0)
    resize(path, "token_embd.weight" if "embed" in name else "blk.4.ffn_up.weight", (rows, 256), rows * 272)
    with path.open("rb") as file:
        found = bench.findings(GgufRelease(file, bench.model()), "lora", 0.03)
    assert {one.check for one in found} == {"shape-changed", "applied", "strength"}
    assert next(one for one in found if one.check == "shape-changed").tensor == name
    measured = {one.tensor for one in found if one.check == "strength"}
    assert (name in measured) is (rows == 300 and "embed" not in name)
