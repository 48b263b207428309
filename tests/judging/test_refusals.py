"""Every fact that keeps an adapter from being merged: its check, its place, and its words."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from merge_gate.judging.all_checks import refused
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.judging.refused_merges import DEFECTS, DOCUMENTED_ON_PACKED
from merge_gate.records import refusals
from merge_gate.records.files import Pattern
from merge_gate.records.refusals import (
    AdapterNextToBase,
    BaseOfAnotherClass,
    BaseRaised,
    BaseShapeClash,
    Caught,
    CodesForNumbers,
    Defect,
    IgnoredSettings,
    KnownDefect,
    LayerLeftUnmerged,
    LoadedOtherwise,
    ModulesLeftOut,
    NotJudged,
    NotMeasured,
    OtherForward,
    ParametersNotFound,
    ParametersNotStored,
    PatternRefused,
    PeftRaised,
    PickleUnreadable,
    QuantizationUnknown,
    QuantizedWeightTorn,
    Refusal,
    RemoteCodeNeeded,
    ResultLacksTensors,
    SettingLost,
    ShapeClash,
    Step,
    StoredTensorsLeftOut,
    TargetsNotFound,
    TensorsMissing,
    TensorUnreadable,
    TensorUnweighted,
    TensorWithoutValues,
    TwoVocabularies,
    UnknownMethod,
    WorkerRaised,
)
from merge_gate.records.terms import Origin, Quantization

if TYPE_CHECKING:
    from tests.support.wording import Wording

DOCS = Path(__file__).parents[2] / "docs" / "reference/methods.md"
LORA_A = "base_model.model.layers.0.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.modules_to_save.weight"
NORM = "model.norm.weight"
EXPRESSION = Pattern(place="target_modules", text="(a+)+b", expression="(a+)+b")
MANY = tuple(f"name{number}" for number in range(14))
"""More names than any message lists."""


def caught(kind: str = "ValueError", text: str = "PEFT's words", *more: str, detail: str = "") -> Caught:
    return Caught(kinds=(kind, *more, "Exception"), text=text, detail=detail or text)


def raised(step: Step, kind: str = "ValueError", text: str = "PEFT's words", **settings: Any) -> PeftRaised:
    detail = settings.pop("detail", "")
    more = settings.pop("more", ())
    return PeftRaised(
        step=step, error=caught(kind, text, *more, detail=detail), **({"method": "LORA", "base": "./base"} | settings)
    )


def targets(*names: str, **settings: Any) -> TargetsNotFound:
    return TargetsNotFound(targets=names, of_base=("k_proj", "q_proj"), **settings)


def loaded(**settings: str) -> LoadedOtherwise:
    as_asked = {"quantization": "none", "asked_quantization": "none", "dtype": "float16", "asked_dtype": "auto"}
    return LoadedOtherwise(base="./base", class_name="LlamaModel", **(as_asked | settings))


def left_out(**settings: Any) -> StoredTensorsLeftOut:
    usual = {"file": "a.safetensors", "names": ("q.SCB",), "wrapped": (), "class_name": "LlamaModel"}
    return StoredTensorsLeftOut(base="./base", **(usual | settings))


def misspelled(*settings: str) -> IgnoredSettings:
    return IgnoredSettings(settings=settings, peft="9.0.0", saved_by="9.0.0", near=(("alfa", "alpha"),))


PACKED = {"quantization": "bnb-4bit"}
NO_TOKEN_ROW = {"trains_tokens": True, "more": ("LookupError",)}
OF_CONFIG, OF_ADAPTER, OF_MERGE, OF_BASE, OF_FILE = (
    Origin.CONFIG,
    Origin.ADAPTER,
    Origin.MERGE,
    Origin.BASE,
    Origin.FILE,
)
OF_RUN = Origin.RUNTIME

CASES: tuple[tuple[Refusal, str, Origin], ...] = (
    (PatternRefused(pattern=EXPRESSION, names=9, seconds=10.0), "config-invalid", OF_CONFIG),
    (PatternRefused(pattern=None, names=9, seconds=10.0), "config-invalid", OF_CONFIG),
    (PatternRefused(pattern=EXPRESSION, names=9, seconds=10.0, problem="missing )"), "config-invalid", OF_CONFIG),
    (PatternRefused(pattern=None, names=9, seconds=10.0, problem="missing )"), "config-invalid", OF_CONFIG),
    (UnknownMethod(name="NEWLORA", peft="9.0.0"), NOT_JUDGED, OF_CONFIG),
    (UnknownMethod(name="lora", peft="9.0.0", known_as="LORA"), NOT_JUDGED, OF_CONFIG),
    (IgnoredSettings(settings=("odd=1",), peft="9.0.0", saved_by="9.1.0"), NOT_JUDGED, OF_CONFIG),
    (IgnoredSettings(settings=("odd=1",), peft="9.0.0", saved_by="9.0.0"), "config-invalid", OF_CONFIG),
    (IgnoredSettings(settings=tuple("abcdefgh"), peft="9.0.0", saved_by="main"), "config-invalid", OF_CONFIG),
    (IgnoredSettings(settings=("odd=1",), peft="9.0.0", saved_by="9.0.1.dev0"), NOT_JUDGED, OF_CONFIG),
    (misspelled("alfa=1"), "config-invalid", OF_CONFIG),
    (misspelled("alfa=1", "odd=1"), "config-invalid", OF_CONFIG),
    (targets("query"), "targets-not-found", OF_CONFIG),
    (targets(), "targets-not-found", OF_CONFIG),
    (targets("score", task_type="SEQ_CLS"), "targets-not-found", OF_CONFIG),
    (targets("model.score", task_type="SEQ_CLS"), "targets-not-found", OF_CONFIG),
    (targets("score", task_type="CAUSAL_LM"), "targets-not-found", OF_CONFIG),
    (targets(r".*q_proj$"), "targets-not-found", OF_CONFIG),
    (targets("q_proj", excluded="q_proj, k_proj"), "targets-not-found", OF_CONFIG),
    (targets("q_proj", layers="99"), "targets-not-found", OF_CONFIG),
    (targets("q_proj", layers="99", excluded="a"), "targets-not-found", OF_CONFIG),
    (targets("query", layers="99"), "targets-not-found", OF_CONFIG),
    (targets("layers.0.q_proj", layers="99"), "targets-not-found", OF_CONFIG),
    (targets("X_proj"), "targets-not-found", OF_CONFIG),
    (targets("q" * 301, excluded="e" * 101, layers="9" * 101), "targets-not-found", OF_CONFIG),
    (TargetsNotFound(targets=MANY, of_base=MANY), "targets-not-found", OF_CONFIG),
    (TargetsNotFound(targets="q_proj,k_proj", of_base=("k_proj", "q_proj")), "targets-not-found", OF_CONFIG),
    (TargetsNotFound(targets=".*query", of_base=("k_proj", "q_proj")), "targets-not-found", OF_CONFIG),
    (ParametersNotFound(targets=("mlp.up",), of_base=("mlp.gate_up_proj",)), "targets-not-found", OF_CONFIG),
    (ParametersNotFound(targets=MANY, of_base=MANY), "targets-not-found", OF_CONFIG),
    (TensorsMissing(names=(LORA_A,)), "keys-missing", OF_ADAPTER),
    (TensorsMissing(names=MANY), "keys-missing", OF_ADAPTER),
    (TensorsMissing(names=(HEAD,), trained_whole="['lm_head']"), "keys-missing", OF_ADAPTER),
    (TensorsMissing(names=MANY, trained_whole="['lm_head']"), "keys-missing", OF_ADAPTER),
    (TensorUnreadable(name="odd", is_meta=True, dtype="float32"), "file-corrupt", OF_FILE),
    (TensorUnreadable(name="odd", dtype="float4_e2m1fn_x2"), "file-corrupt", OF_FILE),
    (TensorUnreadable(text="unknown dtype"), "file-corrupt", OF_FILE),
    (PickleUnreadable(error="RuntimeError"), "file-corrupt", OF_FILE),
    (PickleUnreadable(error="UnpicklingError", names="torch.hub.load"), "file-corrupt", OF_FILE),
    (ShapeClash(name=LORA_A, got=(8, 32), expected=(16, 32)), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=LORA_A, got=(8, 32), expected=(16, 64), others=1), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=LORA_A, got=(16, 64), expected=(16, 32)), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=LORA_A, got=(0,), expected=(16, 64), others=2), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=LORA_A, got=(0, 64), expected=(16, 64)), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=HEAD, got=(9, 32), expected=(8, 32), trained_whole=True), "shape-mismatch", OF_ADAPTER),
    (ShapeClash(name=LORA_A, got=(2, 32), expected=(3, 32), of_tokens=True), "shape-mismatch", OF_ADAPTER),
    (raised(Step.CONFIG), "config-invalid", OF_CONFIG),
    (raised(Step.CONFIG, detail="OFT weights are incompatible"), "not-mergeable", OF_CONFIG),
    (raised(Step.CONFIG, "ModuleNotFoundError", more=("ImportError",)), NOT_JUDGED, OF_RUN),
    (raised(Step.INJECT), "not-mergeable", OF_CONFIG),
    (raised(Step.INJECT, "IndexError", **NO_TOKEN_ROW), "shape-mismatch", OF_CONFIG),
    (raised(Step.INJECT, "IndexError", more=("LookupError",)), "not-mergeable", OF_CONFIG),
    (raised(Step.INJECT, trains_tokens=True), "not-mergeable", OF_CONFIG),
    (raised(Step.INJECT, text="Unknown initialization x"), "config-invalid", OF_CONFIG),
    (raised(Step.INJECT, text="dropout probability has to be"), "config-invalid", OF_CONFIG),
    (raised(Step.INJECT, text="call preprocess_corda first"), "not-mergeable", OF_CONFIG),
    (raised(Step.INJECT, quantization="fp8"), NOT_JUDGED, OF_BASE),
    (raised(Step.LOAD), "config-invalid", OF_CONFIG),
    (raised(Step.LOAD, "RuntimeError"), "config-invalid", OF_CONFIG),
    (raised(Step.LOAD, "TypeError"), NOT_JUDGED, OF_CONFIG),
    (raised(Step.LOAD, "SafetensorError"), "file-corrupt", OF_FILE),
    (raised(Step.LOAD, "UnpicklingError"), "file-corrupt", OF_FILE),
    (raised(Step.LOAD, "EOFError"), "file-corrupt", OF_FILE),
    (raised(Step.LOAD, detail="from state dictionary however they were not"), "keys-missing", OF_ADAPTER),
    (raised(Step.LOAD, "IndexError", text="9 is out of bounds for dimension 0"), "shape-mismatch", OF_ADAPTER),
    (raised(Step.ADD), "not-mergeable", OF_CONFIG),
    (raised(Step.COMBINE, combination=(("a", "b"), "ties")), "not-mergeable", OF_CONFIG),
    (raised(Step.COMBINE, combination=(MANY, "ties")), "not-mergeable", OF_CONFIG),
    (raised(Step.MERGE), "not-mergeable", OF_MERGE),
    (raised(Step.MERGE, "ImportError"), NOT_JUDGED, OF_RUN),
    (raised(Step.MERGE, "IndexError", **NO_TOKEN_ROW), "shape-mismatch", OF_CONFIG),
    (raised(Step.MERGE, "IndexError", more=("LookupError",)), "not-mergeable", OF_MERGE),
    (raised(Step.MERGE, trains_tokens=True), "not-mergeable", OF_MERGE),
    (raised(Step.MERGE, text="shape is inconsistent with indices"), "shape-mismatch", OF_ADAPTER),
    (raised(Step.MERGE, text="number of dimensions must be sparse_dim (2)"), "shape-mismatch", OF_ADAPTER),
    (raised(Step.MERGE, **PACKED), NOT_JUDGED, OF_BASE),
    (raised(Step.MERGE, is_incomplete=True), NOT_JUDGED, OF_BASE),
    *((KnownDefect(defect=one), "not-mergeable", OF_CONFIG) for one in Defect if one is not Defect.LOFTQ_WITHOUT_GPU),
    (KnownDefect(defect=Defect.MERGED_TWICE, modules=("lm_head", "embed")), "not-mergeable", OF_CONFIG),
    (KnownDefect(defect=Defect.LOFTQ_WITHOUT_GPU), NOT_JUDGED, OF_CONFIG),
    (OtherForward(module="model.layers.0", class_name="StandardizedConv2d", share=0.25), "not-mergeable", OF_CONFIG),
    (LayerLeftUnmerged(module="model.layers.0"), "not-mergeable", OF_MERGE),
    (ResultLacksTensors(names=(NORM,), in_wrapper=False), "not-mergeable", OF_MERGE),
    (ResultLacksTensors(names=("a", "b", "c", "d"), in_wrapper=True), "not-mergeable", OF_MERGE),
    (SettingLost(adapter="support", setting="use_rslora"), "not-mergeable", OF_CONFIG),
    (TensorUnweighted(adapter="support", tensor=NORM), "not-mergeable", OF_CONFIG),
    (TwoVocabularies(adapters=("a", "b"), tensor=NORM), "not-mergeable", OF_CONFIG),
    (ModulesLeftOut(adapter="support", modules=("lm_head",)), "not-mergeable", OF_CONFIG),
    (BaseRaised(base="./base", error=caught("OSError")), NOT_JUDGED, OF_RUN),
    (BaseRaised(base="./base", error=caught("OSError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (BaseRaised(base="./base", error=caught("OutOfMemoryError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (BaseRaised(base="./base", error=caught("MemoryError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (BaseRaised(base="./base", error=caught("ImportError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (RemoteCodeNeeded(), NOT_JUDGED, OF_RUN),
    (RemoteCodeNeeded(base="./base"), NOT_JUDGED, OF_RUN),
    (BaseOfAnotherClass(base="./base", class_name="Gemma3ForCausalLM"), NOT_JUDGED, OF_RUN),
    (AdapterNextToBase(base="./base"), "base-inconsistent", OF_BASE),
    (QuantizationUnknown(base="./base", method="odd", transformers="9.0.0"), "base-format", OF_BASE),
    (loaded(asked_quantization=Quantization.BNB_8BIT), "base-format", OF_BASE),
    (loaded(quantization="fp8", asked_dtype="float32"), "base-format", OF_BASE),
    (loaded(asked_dtype="float32"), "base-format", OF_BASE),
    (left_out(), "base-inconsistent", OF_BASE),
    (left_out(file=None, names=("q.SCB", "k.SCB")), "base-inconsistent", OF_BASE),
    (left_out(wrapped=("q.base_layer.weight",)), "base-inconsistent", OF_BASE),
    (left_out(names=MANY), "base-inconsistent", OF_BASE),
    (left_out(wrapped=MANY), "base-inconsistent", OF_BASE),
    (
        QuantizedWeightTorn(base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB",)),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        QuantizedWeightTorn(base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB", "scale")),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        QuantizedWeightTorn(base="./base", file="a", tensor=NORM, dtype="int8", missing=MANY),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        CodesForNumbers(base="./base", file="a", tensor=NORM, dtype="int8", class_name="LlamaModel"),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        BaseShapeClash(base="./base", class_name="LlamaModel", name=NORM, got=(48,), expected=(40,)),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        ParametersNotStored(base="./base", class_name="LlamaModel", names=(NORM,), read=("a",)),
        "base-incomplete",
        OF_BASE,
    ),
    (
        ParametersNotStored(base="./base", class_name="LlamaModel", names=(NORM, "b"), read=("a",), elsewhere=("c",)),
        "base-incomplete",
        OF_BASE,
    ),
    (
        ParametersNotStored(base="./base", class_name="LlamaModel", names=(NORM,), read=MANY, elsewhere=MANY),
        "base-incomplete",
        OF_BASE,
    ),
    (TensorWithoutValues(name=NORM), NOT_JUDGED, OF_RUN),
    (NotMeasured(module="lm_head", error=caught()), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught()), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("MemoryError")), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("OutOfMemoryError", "CUDA out of memory", "RuntimeError")), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("RuntimeError", "[enforce fail] DefaultCPUAllocator: no memory")), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("FileNotFoundError", "no a.safetensors", "OSError")), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("ImportError"), in_import=True), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("OSError", "no libcudart.so"), in_import=True), NOT_JUDGED, OF_RUN),
    (WorkerRaised(error=caught("ImportError")), NOT_JUDGED, OF_RUN),
    (NotJudged(message="the worker died", hint="run again", origin=OF_BASE), NOT_JUDGED, OF_BASE),
)


PLACES: tuple[tuple[Refusal, str | None, str | None], ...] = (
    (TensorsMissing(names=(LORA_A, HEAD)), None, LORA_A),
    (TensorUnreadable(name="odd"), None, "odd"),
    (ShapeClash(name=LORA_A, got=(8, 32), expected=(16, 32)), "layers.0.q_proj", LORA_A),
    (KnownDefect(defect=Defect.MERGED_TWICE, modules=("lm_head", "embed")), "lm_head", None),
    (OtherForward(module="model.layers.0", class_name="Odd", share=0.25), "model.layers.0", None),
    (LayerLeftUnmerged(module="model.layers.0"), "model.layers.0", None),
    (TensorUnweighted(adapter="support", tensor=NORM), "model.norm", NORM),
    (TwoVocabularies(adapters=("a", "b"), tensor=NORM), "model.norm", NORM),
    (ModulesLeftOut(adapter="support", modules=("lm_head", "score")), "lm_head", None),
    (left_out(names=("layers.0.q.SCB", "layers.1.q.SCB")), "layers.0.q", "layers.0.q.SCB"),
    (
        QuantizedWeightTorn(base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB",)),
        "model.norm",
        NORM,
    ),
    (CodesForNumbers(base="./base", file="a", tensor=NORM, dtype="int8", class_name="X"), "model.norm", NORM),
    (BaseShapeClash(base="./base", class_name="X", name=NORM, got=(48,), expected=(40,)), "model.norm", NORM),
    (ParametersNotStored(base="./base", class_name="X", names=(NORM, "b"), read=("a",)), "model.norm", NORM),
)
"""The module and the tensor of each finding that has one."""


def named(case: tuple[Refusal, str, Origin]) -> str:
    fact, check, _ = case
    return f"{type(fact).__name__}-{getattr(fact, 'step', getattr(fact, 'defect', check))}"


def test_every_kind_of_fact_has_a_case_and_every_defect_has_words() -> None:
    kinds = {type(fact) for fact, _, _ in CASES}
    assert kinds == set(get_args(Refusal))
    assert set(DEFECTS) == set(Defect)
    declared = {one for one in vars(refusals).values() if isinstance(one, type) and one.__module__ == refusals.__name__}
    assert declared - kinds == {Step, Defect, Caught}


@pytest.mark.parametrize(("fact", "check", "origin"), CASES, ids=map(named, CASES))
def test_a_fact_becomes_a_finding_of_its_check(fact: Refusal, check: str, origin: Origin) -> None:
    finding = refused(fact)
    assert (finding.check, finding.origin) == (check, origin)
    assert check == NOT_JUDGED or finding.severity is CHECKS[check].severity
    for text in (finding.message, finding.hint):
        assert text == " ".join(text.split())
        assert not text.endswith(".")
        assert not re.search(r"\b1 (more )?(tensors|weights|parameters)\b", text), text


@pytest.mark.parametrize(("fact", "module", "tensor"), PLACES, ids=[type(fact).__name__ for fact, _, _ in PLACES])
def test_a_finding_names_its_module_and_its_tensor(fact: Refusal, module: str | None, tensor: str | None) -> None:
    finding = refused(fact)
    assert (finding.module, finding.tensor) == (module, tensor)


def test_findings_of_all_other_facts_name_no_place() -> None:
    placed = {type(fact) for fact, _, _ in PLACES}
    found = [refused(fact) for fact, _, _ in CASES if type(fact) not in placed]
    assert {(finding.module, finding.tensor) for finding in found} == {(None, None)}


def test_what_they_say(wording: Wording) -> None:
    for fact, _, _ in CASES:
        finding = refused(fact)
        wording(f"{finding.message}\n> {finding.hint}")


def test_facts_travel() -> None:
    for fact, _, _ in CASES:
        assert pickle.loads(pickle.dumps(fact)) == fact


# --- an exception of PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["0.²", "0." + "9" * 5_000, "٩.٩", ".", ""])
def test_a_release_that_is_none_is_not_compared(saved_by: str) -> None:
    """It comes from adapter_config.json, and `int` raises on some of what `str.isdigit` accepts."""
    fact = IgnoredSettings(settings=("odd=1",), peft="9.0.0", saved_by=saved_by)
    assert refused(fact).check in {"config-invalid", NOT_JUDGED}


def test_a_fact_that_cannot_be_worded_costs_its_own_adapter_only(wording: Wording) -> None:
    broken = IgnoredSettings(settings=None, peft="9.0.0", saved_by="9.0.0")  # type: ignore[arg-type]
    finding = refused(broken)
    assert finding.check == NOT_JUDGED
    wording(finding)


@pytest.mark.parametrize("step", [Step.INJECT, Step.MERGE])
@pytest.mark.parametrize(
    ("settings", "is_of_adapter"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param(PACKED | {"method": "IA3"}, True, id="documented"),
        pytest.param(PACKED | {"method": "VERA"}, False, id="bnb-4bit"),
        pytest.param({"quantization": "fp8"}, False, id="fp8"),
        pytest.param({"quantization": "fp8", "method": "IA3"}, False, id="documented-for-another-format"),
        pytest.param({"is_incomplete": True}, False, id="incomplete"),
        pytest.param(PACKED | {"is_incomplete": True, "method": "IA3"}, False, id="documented-and-incomplete"),
    ],
)
def test_an_exception_of_peft_is_the_adapters_on_a_plain_base_only(
    step: Step, settings: dict[str, Any], is_of_adapter: bool
) -> None:
    finding = refused(raised(step, **settings))
    assert finding.check == ("not-mergeable" if is_of_adapter else NOT_JUDGED)
    assert (finding.origin is OF_BASE) is not is_of_adapter


def test_methods_whose_exceptions_fail_the_adapter_are_in_the_documentation() -> None:
    rows = re.findall(r"^\| `([a-z0-9]+)` on bitsandbytes", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.upper() for name in rows} >= DOCUMENTED_ON_PACKED
