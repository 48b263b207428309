"""Every fact that keeps an adapter from being merged: its check, its place, and its words."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.judging import not_judged, peft_errors
from merge_gate.judging.adapter_report import merged_report
from merge_gate.judging.all_checks import REFUSALS, refused
from merge_gate.judging.checks import table
from merge_gate.judging.checks.not_mergeable import DEFECTS
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.judging.peft_errors import DOCUMENTED_ON_PACKED
from merge_gate.records.files import Entry, Pattern
from merge_gate.records.refusals import Caught, NotJudged, Refusal
from merge_gate.records.terms import Origin, Quantization, Verdict
from tests.support.judging.cases import evidence, files, reason, spec

if TYPE_CHECKING:
    from tests.support.wording import Wording

SOURCE = Path(not_judged.__file__).parents[1]
DOCS = Path(__file__).parents[2] / "docs" / "reference/methods.md"
LORA_A = "base_model.model.layers.0.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.modules_to_save.weight"
NORM = "model.norm.weight"
EXPRESSION = Pattern(place="target_modules", text="(a+)+b", expression="(a+)+b")
MANY = tuple(f"name{number}" for number in range(14))
"""More names than any message lists."""


def caught(kind: str = "ValueError", text: str = "PEFT's words", *more: str, detail: str = "") -> Caught:
    return Caught(kinds=(kind, *more, "Exception"), text=text, detail=detail or text)


ON_A_BASE = {"method": "LORA", "trains_tokens": False, "quantization": "none", "is_incomplete": False}
OF_STEP = {"config": {"method": "LORA"}, "inject": {**ON_A_BASE, "base": "./base"}, "merge": ON_A_BASE}


def raised(step: str, kind: str = "ValueError", text: str = "PEFT's words", **settings: Any) -> Refusal:
    error = caught(kind, text, *settings.pop("more", ()), detail=settings.pop("detail", ""))
    return reason(f"{step}_raised", error=error, **OF_STEP.get(step, {}) | settings)


def targets(*names: str, **settings: Any) -> Refusal:
    return reason("targets_not_found", targets=names, of_base=("k_proj", "q_proj"), **settings)


def loaded(**settings: str) -> Refusal:
    as_asked = {"quantization": "none", "asked_quantization": "none", "dtype": "float16", "asked_dtype": "auto"}
    return reason("loaded_otherwise", base="./base", class_name="LlamaModel", **(as_asked | settings))


def left_out(**settings: Any) -> Refusal:
    usual = {"file": "a.safetensors", "names": ("q.SCB",), "wrapped": (), "class_name": "LlamaModel"}
    return reason("stored_tensors_left_out", base="./base", **(usual | settings))


def misspelled(*settings: str) -> Refusal:
    return reason("ignored_settings", settings=settings, peft="9.0.0", saved_by="9.0.0", near=(("alfa", "alpha"),))


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

CASES: tuple[tuple[Refusal | NotJudged, str, Origin], ...] = (
    (reason("pattern_refused", pattern=EXPRESSION, names=9, seconds=10.0), "config-invalid", OF_CONFIG),
    (reason("pattern_refused", pattern=None, names=9, seconds=10.0), "config-invalid", OF_CONFIG),
    (
        reason("pattern_refused", pattern=EXPRESSION, names=9, seconds=10.0, problem="missing )"),
        "config-invalid",
        OF_CONFIG,
    ),
    (reason("pattern_refused", pattern=None, names=9, seconds=10.0, problem="missing )"), "config-invalid", OF_CONFIG),
    (reason("unknown_method", name="NEWLORA", peft="9.0.0"), NOT_JUDGED, OF_CONFIG),
    (reason("unknown_method", name="lora", peft="9.0.0", known_as="LORA"), NOT_JUDGED, OF_CONFIG),
    (reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.1.0"), NOT_JUDGED, OF_CONFIG),
    (reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.0.0"), "config-invalid", OF_CONFIG),
    (
        reason("ignored_settings", settings=tuple("abcdefgh"), peft="9.0.0", saved_by="main"),
        "config-invalid",
        OF_CONFIG,
    ),
    (reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.0.1.dev0"), NOT_JUDGED, OF_CONFIG),
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
    (reason("targets_not_found", targets=MANY, of_base=MANY), "targets-not-found", OF_CONFIG),
    (
        reason("targets_not_found", targets="q_proj,k_proj", of_base=("k_proj", "q_proj")),
        "targets-not-found",
        OF_CONFIG,
    ),
    (reason("targets_not_found", targets=".*query", of_base=("k_proj", "q_proj")), "targets-not-found", OF_CONFIG),
    (
        reason("parameters_not_found", targets=("mlp.up",), of_base=("mlp.gate_up_proj",)),
        "targets-not-found",
        OF_CONFIG,
    ),
    (reason("parameters_not_found", targets=MANY, of_base=MANY), "targets-not-found", OF_CONFIG),
    (reason("tensors_missing", names=(LORA_A,)), "keys-missing", OF_ADAPTER),
    (reason("tensors_missing", names=MANY), "keys-missing", OF_ADAPTER),
    (reason("tensors_missing", names=(HEAD,), trained_whole="['lm_head']"), "keys-missing", OF_ADAPTER),
    (reason("tensors_missing", names=MANY, trained_whole="['lm_head']"), "keys-missing", OF_ADAPTER),
    (reason("tensor_unreadable", name="odd", is_meta=True, dtype="float32"), "file-corrupt", OF_FILE),
    (reason("tensor_unreadable", name="odd", dtype="float4_e2m1fn_x2"), "file-corrupt", OF_FILE),
    (reason("tensor_unreadable", text="unknown dtype"), "file-corrupt", OF_FILE),
    (reason("pickle_unreadable", error="RuntimeError"), "file-corrupt", OF_FILE),
    (reason("pickle_unreadable", error="UnpicklingError", names="torch.hub.load"), "file-corrupt", OF_FILE),
    (reason("shape_clash", name=LORA_A, got=(8, 32), expected=(16, 32)), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=LORA_A, got=(8, 32), expected=(16, 64), others=1), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=LORA_A, got=(16, 64), expected=(16, 32)), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=LORA_A, got=(0,), expected=(16, 64), others=2), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=LORA_A, got=(0, 64), expected=(16, 64)), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=HEAD, got=(9, 32), expected=(8, 32), trained_whole=True), "shape-mismatch", OF_ADAPTER),
    (reason("shape_clash", name=LORA_A, got=(2, 32), expected=(3, 32), of_tokens=True), "shape-mismatch", OF_ADAPTER),
    (raised("config"), "config-invalid", OF_CONFIG),
    (raised("config", detail="OFT weights are incompatible"), "not-mergeable", OF_CONFIG),
    (raised("config", "ModuleNotFoundError", more=("ImportError",)), NOT_JUDGED, OF_RUN),
    (raised("inject"), "not-mergeable", OF_CONFIG),
    (raised("inject", "IndexError", **NO_TOKEN_ROW), "shape-mismatch", OF_CONFIG),
    (raised("inject", "IndexError", more=("LookupError",)), "not-mergeable", OF_CONFIG),
    (raised("inject", trains_tokens=True), "not-mergeable", OF_CONFIG),
    (raised("inject", text="Unknown initialization x"), "config-invalid", OF_CONFIG),
    (raised("inject", text="dropout probability has to be"), "config-invalid", OF_CONFIG),
    (raised("inject", text="call preprocess_corda first"), "not-mergeable", OF_CONFIG),
    (raised("inject", quantization="fp8"), NOT_JUDGED, OF_BASE),
    (raised("load"), "config-invalid", OF_CONFIG),
    (raised("load", "RuntimeError"), "config-invalid", OF_CONFIG),
    (raised("load", "TypeError"), NOT_JUDGED, OF_CONFIG),
    (raised("load", "SafetensorError"), "file-corrupt", OF_FILE),
    (raised("load", "UnpicklingError"), "file-corrupt", OF_FILE),
    (raised("load", "EOFError"), "file-corrupt", OF_FILE),
    (raised("load", detail="from state dictionary however they were not"), "keys-missing", OF_ADAPTER),
    (raised("load", "IndexError", text="9 is out of bounds for dimension 0"), "shape-mismatch", OF_ADAPTER),
    (raised("add"), "not-mergeable", OF_CONFIG),
    (raised("combine", members=("a", "b"), method="ties"), "not-mergeable", OF_CONFIG),
    (raised("combine", members=MANY, method="ties"), "not-mergeable", OF_CONFIG),
    (raised("merge"), "not-mergeable", OF_MERGE),
    (raised("merge", "ImportError"), NOT_JUDGED, OF_RUN),
    (raised("merge", "IndexError", **NO_TOKEN_ROW), "shape-mismatch", OF_CONFIG),
    (raised("merge", "IndexError", more=("LookupError",)), "not-mergeable", OF_MERGE),
    (raised("merge", trains_tokens=True), "not-mergeable", OF_MERGE),
    (raised("merge", text="shape is inconsistent with indices"), "shape-mismatch", OF_ADAPTER),
    (raised("merge", text="number of dimensions must be sparse_dim (2)"), "shape-mismatch", OF_ADAPTER),
    (raised("merge", **PACKED), NOT_JUDGED, OF_BASE),
    (raised("merge", is_incomplete=True), NOT_JUDGED, OF_BASE),
    *((reason("known_defect", defect=one), "not-mergeable", OF_CONFIG) for one in DEFECTS),
    (reason("known_defect", defect="merged-twice", modules=("lm_head", "embed")), "not-mergeable", OF_CONFIG),
    (reason("loftq_without_gpu"), NOT_JUDGED, OF_CONFIG),
    (
        reason("other_forward", module="model.layers.0", class_name="StandardizedConv2d", share=0.25),
        "not-mergeable",
        OF_CONFIG,
    ),
    (reason("layer_left_unmerged", module="model.layers.0"), "not-mergeable", OF_MERGE),
    (reason("result_lacks_tensors", names=(NORM,), in_wrapper=False), "not-mergeable", OF_MERGE),
    (reason("result_lacks_tensors", names=("a", "b", "c", "d"), in_wrapper=True), "not-mergeable", OF_MERGE),
    (reason("setting_lost", adapter="support", setting="use_rslora"), "not-mergeable", OF_CONFIG),
    (reason("tensor_unweighted", adapter="support", tensor=NORM), "not-mergeable", OF_CONFIG),
    (reason("two_vocabularies", adapters=("a", "b"), tensor=NORM), "not-mergeable", OF_CONFIG),
    (reason("modules_left_out", adapter="support", modules=("lm_head",)), "not-mergeable", OF_CONFIG),
    (reason("config_unreadable", error=caught("OSError")), NOT_JUDGED, OF_RUN),
    (reason("base_raised", base="./base", error=caught("OSError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (
        reason("base_raised", base="./base", error=caught("OutOfMemoryError"), class_name="LlamaModel"),
        NOT_JUDGED,
        OF_RUN,
    ),
    (reason("base_raised", base="./base", error=caught("MemoryError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (reason("base_raised", base="./base", error=caught("ImportError"), class_name="LlamaModel"), NOT_JUDGED, OF_RUN),
    (reason("remote_code_needed"), NOT_JUDGED, OF_RUN),
    (reason("remote_code_needed", base="./base"), NOT_JUDGED, OF_RUN),
    (reason("base_of_another_class", base="./base", class_name="Gemma3ForCausalLM"), NOT_JUDGED, OF_RUN),
    (reason("adapter_next_to_base", base="./base"), "base-inconsistent", OF_BASE),
    (reason("quantization_unknown", base="./base", method="odd", transformers="9.0.0"), "base-format", OF_BASE),
    (loaded(asked_quantization=Quantization.BNB_8BIT), "base-format", OF_BASE),
    (loaded(quantization="fp8", asked_dtype="float32"), "base-format", OF_BASE),
    (loaded(asked_dtype="float32"), "base-format", OF_BASE),
    (left_out(), "base-inconsistent", OF_BASE),
    (left_out(file=None, names=("q.SCB", "k.SCB")), "base-inconsistent", OF_BASE),
    (left_out(wrapped=("q.base_layer.weight",)), "base-inconsistent", OF_BASE),
    (left_out(names=MANY), "base-inconsistent", OF_BASE),
    (left_out(wrapped=MANY), "base-inconsistent", OF_BASE),
    (
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB",)),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB", "scale")),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=MANY),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        reason("codes_for_numbers", base="./base", file="a", tensor=NORM, dtype="int8", class_name="LlamaModel"),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        reason("base_shape_clash", base="./base", class_name="LlamaModel", name=NORM, got=(48,), expected=(40,)),
        "base-inconsistent",
        OF_BASE,
    ),
    (
        reason("parameters_not_stored", base="./base", class_name="LlamaModel", names=(NORM,), read=("a",)),
        "base-incomplete",
        OF_BASE,
    ),
    (
        reason(
            "parameters_not_stored",
            base="./base",
            class_name="LlamaModel",
            names=(NORM, "b"),
            read=("a",),
            elsewhere=("c",),
        ),
        "base-incomplete",
        OF_BASE,
    ),
    (
        reason(
            "parameters_not_stored", base="./base", class_name="LlamaModel", names=(NORM,), read=MANY, elsewhere=MANY
        ),
        "base-incomplete",
        OF_BASE,
    ),
    (reason("tensor_without_values", name=NORM), NOT_JUDGED, OF_RUN),
    (reason("not_measured", module="lm_head", error=caught()), NOT_JUDGED, OF_RUN),
    (reason("worker_raised", error=caught()), NOT_JUDGED, OF_RUN),
    (reason("worker_raised", error=caught("MemoryError")), NOT_JUDGED, OF_RUN),
    (
        reason("worker_raised", error=caught("OutOfMemoryError", "CUDA out of memory", "RuntimeError")),
        NOT_JUDGED,
        OF_RUN,
    ),
    (
        reason("worker_raised", error=caught("RuntimeError", "[enforce fail] DefaultCPUAllocator: no memory")),
        NOT_JUDGED,
        OF_RUN,
    ),
    (reason("worker_raised", error=caught("FileNotFoundError", "no a.safetensors", "OSError")), NOT_JUDGED, OF_RUN),
    (reason("worker_raised", error=caught("ImportError"), in_import=True), NOT_JUDGED, OF_RUN),
    (reason("worker_raised", error=caught("OSError", "no libcudart.so"), in_import=True), NOT_JUDGED, OF_RUN),
    (reason("worker_raised", error=caught("ImportError")), NOT_JUDGED, OF_RUN),
    (NotJudged(message="the worker died", hint="run again", origin=OF_BASE), NOT_JUDGED, OF_BASE),
)


PLACES: tuple[tuple[Refusal, str | None, str | None], ...] = (
    (reason("tensors_missing", names=(LORA_A, HEAD)), None, LORA_A),
    (reason("tensor_unreadable", name="odd"), None, "odd"),
    (reason("shape_clash", name=LORA_A, got=(8, 32), expected=(16, 32)), "layers.0.q_proj", LORA_A),
    (reason("known_defect", defect="merged-twice", modules=("lm_head", "embed")), "lm_head", None),
    (reason("other_forward", module="model.layers.0", class_name="Odd", share=0.25), "model.layers.0", None),
    (reason("layer_left_unmerged", module="model.layers.0"), "model.layers.0", None),
    (reason("tensor_unweighted", adapter="support", tensor=NORM), "model.norm", NORM),
    (reason("two_vocabularies", adapters=("a", "b"), tensor=NORM), "model.norm", NORM),
    (reason("modules_left_out", adapter="support", modules=("lm_head", "score")), "lm_head", None),
    (left_out(names=("layers.0.q.SCB", "layers.1.q.SCB")), "layers.0.q", "layers.0.q.SCB"),
    (
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB",)),
        "model.norm",
        NORM,
    ),
    (
        reason("codes_for_numbers", base="./base", file="a", tensor=NORM, dtype="int8", class_name="X"),
        "model.norm",
        NORM,
    ),
    (
        reason("base_shape_clash", base="./base", class_name="X", name=NORM, got=(48,), expected=(40,)),
        "model.norm",
        NORM,
    ),
    (
        reason("parameters_not_stored", base="./base", class_name="X", names=(NORM, "b"), read=("a",)),
        "model.norm",
        NORM,
    ),
)
"""The module and the tensor of each finding that has one."""


def named(case: tuple[Refusal, str, Origin]) -> str:
    fact, check, _ = case
    return f"{kind_of(fact)}-{fact.fields.get('defect', check) if isinstance(fact, Refusal) else check}"


def kind_of(fact: Refusal | NotJudged) -> str:
    return fact.kind if isinstance(fact, Refusal) else "not_judged"


# --- what the engine returns, and what is worded ---------------------------------------------------------------------


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names:
            yield node


def keys_of(call: ast.Call) -> Iterator[str]:
    """The names of the fields; those of `**raised(…)` are the keys that this function returns."""
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg
            continue
        assert isinstance(keyword.value, ast.Call)
        assert keyword.value.func.id == "raised"
        yield from ON_PEFT


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
(ON_PEFT,) = [
    tuple(ast.literal_eval(key) for key in node.body[-1].value.keys)
    for node in ast.walk(TREES[SOURCE / "engine/adapter/peft_config.py"])
    if isinstance(node, ast.FunctionDef) and node.name == "raised"
]
RAISED = [
    (ast.literal_eval(call.args[0]), tuple(keys_of(call)), f"{path.relative_to(SOURCE)}:{call.lineno}")
    for path, tree in TREES.items()
    for call in calls(tree, "Refused", "Undecidable")
]
"""Each refusal in the source: its kind, its fields, and its line."""


@pytest.mark.parametrize(("kind", "fields", "line"), RAISED, ids=[f"{kind}-{line}" for kind, _, line in RAISED])
def test_each_refusal_in_the_source_can_be_worded(kind: str, fields: tuple[str, ...], line: str) -> None:
    inspect.signature(REFUSALS[kind]).bind(**dict.fromkeys(fields))


def test_each_kind_is_raised_once_at_least_and_has_a_case() -> None:
    assert REFUSALS.keys() == {kind for kind, _, _ in RAISED}
    assert REFUSALS.keys() == {kind_of(fact) for fact, _, _ in CASES} - {"not_judged"}
    assert len(REFUSALS) == sum(map(len, (not_judged.REFUSALS, peft_errors.REFUSALS, table.REFUSALS)))
    made = {path.name for path, tree in TREES.items() for _ in calls(tree, "Refusal")}
    assert made == {"refusals.py"}, "the test above sees only what Refused and Undecidable make"


def test_each_defect_is_found_and_worded() -> None:
    named = [keyword.value for tree in TREES.values() for call in calls(tree, "Rule", "Refused", "known_defect")
             for keyword in call.keywords if keyword.arg == "defect"]  # fmt: skip
    assert DEFECTS.keys() == {one.value for one in named if isinstance(one, ast.Constant)}
    assert {ast.unparse(one) for one in named if not isinstance(one, ast.Constant)} == {"rule.defect"}


@pytest.mark.parametrize(
    "broken",
    [
        reason("no_such_kind"),
        reason("layer_left_unmerged"),
        reason("layer_left_unmerged", module="m", modul="m"),
        reason("known_defect", defect="no-such-defect"),
        reason("not_judged", message="m"),
    ],
    ids=["kind", "missing field", "unknown field", "defect", "a function that is no kind"],
)
def test_a_refusal_without_words_is_an_error(broken: Refusal) -> None:
    report = merged_report(Entry(spec=spec(), dtype="float32", members=(files(),)), evidence(refusal=broken))
    assert (report.verdict, report.cause) == (Verdict.ERROR, NOT_JUDGED)


@pytest.mark.parametrize(("fact", "check", "origin"), CASES, ids=map(named, CASES))
def test_a_fact_becomes_a_finding_of_its_check(fact: Refusal, check: str, origin: Origin) -> None:
    finding = refused(fact)
    assert (finding.check, finding.origin) == (check, origin)
    assert check == NOT_JUDGED or finding.severity is CHECKS[check].severity
    for text in (finding.message, finding.hint):
        assert text == " ".join(text.split())
        assert not text.endswith(".")
        assert not re.search(r"\b1 (more )?(tensors|weights|parameters)\b", text), text


@pytest.mark.parametrize(("fact", "module", "tensor"), PLACES, ids=[kind_of(fact) for fact, _, _ in PLACES])
def test_a_finding_names_its_module_and_its_tensor(fact: Refusal, module: str | None, tensor: str | None) -> None:
    finding = refused(fact)
    assert (finding.module, finding.tensor) == (module, tensor)


def test_findings_of_all_other_facts_name_no_place() -> None:
    placed = {kind_of(fact) for fact, _, _ in PLACES}
    found = [refused(fact) for fact, _, _ in CASES if kind_of(fact) not in placed]
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
    fact = reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by=saved_by)
    assert refused(fact).check in {"config-invalid", NOT_JUDGED}


def test_a_fact_that_cannot_be_worded_costs_its_own_adapter_only(wording: Wording) -> None:
    broken = reason("ignored_settings", settings=None, peft="9.0.0", saved_by="9.0.0")
    finding = refused(broken)
    assert finding.check == NOT_JUDGED
    wording(finding)


@pytest.mark.parametrize("step", ["inject", "merge"])
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
    step: str, settings: dict[str, Any], is_of_adapter: bool
) -> None:
    finding = refused(raised(step, **settings))
    assert finding.check == ("not-mergeable" if is_of_adapter else NOT_JUDGED)
    assert (finding.origin is OF_BASE) is not is_of_adapter


def test_methods_whose_exceptions_fail_the_adapter_are_in_the_documentation() -> None:
    rows = re.findall(r"^\| `([a-z0-9]+)` on bitsandbytes", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.upper() for name in rows} >= DOCUMENTED_ON_PACKED
