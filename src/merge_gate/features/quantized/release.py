"""A quantized release: its tensors as plain values. Each format implements it in a module of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from merge_gate.features.quantized.measurement import Setting

MOST_ROWS = 2
"""A tensor with other rows than the base's has at most so many times as many: such as a padded vocabulary."""


class OpenTensor(NamedTuple):
    """One tensor of a release, whose rows can be read in any order.

    Attributes:
        shape: that of the values, which may differ from that in the headers.
        read: the values of these rows in float32, in the base's order.
        requantized: other values of these rows, on the grid that the format's quantizer gives them, or on the grid of
            the release's own scales. None if neither can be had.
        step: rows are read and quantized in multiples of so many, or up to the last one.
    """

    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]
    requantized: Callable[[torch.Tensor, slice], torch.Tensor | None]
    step: int = 1


class Release(Protocol):
    """The values of a release, by the names of the tensors as the base's files or the base's model has them.

    `format` is what texts call it, such as `GGUF (Q4_K, Q6_K)`. `added` are tensors that the base does not have, and
    `settings` differ from those of the base.
    """

    format: str
    added: tuple[str, ...]
    settings: tuple[Setting, ...]

    def __contains__(self, name: str) -> bool: ...

    def expects(self, name: str) -> bool:
        """Whether a whole model in this format has the tensor: that of a text model has no images' weights."""

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as `Q4_K`. Tensors of one kind have similar noise. Empty for plain floats."""

    def shape(self, name: str) -> Sequence[int]:
        """The shape by the headers. The values may have another one."""

    def open(self, name: str) -> OpenTensor:
        """The tensor, for the thread that calls. It may take the memory of its codes.

        Raises, as reading it does:
            SourceError: the bytes could not be had.
            EngineError: the tensor cannot be dequantized.
        """


def whole(values: torch.Tensor, requantized: Callable[[torch.Tensor], torch.Tensor | None]) -> OpenTensor:
    """A tensor whose rows are not stored one after the other, so that it is read as a whole."""

    def again(others: torch.Tensor, _rows: slice) -> torch.Tensor | None:
        return requantized(others)

    return OpenTensor(tuple(values.shape), values.__getitem__, again, max(1, len(values) if values.dim() else 1))


def is_near(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a tensor is small enough to be read: it has the expected number of values, or only other rows."""
    has_other_rows = len(shape) == len(expected) and shape[1:] == expected[1:]
    return math.prod(shape) == math.prod(expected) or (has_other_rows and shape[0] <= MOST_ROWS * expected[0])
