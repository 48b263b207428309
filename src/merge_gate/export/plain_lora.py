"""Makes a plain LoRA of an adapter: names, ranks, and scale. Or says what has no plain LoRA.

In: adapter_config.json, the tensors, and the class that servers load. Out: a config and tensors that mean the same
everywhere. Nothing is read or written here, and nothing is approximated.

1. Refuse what has no plain LoRA.                                     refuse_by_config, refuse_by_tensors
2. Pair the factors of each module, by its name in the served class.
3. Pad all ranks with zeros to a common one that servers support.
4. Keep a scale that all modules share as `lora_alpha / r`, or fold the scales into `lora_B`, in float32.
5. Add pairs of zeros where servers expect a module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import NoPlainLoraError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX, module_of
from merge_gate._internal.text import quoted
from merge_gate.judging.key_hints import WRAPPERS
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass
from merge_gate.records.terms import record

RANKS = (8, 16, 32, 64, 128, 256, 512)
"""The ranks that servers have kernels for."""

_FACTOR = re.compile(r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_COPY = ".base_layer.weight"
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that servers fuse, so that they expect the factors of all of them."""

_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""numpy has no bfloat16: its bits are those of an integer."""

_CONVERT = "convert it as PEFT does: save_pretrained with path_initial_model_for_weight_conversion, or convert_to_lora"
_OFFER = "merge it, and serve the merged model: merge-gate run --publish"

_REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA normalizes each weight", ""),
    "modules_to_save": ("it has whole modules (modules_to_save)", ""),
    "trainable_token_indices": ("it has trained tokens", ""),
    "lora_bias": ("it has biases of its own (lora_bias)", ""),
    "alora_invocation_tokens": ("it acts only after its invocation tokens (aLoRA)", ""),
    "layer_replication": ("it repeats layers of the base (layer_replication)", ""),
    "target_parameters": ("it changes experts or other parameters directly (target_parameters)", ""),
}
"""What has no plain LoRA, by the key of adapter_config.json: the reason, and a better hint than to publish."""

_PLAIN_KEYS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Keys that a plain LoRA expresses. Another key that is set has an effect that it may not have."""

_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which PEFT leaves the base's weights as they are."""


@record
class Array:
    """A tensor: safetensors' name of its dtype, and its values. Those of bfloat16 are its bits."""

    dtype: str
    values: NDArray[Any]

    def as_float32(self) -> NDArray[np.float32]:
        if self.dtype == "BF16":
            return (self.values.astype("<u4") << 16).view("<f4")
        return self.values.astype("<f4")


@record
class PlainLora:
    """An export.

    Attributes:
        config: adapter_config.json.
        tensors: the tensors, by their names in the file.
        padding: modules that were added with factors of zeros only.
        folded: whether the scales are in `lora_B`.
        bounds: for each module, a number that no value of its delta exceeds.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    padding: tuple[str, ...]
    folded: bool
    bounds: Mapping[str, float]


# --- 1. --------------------------------------------------------------------------------------------------------------


def refuse_by_config(config: Mapping[str, Any]) -> None:
    """Refuse a config of something that has no plain LoRA.

    Raises:
        NoPlainLoraError: with the reason.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(f"it is {quoted(str(kind))}, and not LoRA")
    for key, (why, hint) in _REFUSED.items():
        if config.get(key):
            _refuse(why, hint)
    if config.get("bias", "none") != "none":
        _refuse(f"it has biases of the base (bias: {quoted(str(config['bias']))})")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        _refuse(f"its base differs from the one on disk (init_lora_weights: {quoted(str(init))})", _CONVERT)
    for key, value in sorted(config.items()):
        if value and key not in _PLAIN_KEYS:
            _refuse(f"{quoted(key)} is {quoted(json.dumps(value))}, which a plain LoRA cannot express")


