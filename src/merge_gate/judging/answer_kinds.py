"""The kinds of answers of `merge-gate verify`: id, sentence, and hint of each.

In: nothing. Out: `ANSWERS`, in the order in which they decide: the first kind that is found is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from merge_gate.records.terms import Finding, Origin, Severity, record


@record
class AnswerKind:
    """One answer.

    Attributes:
        id: its name in the report, for `--allow`, and for `merge-gate explain`.
        phrase: what a headline says of the model: "the model …".
        summary: when this answer is given.
        hint: what to do about it; empty for a good answer.
        is_good: whether the model is what it should be.
    """

    id: str
    phrase: str
    summary: str
    hint: str = ""
    is_good: bool = False


MERGE_AGAIN = "merge again with PEFT's merge_and_unload(safe_merge=True)"
COPY_AGAIN = "copy tensors that the adapter does not change from the base"
_SAVE_AGAIN = "copy the base's own files, and replace only the tensors that the merge changes"

ATTESTATION, ATTESTED = "attestation", "attested"
BROKEN_FILES, OTHER_ARCHITECTURE = "broken-files", "other-architecture"

_ROWS = (
    AnswerKind(
        id=ATTESTATION,
        phrase="does not match the attestation",
        summary="The attestation is for another directory, verdict, or base, has another signer, or is too old.",
        hint="use the attestation that was made for this directory, and the public key of its signer",
    ),
    AnswerKind(
        id=BROKEN_FILES,
        phrase="cannot be loaded",
        summary="The directory's weight files are incomplete, contradict each other, or cannot be loaded.",
        hint="export the model again, and copy all of its files",
    ),
    AnswerKind(
        id=OTHER_ARCHITECTURE,
        phrase="has another architecture than the base",
        summary="The directory is a model of another architecture or size than the base.",
        hint="name the base that the adapter was trained on, and the model that was merged from it",
    ),
    AnswerKind(
        id="nonfinite",
        phrase="has NaN or Inf values that the merge does not have",
        summary="Some values are NaN or Inf in the model, but finite in the merge.",
        hint=f"{MERGE_AGAIN}; {COPY_AGAIN}",
    ),
    AnswerKind(
        id="wrong-base",
        phrase="is a merge into another base",
        summary="The adapter was merged into another base: a quantized copy, or another revision.",
        hint="merge into the base that the adapter was trained on, at the same revision and not quantized",
    ),
    AnswerKind(
        id="other-candidate",
        phrase="has the merge of another adapter",
        summary="The model, or some of its tensors, are from the merge of another adapter.",
        hint="merge the right adapter, or name this one with --adapter",
    ),
    AnswerKind(
        id="not-applied",
        phrase="is the base: the adapter was not applied",
        summary="The adapter was not applied: the tensors are the same as in the base.",
        hint="check that the export loads the adapter, and merges it before it saves the model",
    ),
    AnswerKind(
        id="applied-twice",
        phrase="has the adapter applied twice",
        summary="The model contains the adapter's delta twice.",
        hint="merge into the original base: this one already contained the delta, or the scaling was doubled",
    ),
    AnswerKind(
        id="other-strength",
        phrase="has the adapter applied at another strength",
        summary="The adapter was applied at another strength.",
        hint="scale by lora_alpha / r, or by lora_alpha / √r with use_rslora, as adapter_config.json specifies",
    ),
    AnswerKind(
        id="applied-in-part",
        phrase="has the adapter applied to only some layers",
        summary="The adapter was applied to only some layers.",
        hint="check that the export uses every key of the adapter, and stops if a key is left over",
    ),
    AnswerKind(
        id="unexplained",
        phrase="has merged tensors with unexplained values",
        summary="Merged tensors have values that no other kind explains.",
        hint="name other adapters with --candidate, and check the base and its revision",
    ),
    AnswerKind(
        id="imprecise",
        phrase="is the merge with large rounding errors",
        summary="The merge was computed with larger rounding errors than float32 and rounding explain.",
        hint="merge with float32 factors: load the adapter without autocast_adapter_dtype=False",
    ),
    AnswerKind(
        id="base-changed",
        phrase="differs from the base in tensors that the adapter does not change",
        summary="Tensors that the adapter does not touch differ from the base.",
        hint="copy the tensors that the adapter does not touch from the base",
    ),
    AnswerKind(
        id="shape-changed",
        phrase="has tensors with other shapes than the merge",
        summary="Some tensors have another shape than in the merge.",
        hint="resize the embeddings only as the adapter did",
    ),
    AnswerKind(
        id="not-carried",
        phrase="lacks tensors of the base",
        summary="The directory lacks tensors of the base.",
        hint=f"save_pretrained drops tensors that transformers does not load: {_SAVE_AGAIN}; "
        "if your server does not need these tensors, pass --allow not-carried",
    ),
    AnswerKind(
        id="added",
        phrase="has tensors that the merge does not have",
        summary="The directory has tensors that the merge does not have.",
        hint=_SAVE_AGAIN,
    ),
    AnswerKind(
        id="renamed",
        phrase="is the merge, stored under other names",
        summary="Tensors are stored under other names or in another layout than in the base.",
        hint="transformers loads both; if your server does too, pass --allow renamed",
    ),
    AnswerKind(
        id="tied",
        phrase="ties other tensors than the base does",
        summary="Tensors are tied in the model but not in the base, or in the base but not in the model.",
        hint="keep tie_word_embeddings in config.json and the stored tensors as in the base",
    ),
    AnswerKind(
        id="stale-shards",
        phrase="has weight files that transformers does not load",
        summary="The directory has weight files that transformers does not load.",
        hint="remove the files that the index does not name: other programs may load them",
    ),
    AnswerKind(
        id="unexpected-file",
        phrase="has unexpected files",
        summary="The directory has files that programs may load as weights, code, tokenizer, template, or settings.",
        hint="remove these files, and verify again",
    ),
    AnswerKind(
        id="ghost-index",
        phrase="has an index that contradicts its weight files",
        summary="The index and the weight files list different tensors.",
        hint="write the index again from the headers of the weight files",
    ),
    AnswerKind(
        id="dtype-changed",
        phrase="is stored in another dtype than the base",
        summary="Tensors are stored in another dtype than in the base.",
        hint="if the cast is intended, pass --allow dtype-changed",
    ),
    AnswerKind(
        id="config-differs",
        phrase="has another config.json than the base",
        summary="config.json describes another model than the base's.",
        hint="copy config.json from the base",
    ),
    AnswerKind(
        id="tokenizer-differs",
        phrase="has another tokenizer than the adapter or the base",
        summary="The tokenizer differs from the adapter's own, or from the base's if the adapter has none.",
        hint="copy the tokenizer's files from the adapter, or from the base if the adapter has none",
    ),
    AnswerKind(
        id="chat-template-differs",
        phrase="has another chat template than the adapter or the base",
        summary="The chat template differs from the adapter's own, or from the base's if the adapter has none.",
        hint="copy the chat template from the adapter, or from the base if the adapter has none",
    ),
    AnswerKind(
        id="stop-tokens-differ",
        phrase="has other stop tokens than the adapter or the base",
        summary="The tokens that end a text differ from those of the adapter or the base.",
        hint="copy generation_config.json from the base, and eos_token from the adapter's tokenizer",
    ),
    AnswerKind(
        id="settings-differ",
        phrase="has other settings for generation or processing",
        summary="generation_config.json, or a file of the processor, differs from the adapter's own or the base's.",
        hint="copy the file from the adapter, or from the base if the adapter has none",
    ),
    AnswerKind(
        id="file-changed",
        phrase="has other files than its merge-gate.json lists",
        summary="Files differ from the digests in merge-gate.json.",
        hint="publish again; if the change is intended, compare with --base and --adapter",
    ),
    AnswerKind(
        id="as-published",
        phrase="has the files that its merge-gate.json lists",
        summary="Every file has the digest in merge-gate.json. That file is not signed.",
        is_good=True,
    ),
    AnswerKind(
        id="other-order",
        phrase="is the merge, in PEFT's other order of rounding",
        summary="The model is the merge, in PEFT's other order of rounding (merge_and_unload without safe_merge).",
        is_good=True,
    ),
    AnswerKind(
        id="rounding",
        phrase="is the merge, in another order of rounding",
        summary="The model is the merge: some order of rounding gives each value.",
        is_good=True,
    ),
    AnswerKind(
        id="exact", phrase="is the merge, bit for bit", summary="The model is the merge, bit for bit.", is_good=True
    ),
    AnswerKind(
        id=ATTESTED,
        phrase="has exactly the files that the attestation lists",
        summary="The owner of the key attests exactly these files.",
        is_good=True,
    ),
)

ANSWERS: Mapping[str, AnswerKind] = MappingProxyType({row.id: row for row in _ROWS})
"""Every kind by its id."""

_NEVER_ALLOWED = {ATTESTATION, BROKEN_FILES, OTHER_ARCHITECTURE, "wrong-base"}
ALLOWED = tuple(row.id for row in _ROWS if not row.is_good and row.id not in _NEVER_ALLOWED)
"""The kinds that `--allow` accepts. A bad attestation is not accepted, and no model whose tensors were not compared.

With another base, every value may differ, so nothing would be compared either."""


def finding(
    kind: str, message: str, *, tensor: str | None = None, measured: tuple[tuple[str, float], ...] = (), hint: str = ""
) -> Finding:
    """A finding of a kind. A good kind is a note, any other one an error."""
    row = ANSWERS[kind]
    return Finding(
        check=kind,
        severity=Severity.NOTE if row.is_good else Severity.ERROR,
        message=message,
        hint=hint or row.hint,
        tensor=tensor,
        origin=Origin.MODEL,
        measured=tuple((name, figure) for name, figure in measured if math.isfinite(figure)),
    )


def note(kind: str, message: str) -> Finding:
    """A fact of a kind that needs no action."""
    return replace(finding(kind, message), severity=Severity.NOTE, hint="")
