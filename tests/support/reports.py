"""Reports to render: one of each kind, and a strategy for hostile ones."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from merge_gate.judging.verdict import with_decision
from merge_gate.records.files import HashedFile
from merge_gate.records.measured import Forward, TensorMerge, TensorStats
from merge_gate.records.report import (
    TOOL,
    AdapterReport,
    BaseReport,
    ConfigFile,
    Coverage,
    Environment,
    Judged,
    PublishedModel,
    Report,
    Sandbox,
    Tool,
)
from merge_gate.records.terms import BaseKey, Finding, Origin, Quantization, Severity, Verdict

PARAMETERS = 1_100_048_384
SHA256 = "9f2c5d1e" * 8

BASE = BaseKey(model="./models/base", revision=None, dtype="bfloat16", quantization=Quantization.NONE)
HALF = BaseKey(model="./models/base", revision=None, dtype="float16", quantization=Quantization.NONE)
ENVIRONMENT = Environment(
    python="3.11.7",
    torch="2.13.0",
    peft="0.21.2",
    transformers="5.24.0",
    device="cpu",
    device_name="a CPU",
    sandbox=Sandbox(held=("files", "network"), missing=("processes: the kernel has no filter",)),
)


def _finding(check: str, message: str, hint: str = "", *, origin: Origin, **fields: Any) -> Finding:
    severity = fields.pop("severity", Severity.ERROR)
    return Finding(check=check, severity=severity, message=message, hint=hint, origin=origin, **fields)


def _counts(nan: int, posinf: int, neginf: int, numel: int, first_index: tuple[int, ...]) -> dict[str, Any]:
    return {"nan": nan, "posinf": posinf, "neginf": neginf, "numel": numel, "first_index": first_index}


Q_PROJ, UP_PROJ = "model.layers.5.self_attn.q_proj", "model.layers.17.mlp.up_proj"
NAN = _finding(
    "adapter-nonfinite",
    f"lora_B of {Q_PROJ} holds 1 NaN among 16,384 values, expected all to be finite",
    "retrain from the last checkpoint whose loss was finite, or restore the file from the training run's output",
    origin=Origin.ADAPTER, module=Q_PROJ, tensor=f"base_model.model.{Q_PROJ}.lora_B.weight",
    **_counts(1, 0, 0, 16_384, (0, 7)),
)  # fmt: skip
MERGED_NAN = _finding(
    "merged-nonfinite",
    "the merged weight holds 2,048 NaN among 4,194,304 values in bfloat16, expected all to be finite",
    origin=Origin.ADAPTER, module=Q_PROJ, tensor=f"{Q_PROJ}.weight", **_counts(2048, 0, 0, 4_194_304, (0, 0)),
)  # fmt: skip
OVERFLOW = _finding(
    "merged-nonfinite",
    "the merged weight holds 12 +Inf and 3 -Inf among 11,534,336 values in float16 (largest 65,504), "
    "expected all to be finite; base and adapter are finite by themselves",
    "merge in bfloat16 (`dtype: bfloat16`), or lower lora_alpha from 4096",
    origin=Origin.MERGE, module=UP_PROJ, tensor=f"{UP_PROJ}.weight", **_counts(0, 12, 3, 11_534_336, (311, 2040)),
    measured=(("largest", 65504.0), ("headroom", float("inf"))),
)  # fmt: skip
ROUNDING = _finding(
    "rounding-loss",
    "81 % of the delta's norm is lost in bfloat16 in 12 of 48 modules, expected at most 50 %",
    "merge in float32, or train with a higher scaling",
    severity=Severity.WARNING, origin=Origin.MERGE, module="model.layers.0.self_attn.q_proj",
    measured=(("lost_share", 0.81), ("limit", 0.5)),
)  # fmt: skip
CRASH = _finding(
    "not-judged",
    "the worker was killed by signal 9 (SIGKILL) while it merged model.layers.3.mlp.down_proj",
    "the machine probably ran out of memory: 15.2 of 15.6 GB were in use; use a runner with more",
    origin=Origin.RUNTIME,
)


def adapter(name: str = "support", verdict: Verdict = Verdict.PASSED, **fields: object) -> AdapterReport:
    checked = PARAMETERS if verdict is Verdict.PASSED else 0
    defaults: dict[str, object] = {
        "name": name,
        "source": f"./adapters/{name}",
        "base": BASE,
        "peft_type": "LORA",
        "verdict": verdict,
        "coverage": Coverage(
            adapter_tensors=96, applied=96, modules_merged=48, parameters_checked=checked, parameters_total=PARAMETERS
        ),
        "files": (HashedFile(path="adapter_model.safetensors", size_bytes=151_123, sha256=SHA256),),
        "seconds": 0.84,
        "line": 6,
        "column": 5,
    }
    return with_decision(AdapterReport(**(defaults | fields)))


def config_file(path: str) -> ConfigFile:
    return ConfigFile(path=path, sha256=SHA256)


def report(*adapters: AdapterReport, complete: bool = True, **fields: object) -> Report:
    defaults: dict[str, object] = {
        "complete": complete,
        "tool": Tool(name=TOOL, version="0.1.0"),
        "environment": ENVIRONMENT,
        "config": config_file("merge-gate.yml"),
        "bases": (BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE,
                             sha256=SHA256, parameters=PARAMETERS),),
        "adapters": adapters,
    }  # fmt: skip
    return Report(**(defaults | fields))


BFLOAT16_MAX = 3.3895313892515355e38
FLOAT16_MAX = 65504.0


def tensors(
    layers: int = 2, dtype: str = "bfloat16", *, nan: str = "", inf: str = "", no_effect: str = ""
) -> tuple[TensorMerge, ...]:
    """The merged tensors of an adapter on q_proj and up_proj; the three name modules by their ends, blank for none."""
    largest = FLOAT16_MAX if dtype == "float16" else BFLOAT16_MAX
    return tuple(
        TensorMerge(
            module=module,
            stats=TensorStats(
                name=f"{module}.weight",
                dtype=dtype,
                shape=(2048, 2048),
                numel=2048 * 2048,
                minimum=-0.5 - layer,
                maximum=0.25 * layer,
                nan=2048 if nan and module.endswith(nan) else 0,
                posinf=12 if inf and module.endswith(inf) else 0,
                neginf=3 if inf and module.endswith(inf) else 0,
                first_index=(311, 2040) if module.endswith((nan or "-", inf or "-")) else None,
            ),
            dtype_max=largest,
            changed=not (no_effect and module.endswith(no_effect)),
            base_norm=64.0,
            delta_norm=0.5,
            lost_norm=0.0625,
            unchanged_fraction=0.25,
            estimated=layer == 0,
        )
        for layer in range(layers)
        for module in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.up_proj")
    )


RAN = Forward(
    ran=True, inputs="16 tokens", parameters_run=1.0, largest=24_912.0,
    largest_module="model.layers.11.mlp.down_proj", largest_of_base=1_872.0, largest_allowed=FLOAT16_MAX,
    layers_compared=48, largest_difference=2.5e-7, effect=0.125, rounding_change=0.08,
)  # fmt: skip
EARLIER = Judged(key=SHA256, at="2026-03-01T12:00:00Z", place="acme/adapters run 7", seconds=0.84)
PASSED = adapter("support", tensors=tensors(2, no_effect="1.mlp.up_proj"), forward=RAN)
WARNED = adapter("legal", findings=(ROUNDING,), line=7, seconds=0.0, cached=True, judged=EARLIER)
FAILED = adapter(
    "billing", Verdict.FAILED, cause="adapter-nonfinite", findings=(MERGED_NAN, NAN, ROUNDING), line=8,
    tensors=tensors(8, nan="5.self_attn.q_proj"),
)  # fmt: skip
HALF_FAILED = adapter(
    "summaries", Verdict.FAILED, cause="merged-nonfinite", findings=(OVERFLOW,), base=HALF, line=9,
    tensors=tensors(18, "float16", inf="17.mlp.up_proj"),
)  # fmt: skip
CRASHED = adapter("translate-de", Verdict.ERROR, cause="not-judged", findings=(CRASH,), line=11)

PASS = report(PASSED, WARNED)
FAIL = report(PASSED, WARNED, FAILED, HALF_FAILED, CRASHED)
UNDECIDED = report(PASSED, CRASHED)
EMPTY = report(complete=False, bases=())


# --- hostile -------------------------------------------------------------------------------------------------------

ATTACKS = (
    "::error::owned", " ::set-output name=x::y", "##[error]owned", "###[group]", "\n::warning::owned",
    "\r::stop-commands::x", "\u2028::error::x", "\x85::error::x", "\u00a0::error::x", "\ufeff::error::x",
    "%0A::error::x", "%25", ",line=1", "::" * 120, "##[" * 60, " :: " * 60,
    "|", "||\n|---|", "`", "``` ", "\\", "\\|", "~~x~~", "__x__", "*x*", "# heading", "- item", "1. item", "    code",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</details>", "</code>", "&lt;b&gt;", "&#60;b&#62;",
    "@octocat", "![x](http://evil.example/x.png)", "[x](http://evil.example)", "https://evil.example",
    "www.evil.example", "#12", "$$x$$", "[red]rich[/red]", "[/]", ":boom:", "\x1b[31mred\x1b]8;;http://evil.example\x07",
    "\u202etxt.exe", "\ud800", "\x00", "名前" * 30, "e" + "\u0301" * 50, "a" * 700, "",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(ATTACKS) | st.text(max_size=20), max_size=4).map("".join)
_COUNTS = st.none() | st.integers(0, 10**12)
_SOME = st.none() | TEXTS


def findings() -> st.SearchStrategy[Finding]:
    index = st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple)
    measured = st.lists(st.tuples(TEXTS, st.floats() | st.integers()), max_size=2).map(tuple)
    return st.builds(
        Finding, check=TEXTS, severity=st.sampled_from((Severity.ERROR, Severity.WARNING)), message=TEXTS, hint=TEXTS,
        origin=st.sampled_from(Origin), module=_SOME, tensor=_SOME, nan=_COUNTS, posinf=_COUNTS, neginf=_COUNTS,
        numel=_COUNTS, first_index=index, measured=measured,
    )  # fmt: skip


def merges() -> st.SearchStrategy[TensorMerge]:
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    figure, count = st.none() | st.floats(), st.integers(0, 10**12)
    stats = st.builds(
        TensorStats, name=TEXTS, dtype=TEXTS, shape=shape, numel=count, minimum=figure, maximum=figure, nan=count,
        posinf=count, neginf=count, first_index=st.none() | shape,
    )  # fmt: skip
    return st.builds(
        TensorMerge, module=TEXTS, stats=stats, dtype_max=st.floats(), changed=st.booleans(), base_norm=figure,
        delta_norm=figure, lost_norm=figure, unchanged_fraction=figure, estimated=st.booleans(),
    )  # fmt: skip


def published_models() -> st.SearchStrategy[PublishedModel]:
    name = TEXTS | st.just("merge-gate.json")
    files = st.builds(HashedFile, path=name, size_bytes=st.integers(0, 10**12), sha256=TEXTS)
    return st.builds(PublishedModel, directory=TEXTS, dtype=TEXTS, files=st.lists(files, max_size=2).map(tuple))


def forwards() -> st.SearchStrategy[Forward]:
    figure = st.none() | st.floats()
    return st.builds(
        Forward, ran=st.booleans(), why_not=_SOME, inputs=_SOME, largest=figure, largest_module=_SOME,
        largest_allowed=figure, nonfinite_module=_SOME, nonfinite_origin=st.none() | st.sampled_from(Origin),
        rounding_change=figure,
    )  # fmt: skip


def adapters() -> st.SearchStrategy[AdapterReport]:
    found = st.lists(findings(), max_size=3).map(tuple)
    base = st.builds(BaseKey, model=_SOME, revision=_SOME, dtype=TEXTS, quantization=st.sampled_from(Quantization))
    common = {"name": TEXTS, "source": TEXTS, "revision": _SOME, "base": base, "peft_type": _SOME, "findings": found,
              "seconds": st.floats(), "forward": forwards(), "line": st.integers(1, 9), "column": st.integers(1, 9),
              "tensors": st.lists(merges(), max_size=3).map(tuple),
              "published": st.none() | published_models()}  # fmt: skip
    passed = st.builds(AdapterReport, verdict=st.just(Verdict.PASSED), **common)
    others = st.sampled_from((Verdict.FAILED, Verdict.ERROR))
    return (passed | st.builds(AdapterReport, verdict=others, **common)).map(_consistent)


def _consistent(made: AdapterReport) -> AdapterReport:
    """An adapter that passed has no errors. The cause of another one is its first error."""
    errors = [finding for finding in made.findings if finding.severity is Severity.ERROR]
    if made.verdict is Verdict.PASSED or not errors:
        kept = tuple(finding for finding in made.findings if finding not in errors)
        return replace(made, verdict=Verdict.PASSED, findings=kept)
    return with_decision(replace(made, cause=errors[0].check))


def hostile_reports() -> st.SearchStrategy[Report]:
    base = st.builds(
        BaseReport, model=TEXTS, revision=_SOME, dtype=TEXTS, quantization=st.sampled_from(Quantization), sha256=_SOME,
        parameters=st.integers(0, 10**12), findings=st.lists(findings(), max_size=2).map(tuple), loaded_as=TEXTS,
        first_adapter=TEXTS,
    )  # fmt: skip
    return st.builds(
        Report,
        complete=st.booleans(),
        tool=st.builds(Tool, name=st.just(TOOL), version=TEXTS),
        environment=st.builds(Environment, python=TEXTS, torch=_SOME, device=TEXTS, device_name=TEXTS),
        config=st.builds(ConfigFile, path=TEXTS, sha256=TEXTS),
        bases=st.lists(base, max_size=2).map(tuple),
        adapters=st.lists(adapters(), max_size=4).map(tuple),
    )


def runner_obeys(line: str) -> bool:
    """Whether a GitHub runner takes the line for a command (actions/runner, ActionCommand.cs)."""
    return line.lstrip().startswith("::") or "##[" in line


def lines_of(text: str) -> list[str]:
    """Lines as a runner may see them: carriage returns and form feeds break a line too."""
    return text.splitlines()


MISSING = replace(NAN, check="keys-missing", message="a tensor is absent", origin=Origin.FILE)


def in_two_dtypes() -> Report:
    """One adapter: in both dtypes its file lacks a tensor, and in bfloat16 there is a warning besides."""
    both = ((BASE, (MISSING, ROUNDING)), (HALF, (MISSING,)))
    return report(
        *(adapter("a", Verdict.FAILED, cause="keys-missing", findings=found, base=base) for base, found in both)
    )
