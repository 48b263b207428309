"""A fact stated under expect does not match the adapter, or base.sha256 does not match the base.

**Fires when** a fact stated under [`expect`](../reference/configuration.md#expectations) does not match the adapter, or
the base is not the one that [`base.sha256`](../reference/configuration.md#pin-a-base) pins.

```text
expect.r is 16, but adapter_config.json has 4
```

**Why it matters.** Numbers cannot show that `lora_alpha` was edited, or that the file is last week's adapter. The gate
still merges the adapter, so the report shows any other fault too. Into a base that is not the pinned one, it merges
nothing.

**What to do.** Find out which of the two is right before you change the expectation.

**It happened.**

- [vllm-project/vllm#10798](https://github.com/vllm-project/vllm/issues/10798): the server did not support `use_rslora`,
  so users edited `lora_alpha` in the config. Anyone who merges that file later gets a different model.
- [sgl-project/sglang#40835](https://github.com/sgl-project/sglang/issues/40835),
  [NVIDIA/TensorRT-LLM#1668](https://github.com/NVIDIA/TensorRT-LLM/issues/1668): other servers did not support the same
  key. The delta is √r times too weak, and nothing warns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from merge_gate._internal.text import quoted
from merge_gate.judging.checks.check import ERROR, Check, FileCase, Symptom
from merge_gate.records.config import ALL_WEIGHTS, BaseSpec, Expect
from merge_gate.records.terms import FailureKind, Finding, Origin

_IN_CONFIG = {"base": "base_name"}
"""Keys of `expect` that have another name than their field of `AdapterConfig`."""


@Check(
    "expectation-failed",
    ERROR,
    Origin.CONFIG,
    Symptom.WRONG_PAIR,
    blame=160,
    page=__doc__,
    failure=FailureKind.UNEXPECTED,
    allows_merging=True,  # whether the wrong adapter is broken as well is worth knowing
    allows_loading=True,  # it is about the base's bytes, or about facts that PEFT reads safely
).on_files
def expectation_failed(case: FileCase) -> Iterator[Finding]:
    expect = case.spec.expect
    if expect is None:
        return
    for key in (field.name for field in fields(Expect) if field.name != "sha256"):
        wanted, got = getattr(expect, key), getattr(case.files.config, _IN_CONFIG.get(key, key))
        if wanted is not None and wanted != got:
            stated = "has no value" if got is None else f"has {_plain(got)}"
            yield _not_so(f"expect.{key} is {_plain(wanted)}, but adapter_config.json {stated}")
    digests = {file.path: file.sha256 for file in case.files.files}
    for path, wanted in expect.sha256:
        got = digests.get(path)
        if got is None:
            yield _not_so(f"expect.sha256 names {path}, but the adapter has no such file")
        elif got != wanted.lower():
            yield _not_so(f"expect.sha256 of {path} is {wanted}, but the file's is {got}")


def other_base(spec: BaseSpec, got: Mapping[str, str]) -> Iterator[Finding]:
    """The findings on a base that is not the pinned base. `got` has the digests of its files and of all weights."""
    name = quoted(spec.label or spec.model or "", 200)
    for path, wanted in spec.sha256:
        what = "its weights" if path == ALL_WEIGHTS else quoted(path, 200)
        stated = f"has the digest {got[path]}" if path in got else "is no file of it"
        if got.get(path) != wanted:
            yield expectation_failed.finding(
                f"the base {name} is not the pinned one: base.sha256 of {what} is {wanted}, but {what} {stated}",
                "restore the base that was reviewed, or review this one and pin its digest",
                origin=Origin.BASE,
            )


def _plain(value: str | float) -> str:
    short = f"{value:g}" if isinstance(value, int | float) else ""
    return short if short and float(short) == value else repr(value)


def _not_so(message: str) -> Finding:
    return expectation_failed.finding(
        message, "this may be the wrong adapter, or an edited one: find out which before you change the expectation"
    )
