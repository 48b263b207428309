"""The proof of a merge: the merged layer computes what the layer computes with its adapter, on the same input.

In: a tuner layer over float32 copies of its tensors, before its merge by PEFT and after it. Out: `LayerDifference`.

1. Make two inputs from the shapes of the base's layer. Each class of `_inputs` has its own kind of input. An embedding
   has one input instead, of all its rows in random order, and a few rows only if its class does not take all of them.
2. Run the base's layer, and the layer with its adapter. What does not run alone, or draws random numbers, is not
   compared. Values that are not finite do not count.
3. Run the merged layer, and compare. The input on which the two differ less counts. Then compare each output of a
   linear layer and of attention, and each channel of a convolution, by itself. Of an embedding, and of experts, the
   output that differs most counts: a row, or what one expert returns.

A merge that PEFT makes right differs by the rounding of float32, which is at most 4.4e-7 of the output. A wrong one
differs by a part of what the adapter changes: 10 % for a scale that is 10 % off. So a layer differs if it exceeds both
limits.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME
from merge_gate.engine.tensors.placement import raise_if_of_the_run, random_states, restore_random
from merge_gate.records.measured import LayerDifference

MOST_ERROR_SHARE = 0.01
"""The accepted error, as a share of what the adapter changes. PEFT's own layers have 1.5e-4 at most."""

LOST_SHARE = 1e-5
"""The accepted error, as a share of what the layer returns. float32 loses a delta that is close to zero."""

MOST_ROWS = 64
"""The limit of an embedding's rows in an input, and the limit of trained tokens in addition."""

MOST_VALUES = 1 << 26
"""The limit of values that a convolution takes or returns: 256 MiB. Its configuration can name any reach."""

TINY = torch.finfo(torch.float32).tiny


def difference(layer: LayerDifference) -> float:
    """The error as a share of what the adapter changes, or of a thousandth of the output if that is more."""
    return _difference(layer.change_share, layer.output_share)


def _difference(change_share: float, output_share: float) -> float:
    return min(change_share, output_share * MOST_ERROR_SHARE / LOST_SHARE)


def differs(layer: LayerDifference) -> bool:
    return difference(layer) > MOST_ERROR_SHARE


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore torch's random generators after the block."""
    states = random_states()
    try:
        yield
    finally:
        restore_random(states)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """The `inputs` of each call of a layer, what it returned with its adapter, and its `changes`.

    `is_apart`: each row of an output is compared. Otherwise, a batch has an output per input, and the best counts.
    `dim` is then the dimension of the layer's outputs (channels).
    """

    inputs: list[tuple[Tensor, ...]]
    adapted: list[Tensor]
    changes: list[Tensor]
    is_apart: bool
    dim: int

    def compared(self, module: str, class_name: str, merged: nn.Module) -> LayerDifference | None:
        """Step 3. None if the adapter changes nothing, or if only the merged layer returns NaN or an infinity.

        Such a merge is measured anyway.
        """
        try:
            change, output = self._shares(merged)
        except Exception as error:
            raise_if_of_the_run(error)
            if "DefaultCPUAllocator" in str(error):  # what torch raises if there is no memory
                raise
            change = output = math.inf
        if math.isnan(change):
            return None
        return LayerDifference(module=module, class_name=class_name, change_share=change, output_share=output)

    def _shares(self, merged: nn.Module) -> tuple[float, float]:
        """The error as a share of the adapter's change, and of the output. NaN as `compared` returns None."""
        calls = zip(self.inputs, self.adapted, strict=True)
        errors = [_run(merged, given) - adapted for given, adapted in calls]
        whole = self._worst(errors, None if self.is_apart else ())
        if self.is_apart or math.isnan(whole[0]) or _difference(*whole) > MOST_ERROR_SHARE or self._are_near(errors):
            return whole
        of_outputs = self._worst(errors, (self.dim,))
        return of_outputs if _difference(*of_outputs) > MOST_ERROR_SHARE else whole

    def _are_near(self, errors: list[Tensor]) -> bool:
        """Whether the error of each output is too small a share of it to count, whatever the adapter changes there."""
        norms = [
            [_norms(part, adapted.isfinite(), (self.dim,)) for part in (error, adapted)]
            for error, adapted in zip(errors, self.adapted, strict=True)
        ]
        return all(bool((error <= LOST_SHARE * size).all()) for error, size in norms)

    def _worst(self, errors: list[Tensor], kept: tuple[int, ...] | None) -> tuple[float, float]:
        """Both shares of the output that differs most, on the input on which it differs least."""
        tensors = zip(errors, self.changes, self.adapted, strict=True)
        norms = [[_norms(part, adapted.isfinite(), kept) for part in (error, change, adapted)]
                 for error, change, adapted in tensors]  # fmt: skip
        error, change, size = (torch.cat(parts, dim=1) for parts in zip(*norms, strict=True))
        most = torch.maximum(change, error - change)
        counts = (most != 0).any(dim=0)
        shares = torch.stack((error / most, error / size.clamp(min=TINY)))[:, :, counts]
        if not shares.numel() or shares[:, most[:, counts] != 0].isnan().any():
            return math.nan, math.nan
        differences = torch.minimum(shares[0], shares[1] * (MOST_ERROR_SHARE / LOST_SHARE))
        best, inputs = differences.where(most[:, counts] != 0, math.inf).min(dim=0)
        output = best.argmax()
        return float(shares[0, inputs[output], output]), float(shares[1, inputs[output], output])


