"""Whether an adapter may belong to a base, by the names and shapes in the headers of both.

In: headers, or two directories. Out: yes or no. `merge-gate init` offers bases by it, and `named_base` compares only a
directory that the adapter fits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.files.headers import CorruptFileError, open_regular, parse_file
from merge_gate.records.files import WEIGHTS_NAME, StoredTensor

_FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(?:\.weight)?$")


def fits(adapter: str, base: str) -> bool:
    """Whether the adapter in a directory may belong to the base in another. False if a file cannot be read."""
    return belongs(_tensors(adapter, WEIGHTS_NAME), _tensors(base, "*.safetensors"))


def belongs(adapter: Sequence[StoredTensor], stored: Sequence[StoredTensor], *, has_shapes: bool = True) -> bool:
    """Whether each tensor of the adapter is of a module that is stored, and a factor has the size of its weight.

    Names may lack, or have, up to two first parts: classes with a head put their model into a part.
    """
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for tensor in stored:
        for tail in _tails(tensor.name.removesuffix(".weight")):
            shapes[tail].append(tensor.shape)
    own = [tensor for tensor in adapter if tensor.name.startswith(ADAPTER_PREFIX)]
    return bool(own) and all(_has_place(tensor, shapes, has_shapes=has_shapes) for tensor in own)


def _has_place(tensor: StoredTensor, shapes: Mapping[str, list[tuple[int, ...]]], *, has_shapes: bool) -> bool:
    name = tensor.name.removeprefix(ADAPTER_PREFIX)
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    places = next((found for path in paths for tail in _tails(path) if (found := shapes.get(tail))), None)
    if places is None:
        return False
    factor = _FACTOR.search(name)
    if factor is None or not has_shapes:
        return True
    size = tensor.shape[-1 if factor[2] == "A" else 0]
    return any(size in shape for shape in places)


def _tails(name: str) -> Iterator[str]:
    for _ in range(3):
        yield name
        _, dot, name = name.partition(".")
        if not dot:
            return


def _tensors(directory: str, pattern: str) -> list[StoredTensor]:
    tensors: list[StoredTensor] = []
    for path in sorted(Path(directory).glob(pattern)):
        with suppress(CorruptFileError, OSError), open_regular(str(path)) as file:
            tensors += parse_file(file)
    return tensors