def refuse_by_tensors(tensors: Iterable[StoredTensor]) -> None:
    """Refuse tensors that a plain LoRA does not have.

    Raises:
        NoPlainLoraError: with the first of them.
    """
    for one in tensors:
        if not (_FACTOR.fullmatch(_rest(one.name)) or one.name.endswith(_COPY)):
            _refuse(f"it has the tensor {quoted(one.name, 200)}, expected lora_A and lora_B only")
        if one.dtype not in _NUMPY:
            _refuse(f"{quoted(one.name, 200)} has dtype {one.dtype}, expected {', '.join(_NUMPY)}")


def _refuse(why: str, hint: str = "") -> NoReturn:
    raise NoPlainLoraError(f"no plain LoRA has the effect of this adapter: {why}", hint=hint or _OFFER)


def _rest(name: str) -> str:
    """What follows the module in the name of a tensor."""
    return name.removeprefix(ADAPTER_PREFIX).removeprefix(module_of(name))


# --- names -----------------------------------------------------------------------------------------------------------


def repaired_names(names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """The names of tensors that differ from PEFT's by what a wrapper or a second prefix adds, and PEFT's names.

    `stored` are the names of the base's tensors. A part of them is not one that a wrapper added.
    """
    parts = [part for part in (ADAPTER_PREFIX, *WRAPPERS) if not any(f".{part}" in f".{name}" for name in stored)]
    renamed = {}
    for name in names:
        rest = name
        while prefix := next((part for part in parts if rest.startswith(part)), ""):
            rest = rest.removeprefix(prefix)
        for inner in (part for part in parts if part.startswith("_")):  # a wrapped layer
            rest = rest.replace(f".{inner}", ".")
        if ADAPTER_PREFIX + rest != name and _FACTOR.search(name):
            renamed[name] = ADAPTER_PREFIX + rest
    return renamed


# --- 2. to 5. --------------------------------------------------------------------------------------------------------


def plain_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Array], served: ServedClass, *, fill: bool
) -> PlainLora:
    """The plain LoRA of an adapter that passed.

    Raises:
        NoPlainLoraError: the served class has no such module, or has it twice.
    """
    # 2.
    pairs, is_embedding = _pairs(tensors, served)
    # 3.
    highest = max(sides["A"].values.shape[0] for sides in pairs.values())
    rank = next((one for one in RANKS if one >= highest), 1 << (highest - 1).bit_length())
    # 4.
    scalings = {one.served: one.scaling for one in served.adapted}
    alpha = _shared_alpha({scalings[module] for module in pairs}, rank)
    made: dict[str, Array] = {}
    bounds = {}
    for module, sides in pairs.items():
        first, second = _padded(sides["A"], rank, axis=0), _padded(sides["B"], rank, axis=1)
        values = second.as_float32()
        bounds[module] = _bound(first.as_float32(), values) * abs(scalings[module])
        if alpha is None:
            second = Array(dtype="F32", values=(values * np.float64(scalings[module])).astype("<f4"))
        made |= _named(module, first, second, "embedding_" if module in is_embedding else "")
    # 5.
    dtype = next(iter(pairs.values()))["A"].dtype
    padding = _missing(set(pairs), served) if fill else {}
    for module, (inputs, outputs) in padding.items():
        first, second = (
            Array(dtype=dtype, values=np.zeros(shape, _NUMPY[dtype])) for shape in ((rank, inputs), (outputs, rank))
        )
        made |= _named(module, first, second, "")
    everything = {*pairs, *padding}
    return PlainLora(
        config={
            "alpha_pattern": {},
            "auto_mapping": config.get("auto_mapping") if served.name == served.loaded else None,
            "base_model_name_or_path": config.get("base_model_name_or_path"),
            "bias": "none",
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "peft_version": config.get("peft_version"),
            "r": rank,
            "rank_pattern": {},
            "revision": config.get("revision"),
            "target_modules": _targets(everything, [one.name for one in served.modules]),
            "task_type": config.get("task_type") if served.name == served.loaded else None,
            "use_dora": False,
            "use_rslora": False,
        },
        tensors=dict(sorted(made.items(), key=lambda pair: (-pair[1].values.itemsize, pair[0]))),  # aligned
        padding=tuple(sorted(padding)),
        folded=alpha is None,
        bounds=bounds,
    )


