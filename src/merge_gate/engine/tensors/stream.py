"""Weights on their way to the device that computes. The base stays in host memory, memory-mapped.

In: a device, and weights by name. Out: the same weights on that device, one after another. Knows torch and nothing of
models. Nothing here changes a value.

On a GPU, the next weight is copied while the caller works on the current one. The copy goes through one of two pinned
buffers and a stream of its own. Weights that fit stay on the GPU for the other adapters of the base. The rest is copied
once for each adapter that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

SPARE_BYTES = 4 << 30
"""Memory of the device that stays free of weights: room for products and deltas of the largest module."""


class Weights:
    """The weights of one base on one device.

    Args:
        weights: in host memory, by name; never written to.
        device: the device to copy them to.
        free_bytes: returns the free memory of the device; called before a weight is kept. A CPU has none to offer,
            because the weights are in host memory already.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._weights, self._device = weights, device
        self._free_bytes = free_bytes or (lambda: _free_bytes(device))
        self._kept: dict[str, torch.Tensor] = {}

    def stream(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """These weights on the device, in this order."""
        wanted = list(names)
        here = {name: self._kept[name] for name in wanted if name in self._kept}
        travelling = stream_to(self._device, (self._weights[name] for name in wanted if name not in here))
        for name in wanted:
            weight = here.get(name)
            if weight is None:
                weight = next(travelling)
                if self._free_bytes() - SPARE_BYTES > weight.numel() * weight.element_size():
                    self._kept[name] = weight
            yield weight


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def stream_to(device: torch.device, weights: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The weights, one after another, on `device`. The next one is copied while the caller works on the current one.

    A weight stays on the device until the caller drops it. On a CPU these are the weights themselves.
    """
    if device.type != "cuda":
        yield from (weight.detach().to(device) for weight in weights)
        return
    stager = _Stager(device)
    pending: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for weight in weights:
        following = stager.send(weight.detach())
        if pending is not None:
            yield stager.receive(*pending)
        pending = following
    if pending is not None:
        yield stager.receive(*pending)


class _Stager:
    """Two pinned host buffers used in turn, and the stream that copies them to the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: list[torch.Tensor | None] = [None, None]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        turn, self._turn = self._turn, 1 - self._turn
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()  # the last copy out of this buffer must be complete
        source = self._stage(turn, weight)
        with torch.cuda.stream(self._stream):
            arrived = source.to(self._device, non_blocking=True)
            event = self._stream.record_event()
        self._sent[turn] = event
        return arrived, event

    def receive(self, arrived: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(event)
        arrived.record_stream(consumer)
        return arrived

    def _stage(self, turn: int, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_cuda or weight.is_pinned():
            return weight
        size_bytes = weight.numel() * weight.element_size()
        buffer = self._pinned[turn]
        if buffer is None or buffer.numel() < size_bytes:
            buffer = self._pinned[turn] = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return buffer[:size_bytes].view(weight.dtype).view(weight.shape).copy_(weight)
