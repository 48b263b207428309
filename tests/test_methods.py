"""Every method, and every tensor of it broken: no false pass, no false failure, no wrong cause.

Truth comes from `tests.support.faults_methods`: plain PEFT's merge, and a look at every merged tensor. `make test` runs
the cases of `FAST` with NaN and Inf at every place, `make sweeps` the others with one NaN and one overflow in each
tensor, and `make nightly` all cases at every place.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging import version
from torch import nn

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Verdict
from tests.support import faults_methods, methods
from tests.support.cases import gated
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.faults_methods import EVERY_PLACE, ONE_NAN
from tests.support.gating import Bench, mistake, one_thread, told
from tests.support.merged import kept

Places = tuple[tuple[str, str], ...]

FAST = {"lora-linear", "oft-linear"}
"""LoRA, and a method that multiplies the whole weight."""
CASES = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow) for case in methods.CASES],
)
UNCHECKED_INDICES = ("frod", "shira")
"""Methods whose indices PEFT gives to torch unchecked: judged in the worker's process, see the test of it."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        made = Bench(tmp_path_factory.mktemp("methods"))
        yield made
        check_bases(made)


def check_bases(bench: Bench) -> None:
    """No trial wrote to a base: what the gate has loaded still holds what is on disk."""
    for (directory, dtype, _, _), base in bench.gate.loaded.items():
        assert dtype == "auto"
        name, stored = directory.rsplit("/", 2)[1:]
        fresh = methods.values(methods.load_base(name, bench.base_directory(name, stored)))
        with base.filled(base.tensors):
            loaded = methods.values(base.model)
            shared = fresh.keys() & loaded.keys()
            assert shared
            assert methods.same({key: fresh[key] for key in shared}, {key: loaded[key] for key in shared})


@CASES
def test_every_trial_is_judged_right(case: methods.Case, bench: Bench) -> None:
    check_trials(case, bench, EVERY_PLACE if case.name in FAST else ONE_NAN)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in methods.CASES if case.name not in FAST], ids=lambda case: case.name)
def test_every_place_is_judged_right(case: methods.Case, bench: Bench) -> None:
    check_trials(case, bench, EVERY_PLACE)


def check_trials(case: methods.Case, bench: Bench, places: Places) -> None:
    faults = bench.faults(case)
    mistakes = []
    for trial in trials(case, faults.state, places):
        truth = faults.prepare(trial)
        judgement = bench.gate.judge(faults.directory, bench.base_directory(case.base, trial.dtype))
        if wrong := mistake(truth, judgement):
            mistakes.append(told(trial, truth, wrong, judgement))
    assert not mistakes, f"{len(mistakes)} mistakes; the first:\n" + "\n".join(mistakes[:3])


def trials(case: methods.Case, state: dict[str, torch.Tensor], places: Places) -> list[faults_methods.Trial]:
    """The trials of a case that are judged in this process."""
    all_of_it = faults_methods.trials(case, state, bases=methods.DTYPES, home="float32", small="float16", places=places)
    elsewhere = case.name.startswith(UNCHECKED_INDICES)
    return [trial for trial in all_of_it if not (elsewhere and trial.value == "index")]


@CASES
@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_the_merged_bits_are_pefts(case: methods.Case, dtype: str, bench: Bench) -> None:
    """Those of `safe_merge=True`, which rounds the delta before it adds it, and so differs from `safe_merge=False`."""
    adapter, directory = bench.adapter(case), bench.base_directory(case.base, dtype)
    files = preflight(str(adapter), allow_pickle=False)
    check_bits(bench.base(case.base, dtype), adapter, bench.gate.base(directory, files, dtype="auto"))


