"""Weights on their way to a device, with CPU tensors: what arrives, in which order, and how often it travels."""

from __future__ import annotations

import torch

from merge_gate.engine.tensors import stream
from merge_gate.engine.tensors.stream import SPARE_BYTES, Weights, stream_to

CPU = torch.device("cpu")
NAMES = [f"layers.{index}.weight" for index in range(6)]


class Room:
    """Free memory of a device that loses what is kept there."""

    def __init__(self, size_bytes: int) -> None:
        self.free = SPARE_BYTES + size_bytes

    def __call__(self) -> int:
        return self.free


class Traffic:
    """`stream_to` itself, and a count of what went through it."""

    def __init__(self, room: Room) -> None:
        self.sent: list[float] = []
        self.room = room

    def __call__(self, device, weights):
        for weight in stream_to(device, weights):
            self.sent.append(weight[0, 0].item())
            yield weight.clone()
            self.room.free -= weight.numel() * weight.element_size()


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.full((8, 8), float(index)) for index, name in enumerate(NAMES)}


def firsts(arrived) -> list[float]:
    return [weight[0, 0].item() for weight in arrived]


def test_a_stream_to_the_cpu_yields_the_weights_themselves() -> None:
    mine = list(weights().values())
    arrived = list(stream_to(CPU, mine))
    assert [one.data_ptr() for one in arrived] == [one.data_ptr() for one in mine]


def test_on_a_cpu_nothing_is_kept_and_nothing_is_copied() -> None:
    mine = weights()
    held = Weights(mine, CPU)
    for _ in range(2):
        assert [one.data_ptr() for one in held.stream(NAMES)] == [mine[name].data_ptr() for name in NAMES]


def test_what_fits_travels_once_for_all_adapters(monkeypatch) -> None:
    room = Room(1 << 20)
    traffic = Traffic(room)
    monkeypatch.setattr(stream, "stream_to", traffic)
    held = Weights(weights(), CPU, free_bytes=room)
    assert firsts(held.stream(NAMES)) == [0, 1, 2, 3, 4, 5]
    assert firsts(held.stream(NAMES[::-1])) == [5, 4, 3, 2, 1, 0]
    assert firsts(held.stream([NAMES[3]])) == [3]
    assert traffic.sent == [0, 1, 2, 3, 4, 5]


def test_what_does_not_fit_travels_again_and_in_order(monkeypatch) -> None:
    size = 8 * 8 * 4
    room = Room(2 * size + 1)
    traffic = Traffic(room)
    monkeypatch.setattr(stream, "stream_to", traffic)
    held = Weights(weights(), CPU, free_bytes=room)
    assert firsts(held.stream(NAMES)) == [0, 1, 2, 3, 4, 5]
    assert traffic.sent == [0, 1, 2, 3, 4, 5]
    assert firsts(held.stream(NAMES)) == [0, 1, 2, 3, 4, 5]
    assert traffic.sent[6:] == [2, 3, 4, 5]


def test_a_card_without_room_keeps_nothing() -> None:
    held = Weights(weights(), CPU, free_bytes=lambda: SPARE_BYTES)
    list(held.stream(NAMES))
    assert held._kept == {}
