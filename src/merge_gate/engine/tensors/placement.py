"""Which device merges a layer, where its tensors are meanwhile, how a card computes, and which errors are a card's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from merge_gate._internal.errors import CardError
from merge_gate.engine.tensors.quantized import is_quantized

SPARE_BYTES = 4 << 30
"""Memory of a card that stays free of weights, for the products and deltas of the largest module."""

_OF_A_CARD = re.compile(r"(?i)(cuda|hip|miopen|(cu|hip)(blas|dnn|solver|sparse|fft))( driver)? error\b")


def device_of(layer: Any, device: torch.device) -> torch.device:
    """The device that merges a layer: the run's, or the CPU if the adapter has indices.

    An index out of range ends a card's context, and with it the process. A quantized weight stays on the run's device.
    """
    base = set(layer.get_base_layer().modules())
    if device.type == "cpu" or any(is_quantized(parameter) for parameter in layer.get_base_layer().parameters()):
        return device
    return torch.device("cpu") if any(map(_has_indices, set(layer.modules()) - base)) else device


def _has_indices(module: nn.Module) -> bool:
    """Whether it has a list, or a tensor of integers."""
    dtypes = {value.dtype for value in _held(module) if isinstance(value, torch.Tensor)} - {torch.bool}
    has_list = any(isinstance(value, list) for value in _held(module))
    return has_list or not all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _held(module: nn.Module) -> list[Any]:
    """What the dictionaries of a module hold: parameters, buffers, and what PEFT has by the adapter's name."""
    return [value for held in vars(module).values() if isinstance(held, dict) for value in held.values()]


@contextlib.contextmanager
def placed(layer: Any, device: torch.device, *, apart: Collection[int]) -> Iterator[None]:
    """Inside of the `with` block, the tensors of a layer are on the device, in their own dtypes.

    PEFT's own move (`_move_adapter_to_device_of_base_layer`) also casts them to the weight's dtype, leaves out the
    layers inside of this one, and cannot be undone. `apart` has the ids of tensors that stay.
    """
    held = (value for module in layer.modules() for value in _held(module))
    tensors = {id(value): value for value in held if isinstance(value, torch.Tensor)}
    moved = [(tensor, tensor.data) for key, tensor in tensors.items() if key not in apart and tensor.device != device]
    try:
        for tensor, data in moved:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in moved:
            tensor.data = data


class WeightsOnDevice:
    """A base's weights on the device that computes. A card `keeps` them for other adapters, if they fit."""

    def __init__(self) -> None:
        self.keeps = True
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        weight = self._kept.get(name)
        if weight is None:
            weight = tensor.detach().to(device)
            if self.keeps and weight.is_cuda and torch.cuda.mem_get_info(device)[0] - SPARE_BYTES > weight.nbytes:
                self._kept[name] = weight
        return weight

    def drop(self) -> bool:
        """Free what a card keeps, and keep nothing from now on. False if it kept nothing."""
        had, self.keeps, self._kept = bool(self._kept), False, {}
        return had


def compute_in_full_precision() -> None:
    """Multiply float32 as float32, and add 16-bit products in float32."""
    if hasattr(torch.backends, "fp32_precision"):  # before the older settings, which read it
        torch.backends.fp32_precision = "ieee"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False


def random_states() -> list[torch.Tensor]:
    """The states of torch's generators: the CPU's, and that of each card in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else ())]


def restore_random(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


def raise_if_of_the_run(error: Exception) -> None:
    """Raise an error that says nothing about an adapter: a lack of memory as it is, and `CardError` for a card's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)  # PEFT quotes configs
    if is_of_torch and _OF_A_CARD.match(str(error)):
        raise CardError(f"the GPU failed: {str(error).splitlines()[0]}") from error


def confirm_card(device: str) -> None:
    """Raise `CardError` if a card no longer works: an error of a kernel comes with a later call, or was caught."""
    if device != "cpu":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise_if_of_the_run(error)
