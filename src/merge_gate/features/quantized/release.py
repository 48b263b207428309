"""A quantized release: its tensors as plain values. Each format implements it in a module of its own."""

from __future__ import annotations

from typing import Protocol

import torch


class Release(Protocol):
    """The values of a release, by the names of the tensors as the base's files or the base's model has them.

    `format` is what texts call it, such as `GGUF (Q4_K, Q6_K)`.
    """

    format: str

    def __contains__(self, name: str) -> bool: ...

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as `Q4_K`. Tensors of one kind have similar noise. Empty for plain floats."""

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