def unmerged(layer: Any, device: torch.device) -> Unmerged | None:
    """Steps 1 and 2. None if the layer cannot be compared."""
    layer.eval()  # PEFT leaves a combined adapter in training mode, in which dropout is random
    for inputs in _all_inputs(layer):
        try:
            return _unmerged(layer, [tuple(tensor.to(device) for tensor in given) for given in inputs])
        except Exception as error:  # the layer needs other inputs
            raise_if_of_the_run(error)
    return None


def _unmerged(layer: Any, inputs: list[tuple[Tensor, ...]]) -> Unmerged | None:
    base_layer = layer.get_base_layer()
    is_apart = not isinstance(base_layer, nn.Linear | Conv1D | nn.MultiheadAttention | _CONVOLUTIONS)
    adapted, changes = list[Tensor](), list[Tensor]()
    drawn = random_states()
    for given in inputs:
        plain, output = _run(base_layer, given), _run(layer, given)
        counts = plain.isfinite() & output.isfinite()
        changes.append(output - plain)
        adapted.append(output.masked_fill_(~counts, math.nan))
    if not all(map(torch.equal, drawn, random_states())):
        return None  # PVeRA can draw random numbers on each call
    dim = 1 if isinstance(base_layer, _CONVOLUTIONS) else -1
    return Unmerged(inputs=inputs, adapted=adapted, changes=changes, is_apart=is_apart, dim=dim)


_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _run(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    returned = module(*given)
    values: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return values.clone()  # of 4 bits, it may be a view of what the layer still uses


def _norms(values: Tensor, counts: Tensor, kept: tuple[int, ...] | None) -> Tensor:
    """The norms over all dimensions but the first one, which counts inputs, and the `kept` ones: (inputs, outputs).

    None: the norm of each row, as outputs of one input.
    """
    rows = values.masked_fill(~counts, 0.0)
    if kept is None:
        rows = rows.reshape(-1, values.shape[-1])[None]
    else:
        rows = rows.movedim(kept, tuple(range(1, len(kept) + 1))).flatten(len(kept) + 1)
        rows = rows if kept else rows[:, None]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms


def _all_inputs(layer: Any) -> Iterator[list[tuple[Tensor, ...]]]:
    """Step 1: the arguments of each call. The next ones are tried if the layer does not take these."""
    base_layer, generator = layer.get_base_layer(), torch.Generator().manual_seed(0)
    if isinstance(base_layer, nn.Embedding):
        rows = torch.randperm(base_layer.num_embeddings, generator=generator)
        most = max(1, MOST_VALUES // 16 // base_layer.embedding_dim)
        given: list[tuple[Tensor, ...]] = [(part[None],) for part in torch.split(rows, most)]
        if _takes(base_layer, given):
            yield given
    if some := _inputs(layer, generator):
        yield [some]


def _takes(layer: nn.Embedding, inputs: Iterable[tuple[Tensor, ...]]) -> bool:
    """Whether the layer accepts these rows. A class may shift them, and on a GPU a wrong index ends the process."""
    narrow = copy.copy(layer)
    narrow._parameters = {"weight": nn.Parameter(torch.zeros(layer.num_embeddings, 1), requires_grad=False)}
    try:
        for given in inputs:
            narrow(*given)
    except Exception:
        return False
    return True


def _inputs(layer: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The positional arguments of the layer's forward, for a batch of two; () if they are unknown."""
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, nn.Embedding):
        # Rows of the first half only: some classes shift the index, or compute it.
        rows = torch.randperm(max(1, base_layer.num_embeddings // 2), generator=generator)[:MOST_ROWS]
        tokens = (getattr(layer, "token_indices", None) or {}).get(ADAPTER_NAME, ())
        return (torch.cat((rows, torch.tensor(tokens[:MOST_ROWS], dtype=rows.dtype)))[None],)
    if isinstance(base_layer, nn.Linear | Conv1D):
        features = base_layer.nx if isinstance(base_layer, Conv1D) else base_layer.in_features
        return (torch.randn(2, 4, features, generator=generator),)
    if isinstance(base_layer, _CONVOLUTIONS):
        return _picture(base_layer, generator)
    if isinstance(base_layer, nn.MultiheadAttention):
        return (torch.randn(4, 1, base_layer.embed_dim, generator=generator),) * 3
    size = getattr(base_layer, "hidden_dim", None) or getattr(base_layer, "hidden_size", None)
    count = getattr(base_layer, "num_experts", None)
    if size and count and [*inspect.signature(base_layer.forward).parameters][:1] == ["hidden_states"]:  # experts
        states = torch.randn(count, size, generator=generator)
        return states, torch.arange(count)[:, None], torch.ones(count, 1)  # a token for each of them
    return ()


def _picture(layer: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random values inside a border of zeros. PEFT pads its own part with zeros, whatever the layer pads with.

    One window of the kernel at least is inside, wherever the strides begin.
    """
    reach = [1 + step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    inside = [size + stride for size, stride in zip(reach, layer.stride, strict=True)]
    sizes = (2 * border + size for border, size in zip(reach, inside, strict=True))
    if 2 * math.prod(sizes) * max(layer.weight.shape[:2]) > MOST_VALUES:
        return ()
    borders = [size for size in reversed(reach) for _ in range(2)]
    return (nn.functional.pad(torch.randn(2, layer.in_channels, *inside, generator=generator), borders),)
