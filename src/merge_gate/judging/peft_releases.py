"""Finds the PEFT releases that can have written a config, and later changes of its meaning.

In: an adapter's config and the tensors of its file. Out: a `Span` of releases, and the `MeaningChange`s that affect the
adapter; each was verified by running those releases (docs/evidence/methods.md, "Old releases").
"""

# A release is its minor number: 0.10.0 and 0.10.1 are 10. Since 0.18 PEFT writes `peft_version`. Older releases follow
# from the keys: PEFT writes every key that it has, so a present or absent key bounds the release.

from __future__ import annotations

import re
from collections.abc import Callable

from merge_gate.records.files import AdapterConfig, StoredTensor
from merge_gate.records.terms import record

NEWEST = 99
"""The upper end of a span without a bound."""

_ALWAYS = {"base_model_name_or_path", "inference_mode", "peft_type", "task_type"}
"""Keys that every release writes. If one is absent, another program wrote the config, and its release is unknown."""

_KEYS = {"exclude_modules": 14, "peft_version": 18}
_LORA_KEYS = {
    "init_lora_weights": 3, "layers_to_transform": 4, "alpha_pattern": 6, "megatron_core": 7, "use_rslora": 8,
    "use_dora": 9, "layer_replication": 10, "lora_bias": 14, "corda_config": 15, "use_qalora": 16,
    "target_parameters": 17, "use_bdlora": 19, "velora_config": 20, "kasa_config": 21,
}  # fmt: skip
_KEYS_OF = {"LORA": _LORA_KEYS, "OFT": {"use_cayley_neumann": 16}}
"""The release that added a key: for every PEFT type, and for one type."""

_VERSION = re.compile(r"0\.(\d{1,3})\.\d")


@record
class Span:
    """The minor numbers of the oldest and the newest release that can have written a config."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        if self.oldest == self.newest:
            return f"PEFT 0.{self.oldest}"
        if self.newest == NEWEST:
            return f"PEFT 0.{self.oldest} or newer" if self.oldest else "PEFT"
        return f"PEFT 0.{self.oldest} to 0.{self.newest}" if self.oldest else f"PEFT up to 0.{self.newest}"


def written_by(config: AdapterConfig) -> Span:
    """The releases that can have written this config."""
    if match := _VERSION.match(config.peft_version or ""):
        return Span(oldest=int(match[1]), newest=int(match[1]))
    if not config.keys >= _ALWAYS:
        return Span(oldest=0, newest=NEWEST)
    keys = _KEYS | _KEYS_OF.get(config.peft_type or "", {})
    oldest = max((release for key, release in keys.items() if key in config.keys), default=0)
    newest = min((release - 1 for key, release in keys.items() if key not in config.keys), default=NEWEST)
    return Span(oldest=oldest, newest=newest) if oldest <= newest else Span(oldest=0, newest=NEWEST)  # edited by hand


@record
class MeaningChange:
    """A value that PEFT reads differently since `release` (a minor number); `first` is the first release that wrote it.

    `concerns` describes the effect on an adapter with this config and these tensors, and returns None if there is
    none. `hint` is set if a merge with an older release does not restore the old meaning.
    """

    name: str
    peft_type: str
    release: int
    first: int
    concerns: Callable[[AdapterConfig, tuple[StoredTensor, ...]], str | None]
    hint: str = ""


def changes(config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> tuple[tuple[MeaningChange, str, Span], ...]:
    """The changes that affect an adapter, whichever release in its span wrote it."""
    span = written_by(config)
    affecting = []
    for change in CHANGES:
        if change.peft_type == config.peft_type and change.first <= span.newest < change.release:
            effect = change.concerns(config, tensors)
            if effect is not None:
                affecting.append((change, effect, span))
    return tuple(affecting)


def _ratio(config: AdapterConfig, alpha: float | None) -> float | None:
    """Alpha / r, or None if it is 1 or unknown."""
    if alpha is None or not config.r:
        return None
    ratio = alpha / (config.r**0.5 if config.use_rslora else config.r)
    return ratio if ratio != 1 else None


def _lokr_scale(config: AdapterConfig, _tensors: tuple[StoredTensor, ...]) -> str | None:
    ratio = _ratio(config, config.alpha)
    if ratio is None:
        return None
    return f"PEFT scales LoKr's delta by alpha / r since 0.14: today's merge adds {ratio:g} times as much"


def _lora_bias_scale(config: AdapterConfig, _tensors: tuple[StoredTensor, ...]) -> str | None:
    ratio = _ratio(config, config.lora_alpha)
    if not config.lora_bias or ratio is None:
        return None
    return f"PEFT scales the bias of lora_B since 0.16: today's merge adds {ratio:g} times as much of it"


def _dora_embedding(config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> str | None:
    if not config.use_dora or not any(".lora_embedding_A" in tensor.name for tensor in tensors):
        return None
    return "since PEFT 0.16 a merge of DoRA on an embedding includes the magnitude, which that release omitted"


def _oft_series(config: AdapterConfig, _tensors: tuple[StoredTensor, ...]) -> str | None:
    if not config.use_cayley_neumann:
        return None
    return "since PEFT 0.18 the last term of OFT's Cayley-Neumann series is halved"


def _old_initialization(config: AdapterConfig, _tensors: tuple[StoredTensor, ...]) -> str | None:
    scheme = config.init_lora_weights
    if scheme is None or not scheme.startswith(("pissa", "olora")):
        return None
    return f"PEFT ignored init_lora_weights={scheme!r} up to 0.6: today's PEFT subtracts a part of the base for it"


def _convolution(_config: AdapterConfig, tensors: tuple[StoredTensor, ...]) -> str | None:
    if not any(".lora_A" in tensor.name and len(tensor.shape) == 4 for tensor in tensors):  # noqa: PLR2004
        return None
    return "until PEFT 0.6, LoRA added a random bias to a convolution that had none, trained it, and did not save it"


CHANGES = (
    MeaningChange(name="lokr-scale", peft_type="LOKR", first=6, release=14, concerns=_lokr_scale),
    MeaningChange(name="lora-bias-scale", peft_type="LORA", first=14, release=16, concerns=_lora_bias_scale),
    MeaningChange(name="dora-embedding", peft_type="LORA", first=13, release=16, concerns=_dora_embedding),
    MeaningChange(name="oft-series", peft_type="OFT", first=16, release=18, concerns=_oft_series),
    MeaningChange(name="old-initialization", peft_type="LORA", first=0, release=7, concerns=_old_initialization),
    MeaningChange(
        name="lora-convolution",
        peft_type="LORA",
        first=4,
        release=6,
        concerns=_convolution,
        hint="compare outputs of the merged model with those of the evaluation, and train it again if they differ",
    ),
)
