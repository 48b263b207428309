"""Refusals whose words are of no check's module. Those of a check are in its own tests."""

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate.judging import not_judged, peft_errors
from merge_gate.judging.adapter_report import merged_report
from merge_gate.judging.all_checks import REFUSALS, refused
from merge_gate.judging.bounds import MOST_OF_LOG
from merge_gate.judging.checks import table
from merge_gate.judging.checks.not_mergeable import DEFECTS
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, accident
from merge_gate.judging.peft_errors import DOCUMENTED_ON_PACKED
from merge_gate.records.files import Entry, Pattern
from merge_gate.records.refusals import Caught, NotJudged, Refusal
from merge_gate.records.terms import Origin, Verdict
from merge_gate.worker.protocol import refusal_of
from tests.support.judging.cases import evidence, files, reason, spec
from tests.support.judging.every_check import GOLDENS
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
    (reason("unknown_method", name="NEWLORA", peft="9.0.0"), NOT_JUDGED, OF_CONFIG),
    (reason("unknown_method", name="lora", peft="9.0.0", known_as="LORA"), NOT_JUDGED, OF_CONFIG),
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


def named(case: tuple[Refusal, str, Origin]) -> str:
    fact, check, _ = case
    return f"{kind_of(fact)}-{fact.fields.get('defect', check) if isinstance(fact, Refusal) else check}"


def kind_of(fact: Refusal | NotJudged) -> str:
    return fact.kind if isinstance(fact, Refusal) else "not_judged"


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
    for call in calls(tree, "Refused", "CannotJudge")
]
"""Each refusal in the source: its kind, its fields, and its line."""


@pytest.mark.parametrize(("kind", "fields", "line"), RAISED, ids=[f"{kind}-{line}" for kind, _, line in RAISED])
def test_each_refusal_in_the_source_can_be_worded(kind: str, fields: tuple[str, ...], line: str) -> None:
    inspect.signature(REFUSALS[kind]).bind(**dict.fromkeys(fields))


def test_each_kind_is_raised_once_at_least_and_has_a_case() -> None:
    assert REFUSALS.keys() == {kind for kind, _, _ in RAISED}
    goldens = "".join(path.read_text(encoding="utf-8") for path in GOLDENS.values())
    worded = set(re.findall(r"^== refused (\w+)$", goldens, re.MULTILINE))
    assert REFUSALS.keys() == worded | {kind_of(fact) for fact, _, _ in CASES} - {"not_judged"}
    assert len(REFUSALS) == sum(map(len, (not_judged.REFUSALS, peft_errors.REFUSALS, table.REFUSALS)))
    made = {path.name for path, tree in TREES.items() for _ in calls(tree, "Refusal")}
    assert made == {"refusals.py"}, "the test above sees only what Refused and CannotJudge make"


def test_each_defect_is_found_and_worded() -> None:
    named = [keyword.value for tree in TREES.values() for call in calls(tree, "Refused", "known_defect")
             for keyword in call.keywords if keyword.arg == "defect"]  # fmt: skip
    tables = [node.value for tree in TREES.values() for node in ast.walk(tree)
              if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in {"OF_CONFIG", "OF_MODEL"}]  # fmt: skip
    in_tables = [ast.literal_eval(key) for table_ in tables for node in ast.walk(table_) if isinstance(node, ast.Dict)
                 for key in node.keys if key is not None]  # fmt: skip
    assert len(tables) == 2
    assert DEFECTS.keys() == {one.value for one in named if isinstance(one, ast.Constant)} | set(in_tables)
    assert {ast.unparse(one) for one in named if not isinstance(one, ast.Constant)} == {"defect"}


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


def test_these_findings_name_no_place() -> None:
    found = [refused(fact) for fact, _, _ in CASES]
    assert {(finding.module, finding.tensor) for finding in found} == {(None, None)}


def test_what_they_say(wording: Wording) -> None:
    for fact, _, _ in CASES:
        finding = refused(fact)
        wording(f"{finding.message}\n> {finding.hint}")


def test_what_an_accident_says(wording: Wording) -> None:
    wording(*(accident("x", error) for error in (MemoryError(), ValueError("v" * 300))))


def test_an_unexpected_exception_has_its_traceback() -> None:
    """Also from the worker, whose exceptions arrive as facts. Of a long one, the end counts."""
    with pytest.raises(ValueError, match="the end") as raised:
        float("v" * 9_000 + "the end")
    of_worker, of_gate = refused(refusal_of(raised.value)), accident("x", raised.value)
    for finding in (of_worker, of_gate):
        assert "--verbose" in finding.hint
        assert (finding.log or "").endswith("the end'\n")
        assert len(finding.log or "") == MOST_OF_LOG
    assert refused(refusal_of(OSError("no disk"))).log is None, "it is no bug"


def test_facts_travel() -> None:
    for fact, _, _ in CASES:
        assert pickle.loads(pickle.dumps(fact)) == fact


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
def test_an_exception_of_peft_is_the_adapters_on_a_plain_base(step, settings, is_of_adapter) -> None:
    finding = refused(raised(step, **settings))
    assert finding.check == ("not-mergeable" if is_of_adapter else NOT_JUDGED)
    assert (finding.origin is OF_BASE) is not is_of_adapter


def test_methods_whose_exceptions_fail_are_documented() -> None:
    rows = re.findall(r"^\| `([a-z0-9]+)` on bitsandbytes", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.upper() for name in rows} >= DOCUMENTED_ON_PACKED
