"""Quantizers with the noise of the formats: round to nearest, and calibrated ones, whose noise is not white.

In: a weight (rows, columns). Out: a `Grid`, which has the quantized values. Their calibration data has columns of very
different sizes that correlate, as activations do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bitsandbytes import functional

from merge_gate.features.quantized.layouts import Grid
from merge_gate.features.quantized.release import OpenTensor

GROUP = 64
_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def activations(columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(columns)
    mixed = torch.randn(512, columns, generator=random) @ (
        torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=random) / columns**0.5 * 4
    )
    return mixed * torch.randn(columns, generator=random).exp()


def _affine(values: torch.Tensor, ratio: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros (rows, groups) of 4 bits, from the extremes of each group, clipped by a ratio."""
    groups = values.unflatten(1, (-1, GROUP))
    low, high = (groups.amin(2).clamp(max=0) * ratio, groups.amax(2).clamp(min=0) * ratio)
    scales = ((high - low) / 15).clamp(min=1e-8)
    return scales, (-low / scales).round()


def _grid(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Grid:
    groups = torch.arange(values.shape[1]) // (values.shape[1] // scales.shape[1])
    codes = (values / scales[:, groups] + zeros[:, groups]).round().clamp(0, 15).to(torch.uint8)
    return Grid(codes, scales, -scales * zeros, groups, bits=4)


def rounded(values: torch.Tensor) -> Grid:
    """4 bits in groups, to the nearest."""
    return _grid(values, *_affine(values))


def clipped(values: torch.Tensor) -> Grid:
    """AWQ's clipping: per group, the ratio with the least error of the output."""
    weights = activations(values.shape[1]).square().mean(0)
    errors = []
    for ratio in _RATIOS:
        error = (_grid(values, *_affine(values, ratio)).values() - values).square() * weights
        errors.append(error.unflatten(1, (-1, GROUP)).sum(2))
    best = torch.stack(errors).argmin(0)
    return _grid(values, *_affine(values, torch.tensor(_RATIOS)[best]))


def gptq(values: torch.Tensor) -> Grid:
    """GPTQ (arXiv:2210.17323): each column's error is made up for by the columns that follow."""
    inputs, values = activations(values.shape[1]), values.clone()
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scales, zeros = _affine(values)
    for column in range(values.shape[1]):
        scale, zero = scales[:, column // GROUP], zeros[:, column // GROUP]
        nearest = ((values[:, column] / scale + zero).round().clamp(0, 15) - zero) * scale
        error = (values[:, column] - nearest) / inverse[column, column]
        values[:, column] = nearest
        values[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
    return _grid(values, scales, zeros)


def important(values: torch.Tensor) -> Grid:
    """llama.cpp's Q4_0 with an importance matrix: per block of 32, the scale with the least weighted error."""
    blocks = values.unflatten(1, (-1, 32))
    weights = (
        activations(values.shape[1]).square().mean(0).unflatten(0, (-1, 32))
        * (blocks.square().mean(2, keepdim=True) + blocks.square()).sqrt()
    )
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0]
    scales, best = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for step in range(-9, 10):
        first = -(8 + 0.1 * step) / largest
        codes = (first[..., None] * blocks).round().clamp(-8, 7)
        fitted = (weights * codes * blocks).sum(2) / (weights * codes * codes).sum(2).clamp(min=1e-12)
        error = (weights * (codes * fitted[..., None] - blocks).square()).sum(2)
        scales, best = torch.where(error < best, fitted, scales), torch.minimum(error, best)
    groups = torch.arange(values.shape[1]) // 32
    codes = (values / scales[:, groups]).round().clamp(-8, 7) + 8
    return Grid(codes.to(torch.uint8), scales, -8 * scales, groups, bits=4)


def in_rows(values: torch.Tensor) -> Grid:
    """8 bits with a scale for each row, as bitsandbytes and compressed-tensors have."""
    scales = values.abs().amax(1, keepdim=True) / 127
    return Grid(
        (values / scales).round().to(torch.int8), scales, torch.zeros_like(scales), torch.zeros(values.shape[1]).int()
    )


def float8(values: torch.Tensor) -> Grid:
    scales = values.abs().amax(1, keepdim=True) / 448
    codes = (values / scales).to(torch.float8_e4m3fn)
    return Grid(codes, scales, torch.zeros_like(scales), torch.zeros(values.shape[1]).int())


def nf4(values: torch.Tensor) -> Grid:
    """bitsandbytes' NF4 in blocks of 64."""
    table = functional.get_4bit_type("nf4", device="cpu")
    scales = values.unflatten(1, (-1, GROUP)).abs().amax(2)
    groups = torch.arange(values.shape[1]) // GROUP
    grid = Grid(torch.zeros(values.shape, dtype=torch.uint8), scales, torch.zeros_like(scales), groups, 4, table)
    order = table.sort()
    codes = torch.bucketize(values / scales[:, groups], (order.values[1:] + order.values[:-1]) / 2)
    return grid._replace(codes=order.indices[codes].to(torch.uint8))


QUANTIZERS: dict[str, Callable[[torch.Tensor], Grid]] = {
    "rounded": rounded, "clipped": clipped, "gptq": gptq, "important": important, "in-rows": in_rows, "float8": float8,
    "nf4": nf4,
}  # fmt: skip


class MemoryRelease:
    """A release whose matrices went through a quantizer, or are on the `grids` that they came from already."""

    def __init__(self, tensors: dict[str, torch.Tensor], quantizer: str, grids: dict[int, Grid] | None = None) -> None:
        self.format = quantizer
        self.added, self.settings = (), ()
        self._tensors = tensors
        own = {name: (grids or {}).get(id(tensor)) for name, tensor in tensors.items()}
        self._on_grid = {name for name, grid in own.items() if grid is not None}
        self._grids = {name: grid for name, grid in own.items() if grid is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def expects(self, _name: str) -> bool:
        return True

    def kind(self, name: str) -> str:
        return self.format if self._tensors[name].dim() == 2 and "layers" in name else ""

    def _grid(self, name: str) -> Grid:
        if name not in self._grids:
            self._grids[name] = QUANTIZERS[self.format](self._tensors[name])
        return self._grids[name]

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def open(self, name: str) -> OpenTensor:
        is_plain = name in self._on_grid or not self.kind(name)
        values = self._tensors[name] if is_plain else self._grid(name).values()

        def again(others: torch.Tensor, rows: slice) -> torch.Tensor | None:
            return self._grid(name).part(rows).nearest(others) if self.kind(name) else None

        return OpenTensor(tuple(values.shape), values.__getitem__, again)
