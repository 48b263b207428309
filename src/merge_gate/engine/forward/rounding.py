"""Measures how much of an adapter's effect on the outputs changes by rounding the merge to its final dtype.

In: a base, an adapter, and its merge. Out: `Forward` with `effect` and `rounding_change`, or without them. And what the
arithmetic of that dtype changes, with `output_error`.

1. Base, unmerged adapter, and merge become models with float32 tensors. The base's tensors are lazy (lazy_tensors.py),
   so only what an operation reads is float32 in memory.
2. They run together (lockstep.py), with a second base whose values are off by one unit of float32 arithmetic. What
   that changes is noise, and a small effect is lost in it.
3. A mixture of experts may send a token to another expert for the smallest difference. So the merged model makes the
   choices of the unmerged one, and those that it would have changed are counted.
4. An effect that rounding seems to change much may be small only on these inputs. So the same delta also runs with
   random signs of its input columns, which an adapter for such inputs would exceed.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.made_up_inputs import Inputs, candidates
from merge_gate.engine.forward.activations import tensors_of
from merge_gate.engine.forward.lockstep import ModelRun, run_together, with_norms_in_blocks
from merge_gate.engine.tensors import module_copies
from merge_gate.engine.tensors.lazy_tensors import LazyGroup, LazyTensors, Tensors
from merge_gate.engine.tensors.measure import shares_storage
from merge_gate.records.measured import Forward

LEAST_EFFECT = 40
"""The effect has to be so many times as large as the noise. That is about 100 times as large as the difference of a
merge in float32 and the unmerged adapter, which is 2 to 20 times smaller than the noise (tiny models, SmolLM2)."""

MOST_OF_BASE, MOST_OF_EFFECT = 3, 0.5
"""The merged model's outputs may differ from those in float32 by so many times what the base's do, or by this share of
the adapter's effect."""

DRAWS = 3
"""So often are the signs of a delta's input columns drawn. The median effect counts."""

_Exchange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModel:
    """A merged model of transformers, as it would be published.

    `values` are merged tensors in their final dtypes, by the base's names: in their places, `model` has the base's own.
    """

    model: Any
    values: Mapping[str, torch.Tensor]

    def in_float32(self, name: str) -> torch.Tensor | None:
        """One of the values."""
        return self.values[name].float() if name in self.values else None


def with_rounding(
    base: Base, adapted: Any, merged: MergedModel, forward: Forward, tokens: Collection[int], *, error_limit: float
) -> Forward:
    """The `Forward` with the change by rounding, if it can be measured.

    Args:
        base: the base, which has run on the inputs that `forward` names.
        adapted: the model with the adapter's layers, not merged.
        merged: the adapter merged.
        forward: what the run has shown.
        tokens: ids that are among the inputs.
        error_limit: the change above which step 4 is needed.
    """
    # 1.
    exact = _InFloat32(base)
    plain, noisy, unmerged, rounded = map(exact.copy, (base.model, base.model, adapted, merged.model))

    # 2. and 3.
    def off_by_one_unit(name: str) -> torch.Tensor:
        values = exact.lazy.tensors[name]
        signs = _signs(values.shape[-1] if values.dim() else 1, 0)
        return values * (1 + signs * torch.finfo(torch.float32).eps)

    inputs = next(inputs for name, inputs in candidates(plain, tokens) if name == forward.inputs)
    choices = _Choices()
    runs = (
        ModelRun(model=plain, inputs=inputs),
        ModelRun(model=noisy, inputs=inputs, own=off_by_one_unit),
        ModelRun(model=choices.of(unmerged), inputs=inputs),
        ModelRun(model=choices.given_to(rounded), inputs=inputs, own=merged.in_float32),
    )
    if not exact.run(runs):
        return forward
    pairs = ((0, -1), (1, 0), (2, 0), (3, 2))
    size, noise, effect, change = _distances([run.returned for run in runs], pairs)
    if not (size and effect and effect >= LEAST_EFFECT * noise and math.isfinite(change)):  # NaN, too
        return forward
    forward = replace(forward, effect=effect / size, rounding_change=change / effect, choices_changed=choices.changed)

    # 4.
    if change > error_limit * effect:
        redrawn = [ModelRun(model=_redrawn(exact.copy(adapted), seed), inputs=inputs) for seed in range(DRAWS)]
        if exact.run(redrawn):
            effects = [_distances((runs[0].returned, run.returned), [(1, 0)])[0] for run in redrawn]
            forward = replace(forward, typical_effect=statistics.median(effects) / size)
    return forward


