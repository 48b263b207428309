"""Tensors that the adapter's configuration promises are not in its file.

**Fires when** tensors that the config promises for this base are not in the file.

```text
1 tensor that adapter_config.json promises is not in the file, so PEFT would merge newly initialized values instead:
base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight
```

**Why it matters.** PEFT only warns, and for missing biases it does not even warn. It then merges initial values: no
change for most methods, and random weights for some. For a missing bias, the base's bias stays. PEFT 0.10 to 0.20
trained biases with `bias: lora_only` and lost them on saving. PEFT 0.7 to 0.9 never trained them, so nothing is missing
there.

**What to do.** Save the adapter again with `save_pretrained` and upload all files. If names have a foreign prefix
(`_orig_mod.` from `torch.compile`, `module.` from DDP), the wrapper was saved: unwrap the model first. If tensors are
empty, ZeRO-3 or FSDP parameters were not gathered when the adapter was saved.

**It happened.**

- [transformers#38927](https://github.com/huggingface/transformers/issues/38927): transformers 4.50 to 4.52 renamed the
  layers of Gemma 3. Old adapters lost every tensor, with only a warning.
- [MakazhanAlpamys/Soup#335](https://github.com/MakazhanAlpamys/Soup/issues/335): an adapter of a compiled model was
  saved with `_orig_mod.` in each name. The training exited with 0, and after loading all 96 `lora_B` were zero.
- [vllm-project/vllm#34186](https://github.com/vllm-project/vllm/issues/34186): the names had a different prefix than
  the server expected. It gave the base's answers without a warning, and still did half a year later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import listing
from merge_gate.judging import key_hints
from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import NAMES, are, tensors
from merge_gate.judging.peft_releases import written_by
from merge_gate.records.files import AdapterConfig
from merge_gate.records.measured import Evidence
from merge_gate.records.terms import Finding, Origin


# PEFT may load such an adapter: what is not in the file can do nothing, and the load compares names again.
@Check(
    "keys-missing", ERROR, Origin.ADAPTER, Symptom.TENSORS_LOST, blame=100, page=__doc__, allows_loading=True
).on_merge
def keys_missing(case: MergeCase) -> Iterator[Finding]:
    evidence, missing = case.evidence, case.evidence.missing
    words = _lost_on_loading(evidence) if evidence.dropped else _not_in_the_file(case, missing)
    if missing and words is not None:
        yield keys_missing.finding(
            *words,
            module=module_of(missing[0]),
            tensor=missing[0],
            missing=len(missing),
        )


def _not_in_the_file(case: MergeCase, missing: tuple[str, ...]) -> tuple[str, str] | None:
    """None if nothing was lost."""
    follows, hint = missing_words(case.files.config, missing)
    if not follows:
        return None
    what = f"{tensors(missing)} that adapter_config.json promises {are(missing)} not in the file"
    return (
        f"{what}, so {follows}: {listing(missing, NAMES)}"
        if follows == _FRESH
        else f"{what}: {listing(missing, NAMES)}; {follows}",
        key_hints.names_of_another_kind(case.files.tensors)
        or key_hints.of_another_model(missing, case.evidence.unexpected)
        or hint,
    )


_SAVE_ALL = "save the adapter again with save_pretrained and upload all of it"

_FRESH = "PEFT would merge newly initialized values instead"

_BASE_STAYS = "the merged model would keep the base's biases"

_LAST_WITHOUT_BASE_LAYER, _FIRST_TRAINED, _FIRST_SAVED = 6, 10, 21
"""Minor numbers of the PEFT releases that changed how biases are saved (docs/reference/methods.md, "Old releases")."""


def missing_words(config: AdapterConfig, missing: Sequence[str]) -> tuple[str, str]:
    """What the merge would do without the tensors, and the hint. Both are empty if the biases were never trained."""
    if not all(name.endswith(".base_layer.bias") for name in missing):
        return _FRESH, f"{_SAVE_ALL}; if names have a wrapper's prefix (_orig_mod., module.), unwrap the model first"
    span = written_by(config)
    if span.newest <= _LAST_WITHOUT_BASE_LAYER:
        follows = f"{span} wrote these trained biases without base_layer in their names, which PEFT drops since 0.7"
        return follows, "rename them in the file: q_proj.bias becomes q_proj.base_layer.bias, and so on"
    if config.bias != "lora_only" or span.oldest >= _FIRST_SAVED:
        return _BASE_STAYS, _SAVE_ALL
    if span.newest < _FIRST_TRAINED:  # 0.7 to 0.9 never trained them
        return "", ""
    hint = (
        "that release would lose them again: save with PEFT 0.21 or newer while the trained model is in memory, or "
        "train again with bias: none or all"
    )
    return f"{_BASE_STAYS}: PEFT 0.10 to 0.20 train them with bias='lora_only' and lose them on saving", hint


def _lost_on_loading(evidence: Evidence) -> tuple[str, str]:
    missing, dropped = evidence.missing, evidence.dropped
    which_are = "it is" if len(missing) == 1 else f"{len(dropped):,} of them {are(dropped)}"
    return (
        (
            f"{tensors(missing)} that adapter_config.json promises did not arrive in the model: "
            f"{listing(missing, NAMES)}; {which_are} in the file, and PEFT loses "
            f"{'it' if len(missing) == 1 else 'them'} on loading"
        ),
        (
            "this release of PEFT renames the tensors of this architecture so that they match nothing: gate and serve "
            "the adapter with releases of PEFT and transformers that load it"
        ),
    )


def tensors_missing(names: tuple[str, ...], trained_whole: str | None = None) -> Finding:
    """The file lacks tensors that PEFT loads; `trained_whole` is modules_to_save, if these tensors are its modules."""
    return keys_missing.finding(
        f"adapter_config.json promises fully trained modules (modules_to_save {trained_whole} or trainable tokens), "
        f"but the file lacks {listing(names, 6)}"
        if trained_whole
        else f"the file lacks {listing(names, 6)}, which adapter_config.json promises",
        "save the adapter again with save_pretrained, and check that the upload was complete",
        tensor=names[0],
    )


REFUSALS = (tensors_missing,)
