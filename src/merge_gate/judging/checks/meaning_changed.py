"""Today's PEFT merges the adapter differently from the release that saved it.

**Fires when** the PEFT release that saved the adapter merges it differently than today's PEFT. These cases are known
([others](../reference/methods.md#old-releases) pass, or fire other checks):

- LoKr saved before 0.14;
- `lora_bias` before 0.16;
- DoRA on an embedding before 0.16;
- OFT's Cayley-Neumann series before 0.18;
- `pissa` or `olora` before 0.7;
- LoRA on a convolution before 0.6.

The gate finds the release by `peft_version`, or by the keys that the config has or lacks.

```text
adapter_config.json was written by PEFT 0.15, and PEFT scales the bias of lora_B since 0.16: today's merge adds 2 times
as much of it
```

**Why it matters.** The model that you evaluated then is not the model that you merge now, and PEFT does not warn.

**What to do.** Find out which release the adapter was evaluated with. Merge with that release, or evaluate again.

**It happened.**

- [peft#2486](https://github.com/huggingface/peft/issues/2486),
  [peft#2489](https://github.com/huggingface/peft/pull/2489): the bias of `lora_B` was merged without its scaling. The
  second link is the fix.
- [peft#2180](https://github.com/huggingface/peft/pull/2180): the scale of LoKr was wrong. Older adapters now merge
  differently.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import foreign
from merge_gate.judging.checks.check import WARNING, Check, FileCase, Symptom
from merge_gate.judging.peft_releases import Span, written_by
from merge_gate.records.files import AdapterConfig, StoredTensor
from merge_gate.records.terms import Finding, Origin, record


@Check("meaning-changed", WARNING, Origin.CONFIG, Symptom.UNTRAINED_MERGE, blame=260, page=__doc__).on_files
def meaning_changed(case: FileCase) -> Iterator[Finding]:
    for change, span in changes(case.files.config, case.files.tensors):
        yield meaning_changed.finding(
            f"adapter_config.json was written by {span}, and {change.effect}",
            change.hint
            or f"compare the merged model with a merge by PEFT before 0.{change.release}; if the adapter was evaluated "
            "with that release, merge with it",
        )


@record
class MeaningChange:
    """A value that PEFT reads differently since `release` (a minor number); `first` is the first release that wrote it.

    `hint` is set if a merge with an older release does not restore the old meaning.
    """

    name: str
    first: int
    release: int
    effect: str
    hint: str = ""


def changes(config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> Iterator[tuple[MeaningChange, Span]]:
    """The changes that affect an adapter, whichever release in its span wrote it."""
    span = written_by(config)
    for change in _all_changes(config, tensors):
        if change.first <= span.newest < change.release:
            yield change, span


def _all_changes(config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> Iterator[MeaningChange]:
    """The changes of every release. Each was verified by running it (docs/reference/methods.md, "Old releases")."""
    match config.peft_type:
        case "LOKR" if (ratio := _ratio(config, config.alpha)) is not None:
            effect = f"PEFT scales LoKr's delta by alpha / r since 0.14: today's merge adds {ratio:g} times as much"
            yield MeaningChange(name="lokr-scale", first=6, release=14, effect=effect)
        case "OFT" if config.use_cayley_neumann:
            effect = "since PEFT 0.18 the last term of OFT's Cayley-Neumann series is halved"
            yield MeaningChange(name="oft-series", first=16, release=18, effect=effect)
        case "LORA":
            yield from _of_lora(config, tensors)


def _of_lora(config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> Iterator[MeaningChange]:
    if config.lora_bias and (ratio := _ratio(config, config.lora_alpha)) is not None:
        effect = f"PEFT scales the bias of lora_B since 0.16: today's merge adds {ratio:g} times as much of it"
        yield MeaningChange(name="lora-bias-scale", first=14, release=16, effect=effect)
    if config.use_dora and any(".lora_embedding_A" in tensor.name for tensor in tensors):
        effect = "since PEFT 0.16 a merge of DoRA on an embedding includes the magnitude, which that release omitted"
        yield MeaningChange(name="dora-embedding", first=13, release=16, effect=effect)
    scheme = config.init_lora_weights
    if scheme is not None and scheme.startswith(("pissa", "olora")):
        effect = (
            f"PEFT ignored init_lora_weights={foreign(scheme)} up to 0.6: today's PEFT subtracts a part of the base "
            "for it"
        )
        yield MeaningChange(name="old-initialization", first=0, release=7, effect=effect)
    if any(".lora_A" in tensor.name and len(tensor.shape) == 4 for tensor in tensors):  # noqa: PLR2004 - a convolution
        effect = (
            "until PEFT 0.6, LoRA added a random bias to a convolution that had none, trained it, and did not save it"
        )
        hint = "compare outputs of the merged model with those of the evaluation, and train it again if they differ"
        yield MeaningChange(name="lora-convolution", first=4, release=6, effect=effect, hint=hint)


def _ratio(config: AdapterConfig, alpha: float | None) -> float | None:
    """Alpha / r, or None if it is 1 or unknown."""
    if alpha is None or not config.r:
        return None
    ratio = alpha / (config.r**0.5 if config.use_rslora else config.r)
    return ratio if ratio != 1 else None
