"""Which releases of PEFT can have written a config, and what has changed its meaning since.

In: an adapter's config, and the tensors of the file. Out: a `Span` of releases; the `Change`s that concern
this adapter. Plain Python; what each row says was run with those releases (docs/methods.md, "Old releases").

Releases are counted by their minor number: 0.10.0 and 0.10.1 are 10. From 0.18 on PEFT writes `peft_version`. Before
that the keys tell: PEFT writes every key that it knows, so a key that is there, or is not, bounds the release.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from merge_gate.records.files import AdapterConfig, TensorHeader
from merge_gate.records.terms import record

NEWEST = 99
"""Stands for a release that nothing bounds."""

_ALWAYS = {"base_model_name_or_path", "inference_mode", "peft_type", "task_type"}
"""What every release writes: a config that lacks one of them was written by something else, and tells no release."""

_KEYS = {"exclude_modules": 14, "peft_version": 18}
_LORA_KEYS = {
    "init_lora_weights": 3, "layers_to_transform": 4, "alpha_pattern": 6, "megatron_core": 7, "use_rslora": 8,
    "use_dora": 9, "layer_replication": 10, "lora_bias": 14, "corda_config": 15, "use_qalora": 16,
    "target_parameters": 17, "use_bdlora": 19, "velora_config": 20, "kasa_config": 21,
}  # fmt: skip
_KEYS_OF = {"LORA": _LORA_KEYS, "OFT": {"use_cayley_neumann": 16}}
"""The release that brought a key: for tuners of every type, and for one."""

_VERSION = re.compile(r"0\.(\d{1,3})\.\d")


@record
class Span:
    """Minor numbers of the oldest and the newest release that can have written a config."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        if self.oldest == self.newest:
            return f"PEFT 0.{self.oldest}"
        if self.newest == NEWEST:
            return f"PEFT 0.{self.oldest} or newer" if self.oldest else "PEFT"
        return f"PEFT 0.{self.oldest} to 0.{self.newest}" if self.oldest else f"PEFT up to 0.{self.newest}"


def written_by(config: AdapterConfig) -> Span:
    """The releases that can have written this config, as far as it tells."""
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
    """Something that PEFT reads otherwise since `release` (a minor number).

    `concerns` looks at the config and the tensors, and gives how it shows there, or None. `hint` is for what
    merging with an older release does not bring back.
    """

    name: str
    peft_type: str
    release: int
    first: int
    concerns: Callable[[AdapterConfig, tuple[TensorHeader, ...]], str | None]
    hint: str = ""


def changes(config: AdapterConfig, tensors: tuple[TensorHeader, ...]) -> tuple[tuple[MeaningChange, str, Span], ...]:
    """The rows that concern an adapter which every release that can have written it read otherwise than today's."""
    span = written_by(config)
    found = []
    for change in CHANGES:
        if change.peft_type == config.peft_type and change.first <= span.newest < change.release:
            words = change.concerns(config, tensors)
            if words is not None:
                found.append((change, words, span))
    return tuple(found)


def _ratio(config: AdapterConfig, alpha: float | None) -> float | None:
    """Alpha / r, or None where that is 1 or not to be told."""
    if alpha is None or not config.r:
        return None
    ratio = alpha / (config.r**0.5 if config.use_rslora else config.r)
    return ratio if ratio != 1 else None


def _lokr_scale(config: AdapterConfig, _tensors: tuple[TensorHeader, ...]) -> str | None:
    ratio = _ratio(config, config.alpha)
    if ratio is None:
        return None
    return f"LoKr's delta is scaled by alpha / r since PEFT 0.14: today's merge adds {ratio:g} times as much"


def _lora_bias_scale(config: AdapterConfig, _tensors: tuple[TensorHeader, ...]) -> str | None:
    ratio = _ratio(config, config.lora_alpha)
    if not config.lora_bias or ratio is None:
        return None
    return f"the bias of lora_B is scaled since PEFT 0.16: today's merge adds {ratio:g} times as much of it"


def _dora_embedding(config: AdapterConfig, tensors: tuple[TensorHeader, ...]) -> str | None:
    if not config.use_dora or not any(".lora_embedding_A" in tensor.name for tensor in tensors):
        return None
    return "merging DoRA on an embedding takes in the magnitude since PEFT 0.16: that release left it out"


def _oft_series(config: AdapterConfig, _tensors: tuple[TensorHeader, ...]) -> str | None:
    if not config.use_cayley_neumann:
        return None
    return "the last term of OFT's Cayley-Neumann series counts half since PEFT 0.18"


def _old_initialisation(config: AdapterConfig, _tensors: tuple[TensorHeader, ...]) -> str | None:
    scheme = config.init_lora_weights
    if scheme is None or not scheme.startswith(("pissa", "olora")):
        return None
    return (
        f"init_lora_weights={scheme!r} meant nothing up to PEFT 0.6: today's PEFT takes a part of the base out for it"
    )


def _convolution(_config: AdapterConfig, tensors: tuple[TensorHeader, ...]) -> str | None:
    if not any(".lora_A" in tensor.name and len(tensor.shape) == 4 for tensor in tensors):  # noqa: PLR2004
        return None
    return "until PEFT 0.6 LoRA gave a convolution without a bias a random one, trained beside it, and did not save it"


CHANGES = (
    MeaningChange(name="lokr-scale", peft_type="LOKR", first=6, release=14, concerns=_lokr_scale),
    MeaningChange(name="lora-bias-scale", peft_type="LORA", first=14, release=16, concerns=_lora_bias_scale),
    MeaningChange(name="dora-embedding", peft_type="LORA", first=13, release=16, concerns=_dora_embedding),
    MeaningChange(name="oft-series", peft_type="OFT", first=16, release=18, concerns=_oft_series),
    MeaningChange(name="old-initialisation", peft_type="LORA", first=0, release=7, concerns=_old_initialisation),
    MeaningChange(
        name="lora-convolution",
        peft_type="LORA",
        first=4,
        release=6,
        concerns=_convolution,
        hint="compare outputs of the merged model with those of the evaluation, and train it again if they differ",
    ),
)
