"""Where the final values of merged tensors go while they are measured: to a publication, or to a comparison.

In: merged tensors by the base's names, whole or a few rows at a time. Out: calls of a `TensorSink`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

Outline = tuple[torch.Size, torch.dtype]


class TensorSink(Protocol):
    """Takes the tensors of one merged model that differ from the base, in their final dtypes.

    A name is that of the base's tensor; a tied tensor has its first name. If the values of a tensor are given again (a
    repeated attempt, a second layer on a shared tensor), the last ones count. Several threads may call these methods,
    for different tensors. Values are only valid during the call.
    """

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        """A merge begins, perhaps again: it can change these tensors, and gives them these shapes and dtypes."""

    def put(self, name: str, values: torch.Tensor) -> None:
        """All values of a tensor, of any shape and on any device. A quantized tensor comes dequantized."""

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        """Some rows of a tensor of this `shape`, from row `start` on. They come in order, and the last ones follow."""

    def pass_by(self, name: str, values: torch.Tensor) -> None:
        """A tensor of the base, which is read from its files. The merge may still change it."""

    def settle(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:
        """The merge is complete, and only the tensors with these `names` differ from the base.

        `untied` are names of tensors that share memory in the base, and no longer do: each with the first name.
        """


class WholeTensors:
    """A sink that joins the rows of each tensor and passes whole tensors on. They belong to the receiver."""

    def __init__(self, receive: Callable[[str, torch.Tensor], None]) -> None:
        self._receive = receive
        self._begun: dict[str, torch.Tensor] = {}
        self.names: frozenset[str] = frozenset()
        self.untied: frozenset[tuple[str, str]] = frozenset()

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        """Nothing to prepare."""

    def put(self, name: str, values: torch.Tensor) -> None:
        self._receive(name, values.detach().to("cpu", copy=True).contiguous())

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        whole = self._begun.get(name)
        if start == 0 or whole is None:
            whole = self._begun[name] = torch.empty(tuple(shape), dtype=rows.dtype)
        whole[start : start + len(rows)].copy_(rows)
        if start + len(rows) == shape[0]:
            self._receive(name, self._begun.pop(name))

    def pass_by(self, name: str, values: torch.Tensor) -> None:
        """Nothing to keep."""

    def settle(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:
        self.names, self.untied = frozenset(names), frozenset(untied)
