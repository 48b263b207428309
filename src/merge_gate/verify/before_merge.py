"""What the files alone say before anything is merged: a quantized model, or a model of another architecture.

In: the files of the finished directory and of the base, both hostile. Out: why nothing is compared, or a finding.
Imports no torch, and reads no values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate.files.json_object import read_as_transformers
from merge_gate.judging.answer_kinds import finding
from merge_gate.records.files import BaseFiles
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Finding, Origin
from merge_gate.text import counted, listing, quoted

MOST_BYTES = 20_000_000
SHARE_OF_ANOTHER = 0.5
"""If more of the base's tensors than this share are absent or have another shape, the model is another one."""

_SIZES = (
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
_LISTED = 5


def quantized(base: BaseFiles, merged: BaseFiles, *, base_name: str, merged_name: str) -> NotJudged | None:
    """Why two models are not compared: one of them is stored quantized. None if none is."""
    if base.quantization is not None and base.quantization.is_read:
        original = f"--base {quoted(base.original, 120)}" if base.original else "the original base with --base"
        return NotJudged(
            message=f"the base {quoted(base_name, 200)} is stored quantized ({_method(base)}), and a merge into it is "
            "not compared",
            hint=f"name {original}: the base of the merge, before it was quantized",
            origin=Origin.BASE,
        )
    is_whole = all(one.check == "base-format" for one in merged.findings)
    if merged.quantization is not None and merged.quantization.is_read and is_whole:
        return NotJudged(
            message=f"the model {quoted(merged_name, 200)} is stored quantized ({_method(merged)}), so its values are "
            "not the values of the merge",
            hint="verify the merged model before it is quantized",
            origin=Origin.MODEL,
        )
    return None


def _method(files: BaseFiles) -> str:
    declared = files.quantization
    return quoted(declared.method or "of an unknown method", 60, "") if declared is not None else ""


def architecture_finding(base: BaseFiles, merged: BaseFiles) -> Finding | None:
    """The finding on a model of another architecture or size than the base; None if they are alike.

    config.json must say so, and most stored tensors must agree: a changed config.json alone is a smaller difference.
    """
    other = list(_differences(_config(base), _config(merged)))
    shapes = {one.name: one.shape for one in merged.tensors}
    odd = [one for one in base.tensors if shapes.get(one.name) != one.shape]
    if not other or len(odd) <= SHARE_OF_ANOTHER * len(base.tensors):
        return None
    settings = [f"{key} {quoted(str(new), 60)}, expected {quoted(str(old), 60)}" for key, old, new in other]
    shown = listing(settings, _LISTED)
    return finding(
        "other-architecture",
        f"config.json has {shown} as in the base, and {len(odd):,} of {counted(len(base.tensors), 'tensor')} of the "
        "base are not there in their shape",
        tensors=len(odd),
    )


def _config(files: BaseFiles) -> Mapping[str, Any]:
    return read_as_transformers(Path(files.directory, "config.json"), MOST_BYTES) or {}


def _differences(base: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    if base.get("model_type") != merged.get("model_type"):
        yield "model_type", base.get("model_type"), merged.get("model_type")
    inner = [part if isinstance(part := one.get("text_config"), dict) else {} for one in (base, merged)]
    for key in _SIZES:
        old, new = (part.get(key, one.get(key)) for part, one in zip(inner, (base, merged), strict=True))
        if old != new and old is not None and new is not None:
            yield key, old, new
