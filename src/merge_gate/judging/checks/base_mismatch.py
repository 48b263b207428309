"""adapter_config.json names another base or revision than the one used.

**Fires when** `adapter_config.json` names a different base, or a different revision of it, than the run uses. Only
the last part of the names counts: `acme/base-1b` and `./models/base-1b` are the same.

- A name in `base.names` counts as a name of the base.
- A path (`/home/alice/base`) says nothing about the weights, so the finding is a `note`. The same is true for the name
  of a 4-bit copy (`acme/base-1b-bnb-4bit`). A path in a cache of the Hub is the Hub's name.
- If the path is a directory on this machine, and all tensors of the adapter fit its headers, the gate compares it with
  the base. The finding is a warning if its `model_type` is another, or if shapes or sizes differ.
- A 4-bit copy, another class of the model, or a model that is part of the other one is a `note`. The same files are no
  finding: the same directory, hard links, or a copy if earlier runs with the same `--cache` hashed both. The gate does
  not compare values.
- A `config.json` next to the adapter, and a path under `base_model` in its README.md, count if their `model_type` is
  another than the base's.
- Other shapes or sizes, and what files next to the adapter say, stay a warning if the check is an error.
- If `expect.base` equals the name in adapter_config.json, the check does not compare names.
- If the base cannot be read, there is no warning.
- The check also fires if the tensors have the names of another model class than the one for the adapter's `task_type`.
  The gate then merges into the class that they fit.
- If the adapter has another number of rows in the vocabulary than the base, a `note` says how many a base for the
  unmerged adapter needs.
- The check needs no merge. An adapter whose files are refused has this finding too, so you can fix both at once.

```text
adapter_config.json names base 'acme/another-base', but the base of this run is './models/llama'
```

**Why it matters.** An adapter on the wrong base of the same shape merges without any error, and the model answers
nonsense.

**What to do.** Name the right base. If both names mean the same weights, list the other name: `base: {model:
./models/base, names: [acme/base-1b]}`. For a release gate, set `policy: release`, which makes the check an error.

**It happened.**

- [peft#1567](https://github.com/huggingface/peft/issues/1567): the config can name a revision of the base, but
  `from_pretrained` did not use it.
- [openvla/openvla#49](https://github.com/openvla/openvla/issues/49): a loss of NaN came from the wrong base weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import foreign
from merge_gate.judging.checks.check import NOTE, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.names.hub_names import hub_name
from merge_gate.records.config import A_FILE
from merge_gate.records.files import NamedBase
from merge_gate.records.terms import FailureKind, Finding, Likeness, Origin


@Check(
    "base-mismatch",
    WARNING,
    Origin.CONFIG,
    Symptom.WRONG_PAIR,
    blame=150,
    page=__doc__,
    failure=FailureKind.UNEXPECTED,
    of_files=lambda case: _names_another_base(case, case.spec.base.revision),
).on_merge
def base_mismatch(case: MergeCase) -> Iterator[Finding]:
    yield from _class_mismatch(case)
    if case.evidence.resized is not None:
        before, after = case.evidence.resized
        yield base_mismatch.finding(
            f"the adapter has {after:,} rows of the vocabulary, and the base has {before:,}: PEFT and servers load the "
            "unmerged adapter only on a base with as many rows",
            f"to serve it unmerged, resize the base to {after:,} rows first (resize_token_embeddings)",
            severity=NOTE,
        )
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
            f"adapter_config.json names revision {foreign(revision)} of the base, but the base of this run is at "
            f"{foreign(got)}",
            f"set base.revision to {foreign(revision)}, or release with the revision that the gate used",
        )


_COMPARE = "a path does not say which weights it held: make sure that these are the same"

_QUANTIZED_COPIES = ("-bnb-4bit", "-unsloth-bnb-4bit")
"""The ends of the names that unsloth gives to its copies of a base."""


def _other_name(case: FileCase, named: str, label: str) -> Iterator[Finding]:
    """Names are compared by their last parts. A met `expect.base` settles the question."""
    base, expect = case.spec.base, case.spec.expect
    listed = {_last(name) for name in base.names}
    known = listed | {_last(name) for name in (label, base.model or label)}
    hub_id = hub_name(named)
    last = _last(hub_id or named)
    if last in listed or (expect is not None and expect.base == named):
        return
    names = f"adapter_config.json names base {foreign(named)}"
    if hub_id is None and case.files.named_base is not None:
        yield from _other_directory(case.files.named_base, names, label, is_known=last in known)
    elif last in known:
        return
    elif hub_id is None:
        yield base_mismatch.finding(
            f"{names}, a path on the machine that trained the adapter; the base of this run is {foreign(label)}",
            _COMPARE,
            severity=NOTE,
        )
    elif any(last == f"{name}{suffix}" for name in known for suffix in _QUANTIZED_COPIES):
        yield base_mismatch.finding(
            f"{names}, a copy in 4 bits of {foreign(label)}, the base of this run",
            "the adapter was trained on the 4-bit copy: to gate that merge as well, set quantization: bnb-4bit "
            "(--quantization bnb-4bit)",
            severity=NOTE,
        )
    else:
        yield base_mismatch.finding(
            f"{names}, but the base of this run is {foreign(label)}",
            f"if both are the same weights, list {foreign(named)} under `base.names` in {A_FILE}; else name the right "
            "base",
        )


def _other_directory(other: NamedBase, names: str, label: str, *, is_known: bool) -> Iterator[Finding]:
    """The finding on a directory of this machine. With `is_known`, its name is that of the base."""
    path = f"the path under `base.names` in {A_FILE}"
    match other.likeness:
        case Likeness.OTHER_TYPE:
            where = f"{other.file} of the adapter names one" if other.file else "that directory here holds one"
            yield base_mismatch.finding(
                f"{names}, a model of the type {foreign(other.named)} ({where}), but the base of this run, "
                f"{foreign(label)}, is of the type {foreign(other.used)}",
                f"name the right base; if the directory has changed since the training, list {path}",
                is_lesser=bool(other.file),
            )
        case Likeness.OTHER_FILES:
            yield base_mismatch.finding(
                f"{names}, a directory here whose files are not those of {foreign(label)}, the base of this run: "
                f"{other.difference}",
                f"name the right base; if both are the same weights, or the directory has changed since, list {path}",
                is_lesser=True,
            )
        case Likeness.OTHER_SETTINGS | Likeness.ALIKE if not is_known:
            alike = f"differs in its {other.difference}" if other.difference else "has the same shapes"
            yield base_mismatch.finding(
                f"{names}, a directory here that {alike}, and was not compared byte by byte; the base of this run is "
                f"{foreign(label)}",
                _COMPARE,
                severity=NOTE,
            )


def _class_mismatch(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.instead_of is not None and evidence.base.loaded_as.endswith("EncoderModel"):
        yield base_mismatch.finding(
            f"the adapter has tensors for the encoder alone, and its targets are in the rest of {evidence.instead_of} "
            f"too: the gate merged it into {evidence.base.loaded_as}",
            "if more than the encoder was trained, tensors were lost: save the adapter again",
            severity=NOTE,
        )
    elif evidence.instead_of is not None:
        yield base_mismatch.finding(
            f"task_type {case.files.config.task_type} in adapter_config.json stands for {evidence.instead_of}, but the "
            f"adapter's tensors have the names of {evidence.base.loaded_as}: the gate merged it into that class",
            f"load the base as {evidence.base.loaded_as} to serve it: {evidence.instead_of} would load none of its "
            "tensors; save it with the task_type of the model that it was trained on",
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
