"""What takes part in an adapter's merge: the interface of a feature in the worker. Measuring is not part of it.

In: an adapter on its way through a pass, and its merged tensors. Out: the adapter's `Evidence`, with further facts.

A merge calls the methods in this order. It begins again if it has to be repeated; then the last values count.

1. `begin`: the adapter is loaded on its scratch copy, and its merge is planned next.
2. `expect`: its merge is planned.
3. `in_pass`: all adapters of the pass are planned, and none is merged.
4. `pass_by`, `put`, `put_rows`: the base's tensors, and the merged ones as they are measured; then `complete`.
5. `in_pass`: all adapters of the pass are merged and measured.
6. `end`: the merge counts. `finish`: the adapter's files were the same all the time. `close` instead: it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch

from merge_gate.records.measured import Evidence

if TYPE_CHECKING:
    from merge_gate.engine.adapter.load_adapter import Loaded
    from merge_gate.engine.adapter_evidence import MergeAttempt

Outline = tuple[torch.Size, torch.dtype]


class Consumer:
    """What a feature does with the merge of an adapter: nothing, unless it overrides a method.

    The tensors are those that differ from the base, in their final dtypes. A name is that of the base's tensor; a tied
    tensor has its first name. If the values of a tensor are given again (a second layer on a shared tensor), the last
    ones count. Several threads may call the methods of step 4, for different tensors. Values are only valid during the
    call.

    Attributes:
        takes_tensors: it gets tensors: every value is then merged as PEFT merges it.
        needs_rows: `TensorMerge.keeps_rows` is measured. May be set by `begin`.
        needs_served: `Evidence.served` is filled.
        needs_whole: tensors of the base pass by whole.
    """

    takes_tensors = False
    needs_rows = False
    needs_served = False
    needs_whole = False

    def begin(self, attempt: MergeAttempt, loaded: Loaded) -> None:
        """The merge of an adapter begins, perhaps again."""

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        """The merge can change these tensors, and gives them these shapes and dtypes."""

    def put(self, name: str, values: torch.Tensor) -> None:
        """All values of a tensor, of any shape and on any device. A quantized tensor comes dequantized."""

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        """Some rows of a tensor of this `shape`, from row `start` on. They come in order, and the last ones follow."""

    def pass_by(self, name: str, rows: torch.Tensor, *, start: int) -> None:
        """A tensor of the base, which is read from its files. The merge may still change it.

        Rows of a large one come in order, from row `start` on.
        """

    def complete(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:
        """The merge is complete, and only the tensors with these `names` differ from the base.

        `untied` are names of tensors that share memory in the base, and no longer do: each with the first name.
        """

    @classmethod
    def in_pass(cls, pairs: Sequence[tuple[Self, MergeAttempt]], *, is_merged: bool) -> None:
        """Called before the merges of a pass, and again after them, with all consumers of this class.

        Each comes with its adapter. Adapters that cannot be merged are left out.
        """

    def end(self, attempt: MergeAttempt) -> Evidence:
        """The evidence of a merge, with what this consumer adds."""
        return attempt.evidence

    def finish(self, evidence: Evidence) -> None:
        """Nothing can change the evidence any more. It is sent next."""

    def close(self) -> None:
        """The adapter has no evidence."""


class WholeTensors(Consumer):
    """Joins the rows of each tensor and passes whole tensors on. They belong to the receiver."""

    takes_tensors = True

    def __init__(self, receive: Callable[[str, torch.Tensor], None]) -> None:
        self._receive = receive
        self._begun: dict[str, torch.Tensor] = {}
        self.names: frozenset[str] = frozenset()
        self.untied: frozenset[tuple[str, str]] = frozenset()

    def put(self, name: str, values: torch.Tensor) -> None:
        self._receive(name, values.detach().to("cpu", copy=True).contiguous())

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        whole = self._begun.get(name)
        if start == 0 or whole is None:
            whole = self._begun[name] = torch.empty(tuple(shape), dtype=rows.dtype)
        whole[start : start + len(rows)].copy_(rows)
        if start + len(rows) == shape[0]:
            self._receive(name, self._begun.pop(name))

    def complete(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:
        self.names, self.untied = frozenset(names), frozenset(untied)
