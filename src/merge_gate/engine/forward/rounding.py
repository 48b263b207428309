"""Measures how much of an adapter's effect on the outputs changes by rounding the merge to its final dtype.

In: a base, an adapter, and its merge. Out: `Forward` with `effect` and `rounding_change`, or without them.

1. Base, unmerged adapter, and merge become models with float32 tensors. The base's tensors are hollow (hollow.py), so
   only what an operation reads is float32 in memory.
2. They run together (lockstep.py), with a second base whose values are off by one unit of float32 arithmetic. What
   that changes is noise, and a small effect is lost in it.
3. A mixture of experts may send a token to another expert for the smallest difference. So the merged model makes the
   choices of the unmerged one, and those that it would have changed are counted.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.forward.activations import tensors_of
from merge_gate.engine.forward.lockstep import ModelRun, run_together
from merge_gate.engine.forward.made_up_inputs import candidates
from merge_gate.engine.forward.run import MergedModel
from merge_gate.engine.tensors.hollow import Cell, Hollow, Tensors
from merge_gate.engine.tensors.measure import shares_storage
from merge_gate.records.measured import Forward

LEAST_EFFECT = 40
"""The effect has to be so many times as large as the noise. That is about 100 times as large as the difference of a
merge in float32 and the unmerged adapter, which is 2 to 20 times smaller than the noise (tiny models, SmolLM2)."""

_Exchange = Callable[[torch.Tensor], torch.Tensor]


def with_rounding(base: Base, adapted: Any, merged: MergedModel, forward: Forward, tokens: Collection[int]) -> Forward:
    """The `Forward` with the change by rounding, if it can be measured.

    Args:
        base: the base, which has run on the inputs that `forward` names.
        adapted: the model with the adapter's layers, not merged.
        merged: the adapter merged.
        forward: what the run has shown.
        tokens: ids that are among the inputs.
    """
    # 1.
    hollow = Hollow(
        _cell(base, name, tensor)
        for name, tensor in base.tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    )
    trees = (base.model, base.model, adapted, merged.model)
    plain, noisy, unmerged, rounded = (_in_float32(tree, base, hollow) for tree in trees)

    # 2. and 3.
    def off_by_one_unit(name: str) -> torch.Tensor:
        values = hollow.tensors[name]
        signs = torch.randint(2, values.shape[-1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
        return values * (1 + signs * torch.finfo(torch.float32).eps)

    def of_merge(name: str) -> torch.Tensor | None:
        return merged.values[name].float() if name in merged.values else None

    inputs = next(inputs for name, inputs in candidates(plain, tokens) if name == forward.inputs)
    choices = _Choices()
    runs = (
        ModelRun(model=plain, inputs=inputs),
        ModelRun(model=noisy, inputs=inputs, own=off_by_one_unit),
        ModelRun(model=choices.of(unmerged), inputs=inputs),
        ModelRun(model=choices.given_to(rounded), inputs=inputs, own=of_merge),
    )
    run_together(runs, hollow.tensors, lambda names: hollow.filled(hollow.tensors[name] for name in names))
    if hollow.forget_touched() or any(run.error is not None for run in runs):
        return forward
    size, noise, effect, change = _norms([run.returned for run in runs])
    if not (size and effect and effect >= LEAST_EFFECT * noise and math.isfinite(change)):  # NaN, too
        return forward
    return replace(forward, effect=effect / size, rounding_change=change / effect, choices_changed=choices.changed)


def _cell(base: Base, name: str, tensor: torch.Tensor) -> Cell:
    def fill(tensors: Tensors) -> None:
        with base.filled([name]):
            tensors[name].copy_(tensor)

    return Cell(outlines={name: (tensor.shape, torch.float32)}, fill=fill)


def _in_float32(model: nn.Module, base: Base, hollow: Hollow) -> Any:
    """A copy of a model. Tensors that are the base's own become the hollow ones."""
    names = {base.tensors[name].data_ptr(): name for name in hollow.tensors}
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None or id(tensor) in made:
                    continue
                name = names.get(tensor.data_ptr())
                values = tensor.detach()
                if name is not None and shares_storage(base.tensors[name], tensor):
                    values = hollow.tensors[name]
                elif tensor.is_floating_point():
                    values = values.float()
                made[id(tensor)] = (
                    nn.Parameter(values, requires_grad=False) if tensors is module._parameters else values
                )
    return copy.deepcopy(model, made).eval()


def _norms(outputs: Sequence[Any]) -> tuple[float, ...]:
    """‖base‖, ‖noisy − base‖, ‖unmerged − base‖, and ‖merged − unmerged‖, over all tensors of the outputs.

    Values that a mask has set do not count. A larger vocabulary counts as far as the base has it.
    """
    squares = [0.0] * 4
    for given in zip(*map(tensors_of, outputs), strict=True):
        common = tuple(slice(min(sizes)) for sizes in zip(*(one.shape for one in given), strict=True))
        base, noisy, unmerged, merged = (one[common].double() for one in given)
        counted = base.abs() < torch.finfo(torch.float32).max
        for number, difference in enumerate((base, noisy - base, unmerged - base, merged - unmerged)):
            squares[number] += float(torch.where(counted, difference, 0.0).square().sum())
    return tuple(map(math.sqrt, squares))


class _Choices:
    """Step 3: the experts that the unmerged model chooses. `changed` counts the tokens that would get other ones."""

    def __init__(self) -> None:
        self.changed = 0
        self._made: deque[torch.Tensor] = deque()

    def of(self, model: Any) -> Callable[..., Any]:
        """The model, whose choices are kept."""

        def keep(indices: torch.Tensor) -> torch.Tensor:
            self._made.append(indices)
            return indices

        return functools.partial(_run, model, keep)

    def given_to(self, model: Any) -> Callable[..., Any]:
        """The model with these choices. It must read each tensor after the model that makes them."""

        def replace_by_kept(own: torch.Tensor) -> torch.Tensor:
            made = self._made.popleft()
            self.changed += int((made.sort().values != own.sort().values).any(-1).sum())
            return made

        return functools.partial(_run, model, replace_by_kept)


def _run(model: Any, exchange: _Exchange, **inputs: Any) -> Any:
    with _Chooses(exchange):
        return model(**inputs)


class _Chooses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Exchanges the indices that topk and argmax return. Routers of experts use them."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._exchange = exchange

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.argmax.default:
            return self._exchange(result[..., None])[..., 0]
        if function is torch.ops.aten.topk.default:
            indices = self._exchange(result[1])
            return args[0].gather(args[2] if len(args) > 2 else -1, indices), indices  # noqa: PLR2004 - the dimension
        return result
