"""PEFT's own merges, made wrong in fifteen ways, in every call or only in the one that ships."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft.tuners import ia3, lora
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor

from tests.support import methods

MERGING = (
    lora.layer.Linear, lora.layer.ParamWrapper, lora.layer._ConvNd, ia3.layer.Linear, ia3.layer._ConvNd, LycorisLayer,
)  # fmt: skip
"""PEFT's classes that have a merge of their own, for the methods below."""

Key = tuple[torch.Size, float]


@dataclass
class Merge:
    """One merge by PEFT. `number` counts the weights in the order in which PEFT met each first."""

    layer: Any
    before: Tensor
    after: Tensor
    number: int
    first: Tensor
    """PEFT's change of the first weight."""

    @property
    def delta(self) -> Tensor:
        return self.after - self.before

    def by(self, factor: float) -> Tensor:
        return self.before + factor * self.delta

    def with_delta(self, delta: Tensor) -> Tensor | None:
        return self.before + delta if delta.shape == self.delta.shape else None


def without_the_last_rank(merge: Merge) -> Tensor | None:
    if not hasattr(merge.layer, "lora_A") or merge.layer.lora_variant:
        return None
    delta = merge.delta.float().flatten(1) if merge.delta.dim() != 3 else merge.delta.float()
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    sizes[..., merge.layer.r["default"] - 1] = 0
    return merge.before + (left @ (sizes[..., None] * right)).view(merge.delta.shape).to(merge.delta.dtype)


def as_lora(merge: Merge) -> Tensor | None:
    if not getattr(merge.layer, "lora_variant", None):
        return None
    return merge.before + merge.layer.get_delta_weight("default").to(merge.before.dtype)


def one_value(merge: Merge, value: float) -> Tensor:
    wrong = merge.after.clone()
    wrong.view(-1)[wrong.numel() // 3] = value
    return wrong


def largest(merge: Merge) -> float:
    return 10 * float(merge.before.abs().max())


def transposed(merge: Merge) -> Tensor | None:
    return merge.with_delta(merge.delta.transpose(0, 1)) if merge.delta.dim() == 2 else None


Way = Callable[[Merge], Tensor | None]
WAYS: dict[str, Way] = {
    "not merged": lambda merge: merge.before,
    "one layer not merged": lambda merge: merge.before if merge.number == 0 else merge.after,
    "half not merged": lambda merge: merge.before if merge.number % 2 == 0 else merge.after,
    "alpha doubled": lambda merge: merge.by(2),
    "alpha 10 % off": lambda merge: merge.by(1.1),
    "scaled by the root of the rank": lambda merge: merge.by(1 / math.sqrt(4)),
    "wrong sign": lambda merge: merge.by(-1),
    "transposed": transposed,
    "one layer transposed": lambda merge: transposed(merge) if merge.number == 0 else merge.after,
    "rows swapped": lambda merge: merge.before + merge.delta.roll(1, 0),
    "layers swapped": lambda merge: merge.with_delta(merge.first.roll(1, -1)),
    "smallest rank dropped": without_the_last_rank,
    "DoRA as LoRA": as_lora,
    "one value wrong": lambda merge: one_value(merge, largest(merge)) if merge.number == 0 else merge.after,
    "one NaN": lambda merge: one_value(merge, math.nan) if merge.number == 0 else merge.after,
}
"""From what PEFT made of a weight to what a broken PEFT would make of it; None if that cannot be."""


@dataclass
class Fault:
    """PEFT's merges, each followed by `way`. `broken` has the weights that differ from PEFT's.

    `hits` says of a dtype and a value of `safe_merge` whether that merge is made wrong.
    """

    way: Way
    hits: Callable[[torch.dtype, bool], bool] = lambda _dtype, _safe: True
    met: dict[Key, int] = field(default_factory=dict)
    broken: list[Key] = field(default_factory=list)
    first: Tensor | None = None

    @contextlib.contextmanager
    def made(self, *kinds: Any) -> Iterator[None]:
        """Classes of PEFT, by default all, make the fault."""
        with pytest.MonkeyPatch.context() as patched:
            for kind in kinds or MERGING:
                patched.setattr(kind, "merge", self._wrapped(kind.merge))
            yield

    def _wrapped(self, merge: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(merge)
        def broken(layer: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
            weight = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
            if not self.hits(weight.dtype, safe_merge):
                merge(layer, safe_merge, adapter_names)
                return
            before = weight.data.clone()
            merge(layer, safe_merge, adapter_names)
            number = self.met.setdefault(key_of(before), len(self.met))
            if self.first is None:
                self.first = weight.data - before
            wrong = self.way(Merge(layer, before, weight.data, number, self.first.to(before.dtype)))
            if wrong is not None and not torch.equal(wrong, weight.data):
                self.broken.append(key_of(before))
                weight.data = wrong

        return broken


def key_of(values: Tensor) -> Key:
    return values.shape, float(values.double().sum())


ALL = ["q_proj", "v_proj", "o_proj"]
TARGETS = {
    "llama": ALL, "t5": ["q", "v", "o"], "bert": ["query", "value"], "xlm-roberta": ["query", "value"],
    "qwen2-moe": ALL, "siglip": ["q_proj", "v_proj"], "wav2vec2": ["q_proj", "v_proj"], "resnet": ["convolution"],
    "mixtral": ALL, "gpt2": ["c_attn", "c_proj"],
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "lokr": ("LoKrConfig", {"r": 4}),
}
PAIRS = [(base, method) for base in TARGETS for method in METHODS if (base, method) != ("gpt2", "lokr")]
"""PEFT has no LoKr for Conv1D."""


def case_of(base: str, method: str) -> methods.Case:
    kind, settings = METHODS[method]
    conv1d = {"fan_in_fan_out": True} if base == "gpt2" else {}
    experts = {"target_parameters": methods.EXPERTS} if (base, method) == ("mixtral", "lora") else {}
    return methods.make_case(
        f"{base}-{method}", base, kind, target_modules=TARGETS[base], **settings, **conv1d, **experts
    )
