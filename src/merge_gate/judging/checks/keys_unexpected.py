"""The adapter's file holds tensors that nothing in the merge uses.

**Fires when** the file holds tensors that match nothing in this base under this config. Two cases are only a warning:

- A tensor is complex. PEFT loads its real part. If it has another part, the cause is
  [config-invalid](config-invalid.md).
- The file has a new value for a tensor of the base that the config does not name (a norm without `modules_to_save`, a
  bias with `bias: none`). PEFT replaces the base's tensor without a warning, so the merge changes a layer that no one
  asked for.

Embeddings and heads that `save_embedding_layers` adds are not reported.

```text
1 tensor in the file matches nothing in the base, so PEFT would drop it:
base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight
```

**Why it matters.** PEFT drops these tensors without a warning, so something that was trained is not released. Examples
are layers that are missing from `target_modules`, DoRA magnitudes with `use_dora: false`, and a larger base.

**What to do.** Find out which one is wrong: the config, the base, or the file. The gate accepts names that PEFT or
transformers rename on loading. It also accepts a second copy of a trained tensor with the same bits, which some
releases of PEFT write (`….modules_to_save.weight`).

**It happened.**

- [peft#1579](https://github.com/huggingface/peft/issues/1579): names had one prefix more than PEFT expects, and the
  merged model had the weights of the base.
- [sentence-transformers#3865](https://github.com/huggingface/sentence-transformers/pull/3865): names that did not match
  were dropped on loading, and the embeddings were the base's.
- [unslothai/unsloth-zoo#369](https://github.com/unslothai/unsloth-zoo/pull/369): tensors of `modules_to_save` were in
  the file, but not in the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import listing
from merge_gate.judging import key_hints
from merge_gate.judging.checks.check import ERROR, FOLLOWS, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.judging.checks.phrases import NAMES, are, tensors
from merge_gate.records.terms import Finding, Origin


def _complex_tensors(case: FileCase, stray: tuple[str, ...]) -> Iterator[Finding]:
    names = tuple(header.name for header in case.files.tensors if header.dtype == "C64" and header.name not in stray)
    if names:
        yield keys_unexpected.finding(
            f"{tensors(names)} in the file {are(names)} complex: {listing(names)}; PEFT loads the real part and "
            "drops the imaginary one",
            "find the program that wrote complex numbers: no method of PEFT trains them",
            severity=WARNING,
            module=module_of(names[0]),
            tensor=names[0],
            complex=len(names),
        )


@Check(
    "keys-unexpected",
    ERROR,
    Origin.ADAPTER,
    Symptom.TENSORS_LOST,
    blame=110,
    page=__doc__,
    of_files=lambda case: _complex_tensors(case, stray=()),
).on_merge
def keys_unexpected(case: MergeCase) -> Iterator[Finding]:
    stray, missing, unnamed = case.evidence.unexpected, case.evidence.missing, case.evidence.unnamed
    named = key_hints.names_of_another_kind(case.files.tensors) or key_hints.of_another_model(missing, stray)
    if named and missing and not case.evidence.dropped:
        named = f"{FOLLOWS} the same names: see keys-missing"
    if stray:
        yield keys_unexpected.finding(
            f"{tensors(stray)} in the file {'matches' if len(stray) == 1 else 'match'} nothing in the base, so PEFT "
            f"would drop {'it' if len(stray) == 1 else 'them'}: {listing(stray, NAMES)}",
            named
            or saved_twice(stray)
            or "check that adapter_config.json belongs to this file (target_modules, use_dora, modules_to_save), that "
            "this is the adapter's base, and that the model was unwrapped before saving",
            module=module_of(stray[0]),
            tensor=stray[0],
            unexpected=len(stray),
        )
    if unnamed:
        yield keys_unexpected.finding(
            f"{tensors(unnamed)} of the base {are(unnamed)} in the file, although adapter_config.json does not name "
            f"{'it' if len(unnamed) == 1 else 'them'}: {listing(unnamed)}; the merged model has the file's values",
            "if they were trained, name their modules in modules_to_save (or set bias) and save the adapter again; if "
            "not, remove them from the file: PEFT replaces the base's tensors without a warning, other programs drop "
            "them",
            severity=WARNING,
            module=unnamed[0].rpartition(".")[0],
            tensor=unnamed[0],
            unnamed=len(unnamed),
        )
    yield from _complex_tensors(case, stray)


def saved_twice(stray: Sequence[str]) -> str:
    """The hint for a module that the file has twice with different values, and that PEFT loads once; else empty."""
    if not all(".modules_to_save." in name for name in stray):
        return ""
    return (
        "PEFT saves some fully trained modules twice, with and without modules_to_save in the name. Here the copies "
        "differ: save the adapter again, or remove the wrong copy from the file"
    )