def _redrawn(model: nn.Module, seed: int) -> nn.Module:
    """The model, with the columns of each layer's delta in random signs, or the rows of an embedding's in random order.

    A layer gives x @ W + x' @ delta: x' has these signs. Convolutions, and experts in one tensor, keep their delta.
    """
    inside: set[nn.Module] = set()
    for number, layer in enumerate(list(model.modules())):
        if hasattr(layer, "get_base_layer") and layer not in inside:  # an adapter's
            inner = layer.get_base_layer()  # type: ignore[operator]
            inside.update(layer.modules())
            if isinstance(inner, nn.Linear | Conv1D | nn.Embedding):
                layer.forward = functools.partial(_with_delta_of, layer.forward, inner, DRAWS * number + seed)
    return model


def _with_delta_of(forward: Callable[..., Any], inner: Any, seed: int, inputs: torch.Tensor, *others: Any) -> Any:
    """What a layer returns, with the delta's share of it from other inputs."""
    if isinstance(inner, nn.Embedding):
        exchanged = torch.randperm(inner.num_embeddings, generator=torch.Generator().manual_seed(seed))[inputs]
    else:
        exchanged = inputs * _signs(inputs.shape[-1], seed)
    return inner(inputs) + forward(exchanged, *others) - inner(exchanged)


def _signs(size: int, seed: int) -> torch.Tensor:
    return torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def with_output_error(
    base: Base, merged: MergedModel, every: Sequence[Inputs], seen: Sequence[Sequence[Any]], forward: Forward
) -> Forward:
    """The `Forward` with `output_error`, the worst of all outputs. `seen` has those of base and merged model."""
    exact, errors = _InFloat32(base), [0.0]
    plain, rounded = exact.copy(base.model), exact.copy(merged.model)
    for inputs, *in_dtype in zip(every, *seen, strict=True):
        given = _pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, inputs
        )
        runs = (ModelRun(model=plain, inputs=given), ModelRun(model=rounded, inputs=given, own=merged.in_float32))
        if not exact.run(runs):
            return forward
        for output in zip(*map(tensors_of, (*(run.returned for run in runs), *in_dtype)), strict=True):
            effect, of_base, of_merged = _distances(output, ((1, 0), (2, 0), (3, 1)))
            allowed = max(MOST_OF_BASE * of_base, MOST_OF_EFFECT * effect)
            if not math.isfinite(effect + of_base) or of_merged > allowed == 0:
                return forward
            errors.append(of_merged / allowed if allowed else 0.0)
    return replace(forward, output_error=max(errors))


class _InFloat32:
    """Step 1: copies of models over `base`."""

    def __init__(self, base: Base) -> None:
        floating = {
            name: tensor for name, tensor in base.tensors.items() if tensor.is_floating_point() and tensor.numel()
        }
        self._base, self.lazy = base, LazyTensors(self._lazy_group(name, tensor) for name, tensor in floating.items())

    def _lazy_group(self, name: str, tensor: torch.Tensor) -> LazyGroup:
        def fill(tensors: Tensors) -> None:
            with self._base.filled([name]):
                tensors[name].copy_(tensor)

        return LazyGroup(outlines={name: (tensor.shape, torch.float32)}, fill=fill)

    def copy(self, model: nn.Module) -> Any:
        """A copy of a model. Tensors that are the base's own become the lazy ones."""
        of_base = self._base.tensors
        names = {of_base[name].data_ptr(): name for name in self.lazy.tensors}
        copied: Any = copy.deepcopy(model, module_copies.tensors_of(model))
        for tensor in (*copied.parameters(), *copied.buffers()):
            name = names.get(tensor.data_ptr())
            if name is not None and shares_storage(of_base[name], tensor):
                tensor.data = self.lazy.tensors[name]
            elif tensor.is_floating_point():
                tensor.data = tensor.float()
        with_norms_in_blocks(copied.eval())
        return copied

    def run(self, runs: Sequence[ModelRun]) -> bool:
        """Run copies together. False if one failed, or read a tensor without values."""
        lazy = self.lazy
        run_together(runs, lazy.tensors, lambda names: lazy.filled(lazy.tensors[name] for name in names))
        return not lazy.forget_touched() and all(run.error is None for run in runs)


def _distances(outputs: Sequence[Any], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """The norm of the difference of two outputs, for each pair of their positions. Position -1 has zeros.

    Values that a mask has set in the first outputs do not count. A larger vocabulary counts as far as all have it.
    """
    squares = [0.0] * len(pairs)
    for given in zip(*map(tensors_of, outputs), strict=True):
        common = tuple(slice(min(sizes)) for sizes in zip(*(tensor.shape for tensor in given), strict=True))
        values = [tensor[common].double() for tensor in given]
        counted = values[0].abs() < torch.finfo(torch.float32).max
        values.append(torch.zeros_like(values[0]))
        for number, (first, other) in enumerate(pairs):
            squares[number] += float(torch.where(counted, values[first] - values[other], 0.0).square().sum())
    return [math.sqrt(square) for square in squares]


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
