"""Every base of `tests/support/bases_broken.py` and `tests/support/bases_good.py`, gated in one run.

The truth is exact: each weight is a code times a power of two. A base that passes has been loaded as its true weights,
bit for bit but for the last bit of bitsandbytes' 8-bit scales.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.tensors.quantized import DEQUANTIZED, dequantized, is_quantized
from merge_gate.files.preflight import preflight
from merge_gate.records.report import AdapterReport, BaseReport
from merge_gate.records.terms import Finding, Quantization
from tests.support.bases import ADAPTERS, STEP, Case
from tests.support.bases_broken import BROKEN, FORMAT
from tests.support.bases_good import GOOD, PACKAGED, UNFIT
from tests.support.cases import gated
from tests.support.gating import Gate, one_thread

if importlib.util.find_spec("compressed_tensors"):
    GOOD.update(PACKAGED)
else:  # without the package, they are refused by name
    refused = {"cause": FORMAT, "names": ("compressed-tensors", "pip install", "unquantized")}
    BROKEN.update({name: replace(case, **refused) for name, case in PACKAGED.items()})
ALL = BROKEN | GOOD | UNFIT
HEADS = {"classifier", "pooler", "score"}
"""What a model of another task has, and the files need not."""

LOADS_AS_THE_TRUTH = {
    "fp8-declared-over-plain-weights",
    "bnb-4bit-declared-over-plain-weights",
    "bnb-8bit-declared-over-plain-weights",
    "a-method-that-nobody-knows",
    "bnb-4bit-asked-for-as-bnb-8bit",
    "bnb-8bit-asked-for-as-bnb-4bit",
    "fp8-asked-for-as-bnb-4bit",
    "fp8-asked-for-as-bnb-8bit",
}
"""Broken by what they declare, or what is asked of them: on a CPU, transformers loads their files rightly."""


def params(table: Mapping[str, Case]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in table.items()]


@dataclass(frozen=True, repr=False)
class Run:
    """What the gate reports, and where the bases are."""

    adapters: dict[str, AdapterReport]
    bases: dict[str, BaseReport]
    truths: dict[str, dict[str, torch.Tensor]]
    root: Path

    def base(self, case: Case) -> Path:
        return self.root / f"models--bases--{case.name}" / "snapshots" / "0"

    def findings(self, case: Case) -> Iterator[Finding]:
        yield from self.adapters[case.name].findings
        if str(self.base(case)) in self.bases:
            yield from self.bases[str(self.base(case))].findings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    made, entries = Run({}, {}, {}, tmp_path_factory.mktemp("bases")), []
    with one_thread():
        for name, write in ADAPTERS.items():
            write(made.root / "adapters" / name)
        for case in ALL.values():
            draft, directory = case.draft(), made.base(case)
            directory.mkdir(parents=True)
            draft.write(directory)
            made.truths[case.name] = draft.truth
            base = {"model": str(directory)} | case.asked
            entries.append({"name": case.name, "path": f"adapters/{case.adapter}", "base": base})
        report = gated(made.root, entries)
        made.adapters.update({one.name: one for one in report.adapters})
        made.bases.update({one.model: one for one in report.bases})
        yield made


def texts(findings: Iterator[Finding], root: Path) -> str:
    return "\n".join(f"{one.message} | {one.hint}" for one in findings).replace(str(root), "")


@pytest.mark.parametrize("case", params(ALL))
def test_the_verdict_is_right(case: Case, run: Run) -> None:
    adapter = run.adapters[case.name]
    expected = "failed" if case.name in UNFIT else "error" if case.cause else "passed"
    assert adapter.verdict == expected, texts(run.findings(case), run.root)


@pytest.mark.parametrize("case", params(BROKEN))
def test_the_cause_is_a_check_of_bases_that_names_the_fault(case: Case, run: Run) -> None:
    adapter = run.adapters[case.name]
    causes = (case.cause,) if isinstance(case.cause, str) else case.cause
    assert adapter.cause in (causes or ()), texts(run.findings(case), run.root)
    first = next(one for one in adapter.findings if one.check == adapter.cause)
    assert (first.severity, first.origin) == ("error", "base")
    message = texts(iter([first]), run.root).replace(case.name, "")
    assert [name for name in case.names if name not in message] == [], message


@pytest.mark.parametrize("case", params(UNFIT))
def test_an_adapter_that_does_not_fit_a_good_base_is_to_blame(case: Case, run: Run) -> None:
    adapter = run.adapters[case.name]
    assert adapter.cause == case.cause, texts(run.findings(case), run.root)
    message = texts(iter(one for one in adapter.findings if one.check == adapter.cause), run.root)
    assert [name for name in case.names if name not in message] == [], message


@pytest.mark.parametrize("case", params({name: case for name, case in GOOD.items() if case.notes}))
def test_what_is_not_part_of_the_merge_is_noted(case: Case, run: Run) -> None:
    notes = texts((one for one in run.findings(case) if str(one.severity) == "note"), run.root).replace(case.name, "")
    assert [name for name in case.notes if name not in notes] == [], notes


@pytest.mark.parametrize("case", params({n: c for n, c in GOOD.items() if c.dtype or c.quantization}))
def test_the_report_states_what_was_loaded(case: Case, run: Run) -> None:
    stated = run.adapters[case.name].base
    assert case.dtype in (None, stated.dtype)
    assert case.quantization in (None, str(stated.quantization))


def wrong(model: torch.nn.Module, truth: Mapping[str, torch.Tensor]) -> list[str]:
    """Parameters that are not the truth, heads of other tasks left out."""
    modules = dict(model.named_modules())
    found, matched = [], 0
    for name, parameter in model.named_parameters():
        names = (name, f"bert.{name}", name.removeprefix("bert."))
        true = next((truth[one] for one in names if one in truth), None)
        if true is None:
            found += [] if set(name.split(".")) & HEADS else [name]
            continue
        matched += 1
        module = modules[name.rpartition(".")[0]]
        values = dequantized(module, parameter) if is_quantized(parameter) else parameter.detach()
        if values.shape != true.shape or not torch.allclose(values.double(), true, rtol=1e-5, atol=STEP * 1e-5):
            found.append(name)
    return found if matched else ["all"]


def loaded(case: Case, run: Run) -> Base:
    """The base as the gate loads it, in this process."""
    files = preflight(str(run.root / "adapters" / case.adapter), allow_pickle=False)
    asked = Quantization(case.asked.get("quantization", "none"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base that is asked for as it is stored
        return Gate().base(run.base(case), files, dtype=case.asked.get("dtype", "auto"), quantization=asked)


@pytest.mark.slow
@pytest.mark.parametrize("case", params(GOOD))
def test_a_good_base_is_loaded_as_its_true_weights(case: Case, run: Run) -> None:
    base = loaded(case, run)
    with base.filled({base.first_name(name) for name, _ in base.model.named_parameters()}):
        assert wrong(base.model, run.truths[case.name]) == []


@pytest.mark.parametrize("case", params(BROKEN))
def test_a_broken_base_is_not_what_transformers_loads(case: Case, run: Run) -> None:
    """Without the gate: an exception, or weights that are not the truth. Otherwise the case would show nothing."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(run.base(case), local_files_only=True)
    except Exception:  # noqa: BLE001 - of many kinds: it is not loaded, and that is all
        return
    truth = run.truths[case.name]
    lacking = truth.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    assert bool(lacking or wrong(model, truth)) == (case.name not in LOADS_AS_THE_TRUTH)


DEQUANTIZED_CASES = {name: case for name, case in GOOD.items() if case.quantization in DEQUANTIZED}


@pytest.mark.parametrize("case", params(DEQUANTIZED_CASES))
def test_a_format_that_a_gpu_could_leave_packed_is_dequantized(case: Case, run: Run) -> None:
    base = loaded(case, run)
    assert base.source.options["quantization_config"].dequantize
    classes = {type(module).__module__ for module in base.model.modules()}
    assert not {name for name in classes if "integrations" in name or "quant" in name}
    assert {tensor.dtype for tensor in base.tensors.values()} == {torch.bfloat16}
