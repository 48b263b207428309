"""Nothing is ever written to: not a file that goes in, not a tensor of the base in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from merge_gate.engine.base.loaded_base import Base, named_tensors
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Severity
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import lay_out
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter
from tests.support.faults import Case
from tests.support.files.pickles import read_pickle
from tests.support.models import BASES, VARIANTS, Shelf

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cases import Judged

REFUSED_BASES = {"base-format", "base-incomplete", "base-inconsistent"}
DTYPES = ("auto", "bfloat16", "float16")


def digest(base: Base) -> dict[str, str]:
    """Of every parameter and buffer, by name, with its dtype, shape and place in memory."""
    import torch  # noqa: PLC0415 - beside the only use

    with base.filled(base.tensors):
        return {
            name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            + f" {tensor.dtype} {tuple(tensor.shape)} {tensor.data_ptr()}"
            for name, _, tensor in named_tensors(base.model)
        }


def test_no_input_file_changes_in_a_run_over_all_faults(judged: Judged) -> None:
    assert len(judged.before) > 2 * (len(FAULTS) + len(HEALTHY))
    assert judged.after == judged.before


def cases_on(key: str, dtype: str) -> list[Case]:
    """Without those whose base is refused before it is loaded."""
    loadable = [case for case in (*FAULTS, *HEALTHY) if case.cause not in REFUSED_BASES]
    cases = [case for case in loadable if (case.base or VARIANTS[case.variant].base) == key]
    return [case for case in cases if dtype == "auto" or case.dtype in ("auto", dtype)]


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=() if dtype == "auto" else pytest.mark.slow) for dtype in DTYPES]
)
@pytest.mark.parametrize("key", sorted(BASES))
def test_no_tensor_of_the_base_changes_under_any_case(key: str, dtype: str, shelf: Shelf, tmp_path: Path) -> None:
    """Every case that reaches the engine is merged into one base, which must come out as it went in."""
    directory = shelf.base(key)
    bases: dict[object, Base] = {}
    first: dict[object, dict[str, str]] = {}
    merged = 0
    for case in cases_on(key, dtype):
        lay_out(case, shelf, tmp_path / case.name)
        files = preflight(str(tmp_path / case.name), allow_pickle=True, read_pickle=read_pickle)
        if any(finding.severity is Severity.ERROR for finding in files.findings):
            continue
        model_class = model_class_for(str(directory), files, stored_tensors(directory))
        if model_class not in bases:
            bases[model_class] = load_local(
                str(directory), model_class=model_class, label=key, dtype=dtype, allow_pickle=True
            )
            first[model_class] = digest(bases[model_class])
        merge_adapter(bases[model_class], files)
        merged += 1
        assert digest(bases[model_class]) == first[model_class], case.name
    assert merged or not cases_on(key, dtype)
