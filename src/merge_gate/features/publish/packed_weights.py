"""Which stored tensors of a base are weights that bitsandbytes has packed, and which belong to such weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from merge_gate.records.files import StoredTensor
from merge_gate.records.terms import record

_STATE_4BIT = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCALES_8BIT, _FORMAT_8BIT = ".SCB", ".weight_format"
_BITS = re.compile(r"\d+")


@record
class PackedWeights:
    """The packed weights among the stored tensors of a base.

    Attributes:
        counts: how many values each packed weight has, by its stored name. With 4 bits, the last may be padding.
        states: the stored tensor that has the shape of each weight of 4 bits, by the weight's name.
        others: the stored tensors that only packed weights need.
    """

    counts: Mapping[str, int]
    states: Mapping[str, str]
    others: frozenset[str]

    def __contains__(self, name: str) -> bool:
        return name in self.counts


def packed_weights(tensors: Iterable[StoredTensor]) -> PackedWeights:
    """Find them by their names, which only bitsandbytes writes."""
    stored = {tensor.name: tensor for tensor in tensors}
    counts: dict[str, int] = {}
    states: dict[str, str] = {}
    others: set[str] = set()
    for name in stored:
        module = name.removesuffix(_SCALES_8BIT)
        of_8bit = stored.get(f"{module}.weight") if module != name else None
        of_4bit = stored.get(match["weight"]) if (match := _STATE_4BIT.fullmatch(name)) else None
        if of_4bit is not None:
            counts[of_4bit.name], states[of_4bit.name] = 2 * _size_bytes(of_4bit), name
            others |= {name, *(f"{of_4bit.name}.{part}" for part in _PARTS_4BIT)}
        elif of_8bit is not None and of_8bit.dtype == "I8":
            counts[of_8bit.name] = math.prod(of_8bit.shape)
            others |= {name, f"{module}{_FORMAT_8BIT}"}
    return PackedWeights(counts=counts, states=states, others=frozenset(others & stored.keys()))


def _size_bytes(tensor: StoredTensor) -> int:
    bits = _BITS.search(tensor.dtype)  # any dtype may be chosen to store packed bytes
    return math.prod(tensor.shape) * int(bits[0]) // 8 if bits else 0
