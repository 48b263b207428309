"""The dtype and quantization of a base, in its files and in memory, and whether the config asks for them.

In: config.json, or a loaded model. Out: names for the report, or an error with a check of bases. Knows no PEFT.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from merge_gate.engine.tensors.measure import dtype_name
from merge_gate.engine.tensors.quantized import BNB_4BIT, BNB_8BIT, elements, is_quantized
from merge_gate.records.refusals import Undecidable
from merge_gate.records.terms import Quantization

if TYPE_CHECKING:
    from merge_gate.engine.base.loaded_base import Source

PACKINGS = {BNB_4BIT: Quantization.BNB_4BIT, BNB_8BIT: Quantization.BNB_8BIT}
"""The packing of a parameter by its class."""


def declared(directory: str) -> str | None:
    """The quantization that config.json declares, in the report's words; None if it declares none."""
    try:
        found = json.loads((Path(directory) / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # the load says what is wrong with it
    return _method(found) if isinstance(found, dict) else None


def _method(found: dict[str, Any]) -> str:
    method = found.get("quant_method")
    if method == "bitsandbytes" or found.get("load_in_4bit") or found.get("load_in_8bit"):  # as transformers reads it
        return str(Quantization.BNB_4BIT if found.get("load_in_4bit") else Quantization.BNB_8BIT)
    return str(getattr(method, "value", method))[:40] if method else ""


def refuse_unknown_format(directory: str, label: str) -> None:
    """Raise `Undecidable` if config.json declares a quantization that this release of transformers cannot load."""
    method = declared(directory)
    if not method or method in AUTO_QUANTIZATION_CONFIG_MAPPING or method in set(PACKINGS.values()):
        return
    raise Undecidable("quantization_unknown", base=label, method=method, transformers=transformers.__version__)


# --- a loaded model --------------------------------------------------------------------------------------------------


def loaded_quantization(model: Any, directory: str) -> str:
    """`none` for a plain base; else the packing of its parameters, or the method that they were dequantized from."""
    packings = {PACKINGS[type(one).__name__] for one in _packed(model)}
    if packings:
        return ", ".join(sorted(packings))
    method = declared(directory)
    return method if method and method not in set(PACKINGS.values()) else str(Quantization.NONE)


def _packed(model: Any) -> Iterator[torch.Tensor]:
    return (one for one in model.parameters() if type(one).__name__ in PACKINGS and is_quantized(one))


def main_dtype(model: Any) -> torch.dtype:
    """The dtype of most of the parameters of floating point; for a packed model, the dtype of the unpacked weights."""
    sizes: Counter[torch.dtype] = Counter()
    for one in model.parameters():
        state = getattr(one, "quant_state", None)
        if is_quantized(one):
            sizes[getattr(state, "dtype", None) or model.dtype] += elements(one)
        elif one.is_floating_point():
            sizes[one.dtype] += one.numel()
    if not sizes:
        fallback: torch.dtype = getattr(model, "dtype", torch.float32)
        return fallback
    return sizes.most_common(1)[0][0]


def loaded_dtypes(tensors: Iterable[torch.Tensor]) -> tuple[tuple[str, float], ...]:
    """How many values of parameters have which dtype, the most first; empty if all have the same."""
    sizes: Counter[str] = Counter()
    for one in tensors:
        if isinstance(one, torch.nn.Parameter) or is_quantized(one):
            name = str(PACKINGS[type(one).__name__]) if is_quantized(one) else dtype_name(one.dtype)
            sizes[name] += elements(one)
    counts = sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(counts) if len(counts) > 1 else ()


def refuse_other_packing(model: Any, source: Source) -> None:
    """Raise `Undecidable` if a base was loaded as something else than the config asks for."""
    loaded, asked, found = (
        loaded_quantization(model, source.directory),
        source.quantization,
        dtype_name(main_dtype(model)),
    )
    if asked is not Quantization.NONE:
        is_as_asked = loaded == asked
    elif source.dtype in ("auto", found):
        is_as_asked = True
    else:  # a class may keep some parameters in float32
        is_as_asked = loaded == Quantization.NONE and source.dtype in {
            dtype_name(one.dtype) for one in model.parameters()
        }
    if not is_as_asked:
        raise Undecidable(
            "loaded_otherwise",
            base=source.label,
            class_name=type(model).__name__,
            quantization=loaded,
            asked_quantization=asked,
            dtype=found,
            asked_dtype=source.dtype,
        )