@CASES
@pytest.mark.parametrize(("dtype", "is_mapped"), [("bfloat16", True), ("auto", False)], ids=["other-dtype", "fed"])
def test_the_merged_bits_are_pefts_in_a_pass_over_the_base(case, dtype, is_mapped, bench) -> None:
    """Such a base has values only while its tensors are merged: in another dtype than the stored one, or if fed."""
    adapter, directory = bench.adapter(case), bench.base_directory(case.base, "float32")
    model_class = model_class_for(
        str(directory), preflight(str(adapter), allow_pickle=False), stored_tensors(directory)
    )
    base = load_local(str(directory), model_class=model_class, label=case.base, dtype=dtype, is_mapped=is_mapped)
    check_bits(methods.load_base(case.base, directory, dtype=dtype), adapter, base)


def check_bits(model: nn.Module, adapter: Path, base: Base) -> None:
    """The gate's merge into `base` is PEFT's merge into the same `model`."""
    expected, original = methods.merge(model, adapter, safe=True), methods.values(model)
    with kept() as seen:
        evidence = merge_adapter(
            base, preflight(str(adapter), allow_pickle=False), no_forward=NOT_RUN, free_bytes=1 << 40
        )
    assert evidence.refusal is None
    assert methods.same({name: expected[name] for name in seen}, seen)
    untouched = expected.keys() - seen.keys() - _tied(model)
    assert methods.same({name: expected[name] for name in untouched}, {name: original[name] for name in untouched})


def _tied(model: nn.Module) -> set[str]:
    """Names under which a tensor hangs a second time."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


@CASES
def test_a_merge_computes_what_its_adapter_computes(case: methods.Case, bench: Bench) -> None:
    """Plain PEFT: what backs the claim that this method can be merged."""
    base, adapter, inputs = bench.base(case.base, "float32"), bench.adapter(case), methods.make_input(case.base)
    model = methods.load_adapter(base, adapter).eval()
    unmerged = methods.compute(model, inputs)
    with methods.quiet():
        merged = methods.compute(model.merge_and_unload().eval(), inputs)
    assert not torch.equal(unmerged, methods.compute(base, inputs)), "the adapter does nothing to this input"
    torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["frod-linear", "shira-linear"])
def test_an_index_outside_of_the_weight_corrupts_nothing(name: str, bench: Bench, tmp_path: Path) -> None:
    """PEFT builds a sparse tensor of the file's indices; torch checks them only when told to, else it writes there."""
    case = methods.find(name)
    faults = bench.faults(case)
    tensor = min(set(faults.state) - set(faults_methods.floating(faults.state)))
    broken = faults_methods.point_nowhere(faults.state, tensor)
    methods.write_variant(bench.adapter(case), tmp_path / "adapter", broken)
    base = {"model": str(bench.base_directory(case.base, "float32"))}
    (report,) = gated(tmp_path, [{"path": "./adapter", "base": base}]).adapters
    assert (report.verdict, report.cause) == (Verdict.FAILED, "shape-mismatch"), report.findings
    assert not any("died" in finding.message for finding in report.findings), report.findings


@pytest.mark.nightly
def test_the_readme_has_the_number_of_trials(bench: Bench) -> None:
    """No trial went wrong if `test_every_place_is_judged_right` passed for each case."""
    count = sum(
        len(trials(case, faults_methods.load_file(bench.adapter(case) / methods.WEIGHTS), EVERY_PLACE))
        for case in methods.CASES
    )
    assert count > 2000
    stated, versions = in_the_readme()
    if versions == tuple(version.parse(module.__version__).base_version for module in (peft, transformers, torch)):
        assert stated == (count, len(methods.CASES))


def in_the_readme() -> tuple[tuple[int, int], tuple[str, ...]]:
    """Its trials and cases, and the releases of PEFT, transformers and torch that they were counted with."""
    text = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
    said = r"([\d,]+) trials over (\d+) cases\s+\(PEFT\s+([\d.]+),\s+transformers\s+([\d.]+),\s+torch\s+([\d.]+)\)"
    ((trials, cases, *versions),) = re.findall(said, text)
    return (int(trials.replace(",", "")), int(cases)), tuple(versions)
