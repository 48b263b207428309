"""A quantized release: its tensors as plain values. Each format implements it in a module of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from merge_gate.features.quantized.measurement import Setting

MOST_ROWS = 2
"""A tensor with other rows than the base's has at most so many times as many: such as a padded vocabulary."""


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
        """The shape by the headers. `read` may give the same values another shape."""

    def read(self, name: str) -> torch.Tensor:
        """The values in float32, in the base's shape. Takes the memory of one tensor.

        Raises:
            SourceError: the bytes could not be had.
            EngineError: the tensor cannot be dequantized.
        """

    def requantized(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """Other values of this tensor (float32, in its shape), on the grid that the format's quantizer gives them.

        Or on the grid of the release's own scales. None if neither can be had.
        """


def is_near(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a tensor is small enough to be read: it has the expected number of values, or only other rows."""
    has_other_rows = len(shape) == len(expected) and shape[1:] == expected[1:]
    return math.prod(shape) == math.prod(expected) or (has_other_rows and shape[0] <= MOST_ROWS * expected[0])
