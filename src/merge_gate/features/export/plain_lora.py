"""Makes a plain LoRA of an adapter: names, ranks, and scale. Or says why there is none.

In: adapter_config.json, the tensors, and the class that servers load. Out: a config and tensors that mean the same
everywhere. Nothing is read or written here, and nothing is approximated.

1. Pair the factors of each module, by its name in the served class.
2. Pad all ranks with zeros to a common one that servers support.
3. Keep a scale that all modules share as `lora_alpha / r`, or fold the scales into `lora_B`, in float32.
4. Add pairs of zeros where servers expect a module.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import NoPlainLoraError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX, module_of
from merge_gate._internal.text import listing, quoted
from merge_gate.judging.key_hints import WRAPPERS
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass
from merge_gate.records.terms import record

LEAST_RANK = 8
"""Servers have kernels for this rank, and for its double, and so on."""

_FACTOR = re.compile(r".*\.lora_(?P<kind>(?:embedding_)?)(?P<side>[AB])(\.default)?(\.weight)?")
_COPY = ".base_layer.weight"
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that servers fuse, so that they expect the factors of all of them."""

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""numpy has no bfloat16: its bits are those of an integer."""

_OF_FACTORS = ("F32", "F16", "BF16")
"""Folded factors are float32, which must not be less exact."""

_OFFER = "merge it, and serve the merged model: merge-gate run --publish DIR"
_CONVERT = (
    "convert it as PEFT does: save_pretrained with path_initial_model_for_weight_conversion; or publish its merge"
)
_CARRIED = ("base_model_name_or_path", "peft_version", "revision")
_OF_CLASS = ("auto_mapping", "task_type")
_PLAIN_KEYS = frozenset({
    *_CARRIED, *_OF_CLASS, "alpha_pattern", "bias", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "qalora_group_size", "r", "rank_pattern", "runtime_config",
    "target_modules", "use_rslora",
})  # fmt: skip
"""Keys that a plain LoRA expresses. Any other key that is set has an effect that it may not have: `use_dora`,
`modules_to_save`, `layer_replication`, and those of later releases."""

_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which PEFT leaves the base's weights as they are."""