def _pairs(tensors: Mapping[str, Array], served: ServedClass) -> tuple[dict[str, dict[str, Array]], set[str]]:
    """The factors of each module, and the modules that are embeddings. Copies of base weights are left out."""
    names = {one.name: one.served for one in served.adapted}
    pairs: dict[str, dict[str, Array]] = {}
    is_embedding = set()
    for name, array in sorted(tensors.items()):
        factor = _FACTOR.fullmatch(_rest(name))
        if factor is None:
            continue
        module = names.get(module_of(name))
        if module is None:
            _refuse(
                f"{served.name}, which the base's config.json names, has no module that stores what "
                f"{quoted(module_of(name), 200)} stores"
            )
        if factor["side"] in pairs.setdefault(module, {}):
            _refuse(f"it has two tensors for lora_{factor['side']} of {quoted(module, 200)}")
        pairs[module][factor["side"]] = array
        if factor["embedding"]:
            is_embedding.add(module)
    return dict(sorted(pairs.items())), is_embedding


def _named(module: str, first: Array, second: Array, kind: str) -> Iterator[tuple[str, Array]]:
    ending = "" if kind else ".weight"
    for side, array in (("A", first), ("B", second)):
        yield f"{ADAPTER_PREFIX}{module}.lora_{kind}{side}{ending}", array


def _padded(array: Array, rank: int, *, axis: int) -> Array:
    widths = [(0, 0)] * array.values.ndim
    widths[axis] = (0, rank - array.values.shape[axis])
    return Array(dtype=array.dtype, values=np.pad(array.values, widths))


def _shared_alpha(scalings: Collection[float], rank: int) -> int | None:
    """The whole `lora_alpha` that gives exactly the only scale; None if there is none."""
    if len(scalings) != 1:
        return None
    (scaling,) = scalings
    alpha = scaling * rank
    return int(alpha) if alpha > 0 and alpha.is_integer() and alpha / rank == scaling else None


def _bound(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """No value of B @ A is larger, by the inequality of Cauchy and Schwarz."""
    longest = (
        math.sqrt(float(np.square(side, dtype="f8").reshape(*shape).sum(axis).max(initial=0.0)))
        for side, shape, axis in ((first, (first.shape[0], -1), 0), (second, second.shape[:2], 1))
    )
    return math.prod(longest)


def _missing(adapted: set[str], served: ServedClass) -> dict[str, tuple[int, int]]:
    """Linear layers that servers expect next to the adapted ones, with their sizes.

    These are the layers of the same type in other blocks, and those that servers fuse with an adapted one.
    """
    sizes = {one.name: one.sizes for one in served.modules if one.sizes is not None}
    before = -1
    everything = set(adapted)
    while before != len(everything):
        before = len(everything)
        types = {_type(module) for module in everything}
        fused = {
            f"{parent}{dot}{other}"
            for module in everything
            for parent, dot, last in [module.rpartition(".")]
            for group in _TOGETHER
            if last in group
            for other in group
        }
        everything |= {module for module in sizes if _type(module) in types or module in fused}
    return {module: sizes[module] for module in sorted(everything - adapted)}


def _type(module: str) -> str:
    """The path of a module, without the numbers of its blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _targets(adapted: set[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names that select exactly these modules."""
    others = {end for module in modules if module not in adapted for end in _ends(module)}
    return sorted({next((end for end in _ends(module) if end not in others), module) for module in adapted})


def _ends(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


# --- files -----------------------------------------------------------------------------------------------------------


def array_of(dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
    """A tensor of a weights file."""
    return Array(dtype=dtype, values=np.frombuffer(data, _NUMPY[dtype]).reshape(shape))


def weights_file(tensors: Mapping[str, Array]) -> Iterator[bytes]:
    """The bytes of a safetensors file. They depend on the tensors only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.values.nbytes
        header[name] = {"dtype": array.dtype, "shape": list(array.values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in tensors.values():
        yield array.values.tobytes()
