"""Whether an adapter may belong to a base, by the names and shapes in the headers of both.

In: two directories. Out: yes or no, for `merge-gate init`, which offers bases and decides nothing.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from merge_gate.files.headers import CorruptFileError, open_regular, parse_file
from merge_gate.records.files import WEIGHTS_NAME

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def fits(adapter: str, base: str) -> bool:
    """Whether each LoRA factor of the adapter has the rows or columns of a weight of that name in the base.

    False if a file cannot be read, or if the adapter has no such factors.
    """
    weights = _shapes(base, "*.safetensors")
    factors = [
        (match["module"], match["side"], shape)
        for name, shape in _shapes(adapter, WEIGHTS_NAME).items()
        if (match := _FACTOR.fullmatch(name)) and len(shape) > 1
    ]
    return bool(factors) and all(
        (shape[1] if side == "A" else shape[0]) in weights.get(f"{module}.weight", weights.get(_inner(module), ()))
        for module, side, shape in factors
    )


def _inner(module: str) -> str:
    """A base may be stored without the head around it, and so without the first part of its names."""
    return f"{module.partition('.')[2]}.weight"


def _shapes(directory: str, pattern: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(directory).glob(pattern)):
        with suppress(CorruptFileError, OSError), open_regular(str(path)) as file:
            shapes |= {tensor.name: tensor.shape for tensor in parse_file(file)}
    return shapes
