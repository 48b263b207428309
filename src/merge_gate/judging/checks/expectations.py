"""Checks that the adapter and the base are the expected ones.

In: names, digests, and expectations. Out: findings. Plain Python: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from merge_gate.judging.checks.check import ERROR, NOTE, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.names.hub_names import could_be_hub_id
from merge_gate.records.config import A_FILE, ALL_WEIGHTS, BaseSpec, Expect
from merge_gate.records.terms import FailureKind, Finding, Origin
from merge_gate.text import quoted


@Check(
    id="base-mismatch",
    severity=WARNING,
    origin=Origin.CONFIG,
    summary="adapter_config.json names another base or revision than the one used.",
    symptom=Symptom.WRONG_PAIR,
    failure=FailureKind.UNEXPECTED,
    of_files=lambda case: _names_another_base(case, case.spec.base.revision),
).on_merge
def base_mismatch(case: MergeCase) -> Iterator[Finding]:
    yield from _class_mismatch(case)
    yield from _names_another_base(case, case.evidence.base.revision)


def _names_another_base(case: FileCase, got: str | None) -> Iterator[Finding]:
    """`got` is the revision of the base, as far as it is known."""
    named, used = case.files.config.base_name, case.spec.base.model
    if not named or used is None:
        return
    yield from _other_name(case, named, case.spec.base.label or used)
    revision = case.files.config.base_revision
    if revision and got and revision not in {got, case.spec.base.revision}:
        yield base_mismatch.finding(
            f"adapter_config.json names revision {revision!r} of the base, but the base of this run is at {got!r}",
            f"set base.revision to {revision!r}, or release with the revision that the gate used",
        )


def _other_name(case: FileCase, named: str, label: str) -> Iterator[Finding]:
    """Names are compared by their last parts. A met `expect.base` settles the question."""
    base, expect = case.spec.base, case.spec.expect
    known = {_last(name) for name in (label, base.model or label, *base.names)}
    if _last(named) in known or (expect is not None and expect.base == named):
        return
    names = f"adapter_config.json names base {named!r}"
    if not could_be_hub_id(named, is_base=True):
        yield base_mismatch.finding(
            f"{names}, a path on the machine that trained the adapter; the base of this run is {label!r}",
            "a path does not say which weights it held: make sure that these are the same",
            severity=NOTE,
        )
    elif any(_last(named) == f"{name}{suffix}" for name in known for suffix in _QUANTIZED_COPIES):
        yield base_mismatch.finding(
            f"{names}, a copy in 4 bits of {label!r}, the base of this run",
            "the adapter was trained on the 4-bit copy: to gate that merge as well, set quantization: bnb-4bit "
            "(--quantization bnb-4bit)",
            severity=NOTE,
        )
    else:
        yield base_mismatch.finding(
            f"{names}, but the base of this run is {label!r}",
            f"if both are the same weights, list {named!r} under `base.names` in {A_FILE}; else name the right base",
        )


def _class_mismatch(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.instead_of is not None:
        yield base_mismatch.finding(
            f"task_type {case.files.config.task_type} in adapter_config.json stands for {evidence.instead_of}, but the "
            f"adapter's tensors have the names of {evidence.base.loaded_as}: the gate merged it into that class",
            f"load the base as {evidence.base.loaded_as} to serve it: {evidence.instead_of} would load none of its "
            "tensors; save it with the task_type of the model that it was trained on",
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


_QUANTIZED_COPIES = ("-bnb-4bit", "-unsloth-bnb-4bit")
"""The ends of the names that unsloth gives to its copies of a base."""

_IN_CONFIG = {"base": "base_name"}
"""What is expected under another name than its field of `AdapterConfig`."""


@Check(
    id="expectation-failed",
    severity=ERROR,
    origin=Origin.CONFIG,
    summary="A fact stated under expect does not match the adapter, or base.sha256 does not match the base.",
    symptom=Symptom.WRONG_PAIR,
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
    """The findings of a base that is not the pinned one. `got` has the digests of its files, and of all its weights."""
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
