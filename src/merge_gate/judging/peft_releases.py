"""Finds the PEFT releases that can have written a config.

In: an adapter's config. Out: a `Span` of releases (docs/reference/methods.md, "Old releases").
"""

# A release is its minor number: 0.10.0 and 0.10.1 are 10. Since 0.18 PEFT writes `peft_version`. Older releases follow
# from the keys: PEFT writes every key that it has, so a present or absent key bounds the release.

from __future__ import annotations

import re

from merge_gate.records.files import AdapterConfig
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
