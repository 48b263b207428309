"""README.md of a published directory: a model card that describes the model and the checks.

In: a `Manifest`, whose names come from strangers. Out: Markdown with YAML in front. Everything in it follows from the
manifest, so that a rebuild makes the same bytes.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from merge_gate.publish.manifest import digest_on_card, render
from merge_gate.records.terms import PRESERVE
from merge_gate.report.wording.markdown import code
from merge_gate.text import counted

if TYPE_CHECKING:
    from merge_gate.records.publication import Manifest

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def model_card(manifest: Manifest) -> bytes:
    """The bytes of the model card."""
    return f"{_front(manifest)}\n{_text(manifest)}".encode()


def _front(manifest: Manifest) -> str:
    """The metadata that the Hub reads. A local path is no base model there."""
    lines = ["---", "library_name: transformers", "tags: [merge-gate, peft]"]
    if _HUB_ID.fullmatch(manifest.base.model) and manifest.base.revision:
        lines += [f"base_model: {json.dumps(manifest.base.model)}", "base_model_relation: merge"]
    return "\n".join([*lines, "---", ""])


def _text(manifest: Manifest) -> str:
    base = manifest.base
    rows = [("base", _named(base.model, base.revision))]
    rows += [("adapter", _named(adapter.source, adapter.revision)) for adapter in manifest.adapters]
    if manifest.combination is not None:
        rows.append(("combination", code(manifest.combination.method)))
    rows += [
        ("method", code(manifest.peft_type or "unknown")),
        (
            "dtype",
            "as in the base" if manifest.dtype == PRESERVE else f"all floating tensors cast to {code(manifest.dtype)}",
        ),
        ("checks", f"passed; all {counted(manifest.parameters, 'parameter')} of the merged model checked"),
        ("warnings", ", ".join(map(code, manifest.warnings)) or "none"),
    ]
    if manifest.checks:
        rows.append(("changed checks", ", ".join(map(code, manifest.checks))))
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f"""# {code(manifest.name)}, merged into its base

merge-gate merged this adapter into its base, checked every parameter of the result, and wrote the tensors that it
checked. All other tensors are copies of the base's.

{table}

`merge-gate.json` has the digests of all files, of the base, and of the adapter. `merge-gate verify` compares this
directory with them, and `merge-gate rebuild merge-gate.json --output DIR` makes the same files again.

The SHA-256 of `merge-gate.json` without the entry of this card is `{digest_on_card(render(manifest))}`.
"""


def _named(name: str, revision: str | None) -> str:
    return f"{code(name)} at {code(revision)}" if revision else code(name)
