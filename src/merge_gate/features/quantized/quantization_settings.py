"""What config.json declares of a quantized release: the method, and what the stored weights have to agree with.

In: the config.json of a directory, which is hostile. Out: a key of `LAYOUTS`, and `DeclaredGrid`. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_gate.features.quantized.layouts import LAYOUTS, WHOLE, DeclaredGrid, LayoutError
from merge_gate.files.base_formats import KNOWN_NAMES
from merge_gate.files.headers import shown
from merge_gate.files.json_object import read_as_transformers

_PACKED = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense", None}
_KEYS = ("quantization_config", "compression_config", "quantization")


def read_settings(directory: str) -> tuple[str, DeclaredGrid, int]:
    """The key of `LAYOUTS`, what is declared, and the columns of an attention head; 1 if these are not known.

    Raises:
        LayoutError: the release is not stored in a known format.
    """
    config = read_as_transformers(Path(directory, "config.json")) or {}
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    settings: dict[str, Any] = next(
        (part[key] for part in parts for key in _KEYS if isinstance(part.get(key), dict)), {}
    )
    method = _method(settings)
    return method, _declared(settings, method), _head_size(parts)


def _head_size(configs: Sequence[Mapping[str, Any]]) -> int:
    for config in configs:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if type(hidden) is int and type(heads) is int and heads > 0:
            own = config.get("head_dim")
            return own if type(own) is int and own > 0 else max(1, hidden // heads)
    return 1


def _method(settings: Mapping[str, Any]) -> str:
    groups = settings.get("config_groups")
    formats = [part.get("format") for part in (settings, *_objects(groups))]
    method = str(settings.get("quant_method") or ("mlx" if {"bits", "group_size"} <= settings.keys() else ""))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    version = str(settings.get("checkpoint_format") or "gptq")
    other = {
        "gptq": {version} - {"gptq", "gptq_v2"},
        "awq": {str(settings.get("version") or "gemm").lower()} - {"gemm"},
        "compressed-tensors": {str(name) for name in formats if name} - _PACKED,
        "mlx": {str(settings.get("mode") or "affine")} - {"affine"},
    }.get(method, set())
    if settings.get("transform_config"):
        raise LayoutError("has rotated weights (transform_config in config.json), and cannot be compared with a merge")
    if not method:
        raise LayoutError("has no quantization_config in config.json: nothing says how its weights are stored")
    if other or method not in LAYOUTS:
        name = ": ".join((KNOWN_NAMES.get(method, shown(method)), *map(shown, sorted(other))))
        raise LayoutError(f"is stored in a format that cannot be read ({name})")
    return version if method == "gptq" else method


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in an object."""
    if isinstance(value, dict):
        yield from (part for part in value.values() if isinstance(part, dict))


def _declared(settings: Mapping[str, Any], method: str) -> DeclaredGrid:
    """The settings of all weights. Some may have others, such as a layer in more bits: each has one of those named."""
    if method == "compressed-tensors":
        parts = [part["weights"] for part in _objects(settings.get("config_groups")) if _is_object(part.get("weights"))]
    else:
        named = [part for group in _objects(settings) for part in _objects(group)]
        parts = [settings, *_objects(settings), *named]
    flags = {4: settings.get("load_in_4bit"), 8: settings.get("load_in_8bit")}
    bits = {part[key] for part in parts for key in ("bits", "w_bit", "num_bits") if type(part.get(key)) is int}
    symmetry = {bool(part[key]) for part in parts for key in ("sym", "symmetric") if key in part}
    symmetry |= {not part["zero_point"] for part in parts if "zero_point" in part and method == "awq"}
    orders = {bool(part["desc_act"]) for part in parts if "desc_act" in part}
    orders |= {part["actorder"] in ("group", "dynamic", True) for part in parts if "actorder" in part}
    return DeclaredGrid(
        bits=frozenset(bits | {count for count, flag in flags.items() if flag}),
        blocks=tuple(dict.fromkeys(block for part in parts for block in _blocks(part, method))),
        is_symmetric=symmetry.pop() if len(symmetry) == 1 else None,
        is_ordered=orders.pop() if len(orders) == 1 else None,
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _blocks(part: Mapping[str, Any], method: str) -> Iterator[tuple[int, int]]:
    """The rows and columns that share a scale; 0 if it is not said how many."""
    if method == "fp8" and "weight_block_size" not in part and "quant_method" in part:
        yield from ((128, 128), (0, 0))  # the defaults of transformers and of vLLM
    whole = {"channel": [0, WHOLE], "tensor": [WHOLE, WHOLE]}.get(str(part.get("strategy")))
    columns = [part[key] for key in ("group_size", "q_group_size") if type(part.get(key)) is int]
    of_columns = [[0, WHOLE if count == -1 else count] for count in columns]
    for block in (part.get("weight_block_size"), part.get("block_structure"), whole, *of_columns):
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size >= 0 for size in block):  # noqa: PLR2004
            yield block[0], block[1]
