"""The same tensors in safetensors and in a pickle: the same verdict, for one case of each cause and warning.

tests/files/test_preflight.py shows that every variant of adapters is read alike from both.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from merge_gate.config.load_config import load_config
from merge_gate.records.options import RunOptions
from merge_gate.records.report import AdapterReport
from merge_gate.run.flow import run_gate
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import Judged, lay_out, told, write_config_file
from tests.support.faults import ALLOW_PICKLE
from tests.support.models import ADAPTER_WEIGHTS, Shelf, read_tensors

pytestmark = pytest.mark.slow
CASES = tuple({(case.cause, case.warnings): case for case in (*HEALTHY, *FAULTS) if case.variant != "pickled"}.values())


def pickle_weights(directory: Path) -> bool:
    """Puts the tensors into a pickle; False where no tensors can be read, so that there is nothing to put."""
    try:
        tensors = read_tensors(directory)
    except (OSError, SafetensorError):
        return False
    (directory / ADAPTER_WEIGHTS).unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    return True


@pytest.fixture(scope="module")
def pickled(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, AdapterReport]:
    root = tmp_path_factory.mktemp("pickled")
    cases = []
    for case in CASES:
        lay_out(case, shelf, root / case.name)
        if pickle_weights(root / case.name):
            cases.append(case)
    path = write_config_file(shelf, root, 0, ALLOW_PICKLE, cases)
    return {adapter.name: adapter for adapter in run_gate(load_config(str(path)), RunOptions(device="cpu")).adapters}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_container_does_not_change_the_verdict(case, judged: Judged, pickled) -> None:
    safe = judged.reports[case.name]
    if case.name not in pickled:  # what is broken is the container itself
        assert safe.cause in {"file-corrupt", "file-missing", "file-lfs-pointer", "pickle-refused"}, told(safe)
        return
    report = pickled[case.name]
    assert (report.verdict, report.cause) == (safe.verdict, safe.cause), f"{told(report)}\n{told(safe)}"
    assert {(f.check, f.severity) for f in report.findings} == {(f.check, f.severity) for f in safe.findings}
    assert report.coverage.adapter_tensors == safe.coverage.adapter_tensors
