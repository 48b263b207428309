"""A quantized release: its tensors as plain values. Each format implements it in a module of its own.

The worker alone imports this. A library that dequantizes is part of the extra `quantized`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

from merge_gate._internal.errors import EngineError


class Release(Protocol):
    """The values of a release, by the names of the tensors as the base's files have them.

    Attributes:
        format: what texts call it: `GGUF (Q4_K and Q6_K)`, `AWQ (4 bits, groups of 128)`.
    """

    format: str

    def __contains__(self, name: str) -> bool: ...

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as `Q4_K`. Tensors of one kind have similar noise. Empty for plain floats."""

    def read(self, name: str) -> torch.Tensor:
        """The values in float32, in the shape of the base's stored tensor. Takes the memory of one tensor.

        Raises:
            SourceError: the bytes could not be had.
            EngineError: the tensor cannot be dequantized.
        """

    def requantized(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """Other values of this tensor (float32, in its shape), after they went through this quantization.

        They are on the grid that the format's quantizer gives them, or on the grid of the release's own scales. None if
        this cannot be repeated.
        """


def library(name: str) -> Any:
    """Import a library of the extra.

    Raises:
        EngineError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(
            f"the release cannot be read without the package {name}: {error}",
            hint="install it where merge-gate runs: pip install 'merge-gate[quantized]'",
        ) from error
