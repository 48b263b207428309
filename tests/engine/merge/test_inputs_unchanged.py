"""Nothing is ever written to: not a file that goes in, not a tensor of the base in memory."""

import hashlib
from pathlib import Path

import pytest

from merge_gate.engine.base.loaded_base import Base, named_tensors
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Severity
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import Judged, lay_out
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter
from tests.support.faults import Case
from tests.support.files.pickles import read_pickle
from tests.support.models import BASES, VARIANTS, Shelf

REFUSED_BASES = {"base-format", "base-incomplete", "base-inconsistent"}


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


def cases_on(key: str) -> list[Case]:
    """Without those whose base is refused before it is loaded."""
    loadable = [case for case in (*FAULTS, *HEALTHY) if case.cause not in REFUSED_BASES]
    return [case for case in loadable if (case.base or VARIANTS[case.variant].base) == key]


@pytest.mark.parametrize("key", sorted(BASES))
def test_no_tensor_of_the_base_changes_under_any_case(key: str, shelf: Shelf, tmp_path: Path) -> None:
    """Each case that reaches the engine is merged into one base. test_methods.py holds each method to the same."""
    directory = shelf.base(key)
    bases: dict[object, tuple[Base, dict[str, str]]] = {}
    for case in cases_on(key):
        lay_out(case, shelf, tmp_path / case.name)
        files = preflight(str(tmp_path / case.name), allow_pickle=True, read_pickle=read_pickle)
        if any(finding.severity is Severity.ERROR for finding in files.findings):
            continue
        model_class = model_class_for(str(directory), files, stored_tensors(directory))
        identity = (model_class, case.dtype)
        if identity not in bases:
            loaded = load_local(str(directory), model_class=model_class, label=key, dtype=case.dtype, allow_pickle=True)
            bases[identity] = loaded, digest(loaded)
        base, first = bases[identity]
        merge_adapter(base, files)
        assert digest(base) == first, case.name
    assert bases or not cases_on(key)