@record
class Array:
    """A tensor: safetensors' name of its dtype, and its values. Those of bfloat16 are its bits."""

    dtype: str
    values: NDArray[Any]

    def as_float64(self) -> NDArray[np.float64]:
        bits = self.values
        return ((bits.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else bits).astype("<f8")


@record
class PlainLora:
    """An export: its config, its tensors, and modules that were added with factors of zeros.

    `bounds` has a number for each other module that no value of its delta exceeds.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    padding: tuple[str, ...]
    is_folded: bool
    bounds: Mapping[str, float]


def refuse(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> None:
    """Refuse a config or tensors that a plain LoRA cannot have.

    Raises:
        NoPlainLoraError: with the reason.
    """
    if config.get("peft_type") != "LORA":
        _refuse(f"it is {quoted(str(config.get('peft_type')))}, and not LoRA")
    if config.get("bias", "none") != "none":
        _refuse(f"it has biases of the base (bias: {quoted(str(config['bias']))})")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        _refuse(f"its base is not the one on disk (init_lora_weights: {quoted(str(init))})", _CONVERT)
    for key in sorted(key for key, value in config.items() if value and key not in _PLAIN_KEYS):
        _refuse(f"{quoted(key)} is {quoted(json.dumps(config[key]), 200, '')}, which a plain LoRA cannot express")
    for tensor in tensors:
        if not (_FACTOR.fullmatch(tensor.name) or tensor.name.endswith(_COPY)):
            _refuse(f"it has the tensor {quoted(tensor.name, 200)}, expected lora_A and lora_B only")
        if tensor.dtype not in _OF_FACTORS:
            _refuse(f"{quoted(tensor.name, 200)} has dtype {tensor.dtype}, expected {listing(_OF_FACTORS)}")


def _refuse(why: str, hint: str = _OFFER) -> NoReturn:
    raise NoPlainLoraError(f"no plain LoRA has the effect of this adapter: {why}", hint=hint)


def repaired_names(names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """The names of factors that differ from PEFT's by what a wrapper or a second prefix adds, each with PEFT's name.

    `stored` are the names of the base's tensors. A part of them is not one that a wrapper has added. If two tensors
    would have one name, none is repaired, and the gate says what is wrong.
    """
    names = list(names)
    parts = [part for part in (ADAPTER_PREFIX, *WRAPPERS) if not any(f".{part}" in f".{name}" for name in stored)]
    prefixes, renamed = re.compile(f"(?:{'|'.join(map(re.escape, parts))})*"), {}
    for name in filter(_FACTOR.fullmatch, names):
        rest = prefixes.sub("", name, count=1)
        for part in parts:  # of a layer that was wrapped by itself
            rest = rest.replace(f".{part}", ".") if part.startswith("_") else rest
        renamed[name] = ADAPTER_PREFIX + rest
    is_clear = len({renamed.get(name, name) for name in names}) == len(names)
    return {old: new for old, new in renamed.items() if old != new and is_clear}


def plain_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Array], served: ServedClass, *, fill: bool
) -> PlainLora:
    """The plain LoRA of an adapter that passed.

    Raises:
        NoPlainLoraError: the served class has no such module, the adapter has it twice, or changes the base as well.
    """
    # 1.
    if served.changed:
        _refuse(f"its copy of the base's {quoted(served.changed[0], 200)} has other values than the base")
    pairs = _pairs(tensors, served)
    # 2.
    highest = max(sides["A"].values.shape[0] for sides in pairs.values())
    rank = max(LEAST_RANK, 1 << (highest - 1).bit_length())
    # 3.
    alpha = _shared_alpha({served.scalings[module] for module, _ in pairs}, rank)
    made: dict[str, Array] = {}
    bounds: dict[str, float] = {}
    for (module, kind), sides in pairs.items():
        first, second = _padded(sides["A"], rank, axis=0), _padded(sides["B"], rank, axis=1)
        scaled = second.as_float64() * served.scalings[module]
        bounds[module] = _longest(first.as_float64(), 0) * _longest(scaled, 1)
        if alpha is None:
            second = Array(dtype="F32", values=scaled.astype("<f4"))
        made |= _named(module, kind, first, second)
    # 4.
    dtype = next(iter(pairs.values()))["A"].dtype
    padding = _missing(set(bounds), served) if fill else {}
    for module, (inputs, outputs) in padding.items():
        sizes = (rank, inputs), (outputs, rank)
        made |= _named(module, "", *(Array(dtype=dtype, values=np.zeros(size, _NUMPY[dtype])) for size in sizes))
    of_class = {key: None if served.is_whole else config.get(key) for key in _OF_CLASS}
    return PlainLora(
        config={key: config.get(key) for key in _CARRIED}
        | of_class
        | {"bias": "none", "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0, "peft_type": "LORA"}
        | {"lora_alpha": rank if alpha is None else alpha, "modules_to_save": None, "r": rank, "use_rslora": False}
        | {
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "target_modules": _targets({*bounds, *padding}, served.sizes),
        },
        tensors=dict(sorted(made.items())),
        padding=tuple(padding),
        is_folded=alpha is None,
        bounds=bounds,
    )


def _pairs(tensors: Mapping[str, Array], served: ServedClass) -> dict[tuple[str, str], dict[str, Array]]:
    """The factors of each module, and the kind of its layer. Copies of base weights are left out."""
    pairs: dict[tuple[str, str], dict[str, Array]] = defaultdict(dict)
    for name, array in sorted(tensors.items()):
        if (factor := _FACTOR.fullmatch(name)) is None:
            continue
        own = module_of(name)
        if (module := served.names.get(own, "")) not in served.scalings:
            what = f"{served.name}, which users of the adapter load"
            _refuse(f"{what}, has no module with the stored tensors of {quoted(own, 200)}")
        sides = pairs[module, factor["kind"]]
        if factor["side"] in sides:
            _refuse(f"it has two tensors for lora_{factor['side']} of {quoted(module, 200)}")
        sides[factor["side"]] = array
    return dict(pairs)


def _named(module: str, kind: str, *factors: Array) -> Iterator[tuple[str, Array]]:
    for side, array in zip("AB", factors, strict=True):
        yield f"{ADAPTER_PREFIX}{module}.lora_{kind}{side}{'' if kind else '.weight'}", array


def _padded(array: Array, rank: int, *, axis: int) -> Array:
    widths = [(0, rank - size if number == axis else 0) for number, size in enumerate(array.values.shape)]
    return Array(dtype=array.dtype, values=np.pad(array.values, widths))


def _shared_alpha(scalings: Collection[float], rank: int) -> int | None:
    """The whole `lora_alpha` that gives exactly the only scale; None if there is none."""
    alpha = next(iter(scalings)) * rank
    is_exact = len(scalings) == 1 and alpha > 0 and alpha.is_integer() and {alpha / rank} == scalings
    return int(alpha) if is_exact else None


def _longest(factor: NDArray[np.float64], axis: int) -> float:
    """The largest norm along the ranks. No value of B @ A is larger than the product of both."""
    return float(np.sqrt(np.square(factor).sum(axis)).max(initial=0.0))


def _missing(adapted: set[str], served: ServedClass) -> dict[str, tuple[int, int]]:
    """Linear layers that servers expect next to the adapted ones, with their sizes.

    These are the layers of the same type in other blocks, and those that servers fuse with one.
    """
    types = {_type(module) for module in adapted}
    for parent, dot, last in [kind.rpartition(".") for kind in types]:
        types |= {f"{parent}{dot}{other}" for group in _TOGETHER if last in group for other in group}
    return {
        module: sizes
        for module, sizes in sorted(served.sizes.items())
        if sizes is not None and module not in adapted and _type(module) in types
    }


def _type(module: str) -> str:
    """The path of a module, without the numbers of its blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _targets(adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """The last parts of these names, as PEFT's own defaults, if they select no other module; else the names."""
    ends = {module.rpartition(".")[2] for module in adapted}
    is_exact = all(module in adapted or module.rpartition(".")[2] not in ends for module in modules)
    return sorted(ends if is_exact else adapted)


def array_of(dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
    """A tensor of a weights file."""
    return Array(dtype=dtype, values=np.frombuffer(data, _NUMPY[dtype]).reshape(shape))
