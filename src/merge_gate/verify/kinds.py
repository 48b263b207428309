"""The kinds of answers of `merge-gate verify`: id, sentence, and hint of each.

In: nothing. Out: `KINDS`, in the order in which they decide: the first kind that is found is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from merge_gate.records.terms import Finding, Origin, Severity, record


@record
class AnswerKind:
    """One answer. `is_good`: it does not fail the directory."""

    id: str
    summary: str
    hint: str = ""
    is_good: bool = False


_MERGE_AGAIN = "merge again with PEFT's merge_and_unload(safe_merge=True)"
_SAVE_AGAIN = "copy the base's own files, and replace only the tensors that the merge changes"

ATTESTATION, ATTESTED = "attestation", "attested"

_ROWS = (
    AnswerKind(
        id=ATTESTATION,
        summary="The attestation is not of this directory, or of another signer, verdict, or base, or too old.",
        hint="use the attestation that was made of this directory, and the public key of its signer",
    ),
    AnswerKind(
        id="broken-files",
        summary="The directory's weight files are incomplete, contradict each other, or cannot be loaded.",
        hint="export the model again, and copy it as a whole",
    ),
    AnswerKind(id="nonfinite", summary="Values are NaN or Inf that are finite in the merge.", hint=_MERGE_AGAIN),
    AnswerKind(
        id="wrong-base",
        summary="The adapter was merged into another base: a quantized copy, or another revision.",
        hint="merge into the base that the adapter was trained on, at the same revision, not quantized",
    ),
    AnswerKind(
        id="other-candidate",
        summary="It is the merge of another adapter.",
        hint="merge the right adapter, or name this one with --adapter",
    ),
    AnswerKind(
        id="not-applied",
        summary="The adapter was not applied: the tensors are those of the base.",
        hint="check that the export loads the adapter and merges it before it saves",
    ),
    AnswerKind(
        id="applied-twice",
        summary="The adapter's delta is in it twice.",
        hint="merge into the original base: this one held the delta before, or the scaling was doubled",
    ),
    AnswerKind(
        id="other-strength",
        summary="The adapter was applied at another strength.",
        hint="scale by lora_alpha / r, or lora_alpha / √r with use_rslora, as adapter_config.json says",
    ),
    AnswerKind(
        id="applied-in-part",
        summary="The adapter was applied to some layers only.",
        hint="check that the export matches every key of the adapter, and stops if one is left",
    ),
    AnswerKind(
        id="unexplained",
        summary="Merged tensors have values that no other kind explains.",
        hint="name other adapters with --candidate, and check base and revision",
    ),
    AnswerKind(
        id="imprecise",
        summary="The merge was computed with larger rounding errors than PEFT's.",
        hint="merge with float32 factors: load the adapter without autocast_adapter_dtype=False",
    ),
    AnswerKind(
        id="base-changed",
        summary="Tensors that the adapter does not touch differ from the base.",
        hint="copy the tensors that the adapter does not touch from the base",
    ),
    AnswerKind(
        id="shape-changed",
        summary="Tensors have another shape than in the merge.",
        hint="resize the embeddings as the adapter did, and nothing else",
    ),
    AnswerKind(
        id="not-carried",
        summary="The directory lacks tensors of the base.",
        hint=f"save_pretrained drops tensors that transformers does not load: {_SAVE_AGAIN}",
    ),
    AnswerKind(id="added", summary="The directory has tensors that the merge does not have.", hint=_SAVE_AGAIN),
    AnswerKind(
        id="renamed",
        summary="Tensors are stored under other names or in another layout than in the base.",
        hint="transformers loads both; if your server does too, pass --allow renamed",
    ),
    AnswerKind(
        id="tied",
        summary="Tensors are tied that the base does not tie, or no longer tied.",
        hint="keep tie_word_embeddings in config.json and the stored tensors as in the base",
    ),
    AnswerKind(
        id="stale-shards",
        summary="The directory has weight files that transformers does not load.",
        hint="remove the files that the index does not name: other programs may load them",
    ),
    AnswerKind(
        id="ghost-index",
        summary="The index and the weight files list different tensors.",
        hint="write the index again from the headers of the weight files",
    ),
    AnswerKind(
        id="dtype-changed",
        summary="Tensors are stored in another dtype than in the base.",
        hint="if the cast is intended, pass --allow dtype-changed",
    ),
    AnswerKind(
        id="config-differs",
        summary="config.json describes another model than the base's.",
        hint="copy config.json from the base",
    ),
    AnswerKind(
        id="tokenizer-differs",
        summary="The tokenizer differs from the adapter's own, or from the base's if the adapter has none.",
        hint="copy the tokenizer's files from the adapter, or from the base if the adapter has none",
    ),
    AnswerKind(
        id="chat-template-differs",
        summary="The chat template differs from the adapter's own, or from the base's if the adapter has none.",
        hint="copy the chat template from the adapter, or from the base if the adapter has none",
    ),
    AnswerKind(
        id="stop-tokens-differ",
        summary="The tokens that end a text differ from those of the adapter or base.",
        hint="copy generation_config.json from the base, and eos_token from the tokenizer of the adapter",
    ),
    AnswerKind(
        id="file-changed",
        summary="Files differ from the digests in merge-gate.json.",
        hint="publish again; if the change is intended, compare with --base and --adapter",
    ),
    AnswerKind(
        id="as-published",
        summary="Every file has the digest in merge-gate.json. That file is not signed.",
        is_good=True,
    ),
    AnswerKind(
        id="other-order",
        summary="It is the merge, in PEFT's other order of rounding (merge_and_unload without safe_merge).",
        is_good=True,
    ),
    AnswerKind(id="rounding", summary="It is the merge, equal within one rounding of the dtype.", is_good=True),
    AnswerKind(id="exact", summary="It is the merge, bit for bit.", is_good=True),
    AnswerKind(id=ATTESTED, summary="The owner of the key attests exactly these files.", is_good=True),
)

KINDS: Mapping[str, AnswerKind] = MappingProxyType({row.id: row for row in _ROWS})
"""Every kind by its id."""

ALLOWED = tuple(row.id for row in _ROWS if not row.is_good and row.id != ATTESTATION)
"""The kinds that `--allow` accepts."""


def finding(
    kind: str, message: str, *, tensor: str | None = None, measured: tuple[tuple[str, float], ...] = (), hint: str = ""
) -> Finding:
    """A finding of a kind. A good kind is a note, any other one an error."""
    row = KINDS[kind]
    return Finding(
        check=kind,
        severity=Severity.NOTE if row.is_good else Severity.ERROR,
        message=message,
        hint=hint or row.hint,
        tensor=tensor,
        origin=Origin.MERGE,
        measured=tuple((name, figure) for name, figure in measured if math.isfinite(figure)),
    )
