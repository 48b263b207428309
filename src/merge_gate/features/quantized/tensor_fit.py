"""Measures one tensor of a release: the factor of the delta that is in it, the error of that factor, and the rest.

In: tensors of base, merge, and release. Out: a `TensorStrength`. Judges nothing.

1. The products of W, D, e, and Q - W are added up in float64, row by row, in blocks of rows (`_Products`).
2. Least squares gives Q ≈ a(W + kD) + e: quantizers that fit or clip their scales shrink values. With D⊥, the part of
   D that W and e do not explain, ak = ⟨Q - W, D⊥⟩ / ‖D⊥‖².
3. The standard error of k is the largest of three: for white noise, ‖r‖ / (√n ‖D⊥‖); for noise that is alike within a
   row, from the sums ⟨rᵢ, D⊥ᵢ⟩ of the rows (White, Econometrica 48, 1980); and of the same fit on shuffled rows of D.
4. W + kD is quantized again, which gives the noise to expect: of the tensor, and of each row. k is divided by the share
   of it that this leaves, because clipped scales take more from some deltas.
5. Is the tensor nearer to a merge into codes?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from merge_gate.features.quantized.measurement import TOLERANCE, TensorStrength

BLOCK = 1 << 18
"""Values that are multiplied at once: 14 MiB in float64."""

SHUFFLES, FITTED = 4, 3
"""Deltas with shuffled rows, whose seed is fixed, so that a report can be repeated; the number of fitted factors."""

LARGE = 1.5
"""A value of D is large above this multiple of its root mean square in a block."""

PARALLEL = 1e-6
"""A vector has no part of its own if other ones explain all but this share of its square."""

UNLIKE = 0.5
"""Below this factor of the base's values, a tensor does not resemble them; above this share of its square, a row."""

MOST_SHARES = 4.0
"""The share of noise in the square of a row may be so many times the median of its tensor."""

LEAST_NORMS, SAME_NORMS = 16, 0.8
"""Norms of so many rows or columns are the same if they correlate more than this."""

EXPLAINED = 0.5
"""A quantized tensor explains another one that is nearer to it than to others by this factor."""

ROUNDED, LEAST_NOISE, LEAST_ROW = 2**-8, 0.1, 0.01
"""What rounding to bfloat16 may add to the noise of a value; and what the mean squares of the rows add to the noise and
the values of a row: scales of blocks suit larger rows."""

SURE_ERRORS, OTHER_QUANTIZER = 3.0, 0.02
"""A loss of the delta counts if it is larger than so many standard errors. If the release has other codes than the
quantization that is repeated, its quantizer may take so much more or less of some deltas."""

FIGURES = ("numel", "strength", "error", "scale", "scale_error", "weight", "delta", "noise", "distance", "bend")
"""What a fit knows, and `TensorStrength` has."""

Requantize = Callable[[torch.Tensor], torch.Tensor | None]

_VECTORS = 5
_W, _D, _E, _Y, _LARGE = range(_VECTORS)


class _Products:
    """Step 1: the products of the vectors: for each row and each column (`by_axis`), and with shuffled rows of D."""

    def __init__(self, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> None:
        by_row, self.shuffled = [], torch.zeros(SHUFFLES, _VECTORS, dtype=torch.float64)
        by_column = torch.zeros(base[0].numel() if len(base) else 0, _VECTORS, _VECTORS, dtype=torch.float64)
        random = torch.Generator().manual_seed(0)
        for rows in _blocks(base):
            w, m, q = (tensor[rows].double().flatten(1) for tensor in (base, merged, actual))
            d, e = m - w, merged[rows].to(dtype).double().flatten(1) - m
            is_large = d.abs() > LARGE * d.square().mean().sqrt()
            vectors = torch.stack((w, d, e, q - w, d * is_large), 1)
            by_row.append(vectors @ vectors.mT)
            by_column += vectors.permute(2, 1, 0) @ vectors.permute(2, 0, 1)
            if bool(d.any()):
                others = [d[torch.randperm(len(d), generator=random)] for _ in range(SHUFFLES)]
                self.shuffled += (torch.stack(others, 1) @ vectors.mT).sum(0)
        self.by_axis = torch.cat(by_row), by_column
        self.total = by_column.sum(0)

    def norm(self, which: int) -> float:
        return math.sqrt(max(0.0, float(self.total[which, which])))

    def rest(self, vector: torch.Tensor, others: list[int]) -> torch.Tensor:
        """The part of a combination of vectors that the others do not explain, by least squares: its coefficients."""
        if not others:
            return vector
        sizes = self.total.diagonal()[others].sqrt()
        gram = self.total[others][:, others] / sizes[:, None] / sizes
        rest = vector.clone()
        rest[others] -= torch.linalg.lstsq(gram, self.total[others] @ vector / sizes, driver="gelsd").solution / sizes
        return rest

    def product(self, first: torch.Tensor, second: torch.Tensor) -> float:
        return float(first @ self.total @ second)

    def factor(self, of: torch.Tensor, along: torch.Tensor, numel: int) -> tuple[float, float]:
        """Steps 2 and 3: the factor of a combination in another one, and its standard error."""
        size = self.product(along, along)
        factor = self.product(of, along) / size
        residual, by_row = of - factor * along, self.by_axis[0]
        variances = (
            max(0.0, self.product(residual, residual)) / max(1, numel - FITTED) * size,
            float(torch.einsum("i,rij,j->r", residual, by_row, along).square().sum())
            * (len(by_row) / max(1, len(by_row) - FITTED)),
            float((self.shuffled @ residual).square().mean()),
        )
        return factor, math.sqrt(max(variances)) / size


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    count = max(1, BLOCK // max(1, tensor[0].numel())) if len(tensor) else 1
    return (slice(start, start + count) for start in range(0, len(tensor), count))


class _Fit:
    """Steps 1 to 3. For a delta of zero, or one that is parallel to W, only the factor of W is fitted.

    `along` and `residual` are combinations of the vectors: D⊥, or None, and r.
    """

    def __init__(self, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> None:
        base, merged, actual = (t.reshape(-1, 1) if t.dim() < 2 else t for t in (base, merged, actual))  # noqa: PLR2004 - a vector
        self.products = products = _Products(base, merged, actual, dtype)
        self.numel, self.columns = base.numel(), base[0].numel() if len(base) else 0
        self.weight, self.delta, self.distance = (products.norm(which) for which in (_W, _D, _Y))
        unit = torch.eye(_VECTORS).double()
        others = [which for which in (_W, _E) if products.norm(which) > math.sqrt(PARALLEL) * self.delta]
        along, self.residual = (products.rest(unit[which], others) for which in (_D, _Y))
        self.along = along if self.delta and products.product(along, along) > PARALLEL * self.delta**2 else None
        self.strength, self.error, self.bend = 0.0, math.inf, 0.0
        if self.along is not None:
            factor, error = products.factor(self.residual, along, self.numel)
            self.residual = self.residual - factor * along
        self.scale = 1 - float(self.residual[_W])
        self.noise = math.sqrt(max(0.0, products.product(self.residual, self.residual)))
        own = products.rest(unit[_W], [_D] if self.along is not None else [])
        own_size = math.sqrt(max(0.0, products.product(own, own)) * max(1, self.numel))
        self.scale_error = self.noise / own_size if own_size else 0.0
        if self.along is None:
            return
        shrunk = max(self.scale, UNLIKE)
        self.strength, self.error = factor / shrunk, error / shrunk
        large = products.rest(unit[_LARGE], [*others, _D])
        if products.product(large, large) > PARALLEL * self.delta**2:
            bend, error = products.factor(self.residual, large, self.numel)
            self.bend = bend / error if error else 0.0

    def squares(self, vector: torch.Tensor, axis: int) -> torch.Tensor:
        """The square of a combination of vectors in each row, or in each column."""
        return torch.einsum("i,rij,j->r", vector, self.products.by_axis[axis], vector).clamp(min=0)

    def chances(self, noise: torch.Tensor, axis: int) -> torch.Tensor:
        """How far the strength of each row or column is from k: squares, in variances for noise of this square in it.

        A variance allows for a factor of its own values, which differs from a by half the tolerance.
        """
        if self.along is None:
            return noise.new_zeros(1)
        products, count = self.products.by_axis[axis], self.numel / len(noise)
        of_noise, of_delta, of_weight = (
            torch.einsum("i,rij,j->r", vector, products, self.along)
            for vector in (self.residual, self.along, torch.eye(_VECTORS).double()[_W])
        )
        variance = of_delta.clamp(min=0) * noise / count + (TOLERANCE / 2 * of_weight).square()
        return (of_noise.square() / variance).nan_to_num(0.0, 0.0)


def fitted(  # noqa: PLR0917
    outline: TensorStrength,
    base: torch.Tensor,
    merged: torch.Tensor,
    actual: torch.Tensor,
    dtype: torch.dtype,
    requantized: Requantize | None = None,
) -> TensorStrength:
    """The figures of a tensor, from W, W + D, and Q in one shape and in float32.

    `dtype` is that of the base's files: the merge may have been rounded to it. Without `requantized`, the noise to
    expect is unknown.
    """
    if bad := sum(map(_nonfinite, (base, merged, actual))):
        return replace(outline, nonfinite=bad)
    fit = _Fit(base, merged, actual, dtype)
    figures = {name: getattr(fit, name) for name in FIGURES}
    facts = replace(outline, rotated=_is_rotated(fit.scale, base, actual), **figures)
    of_base = requantized(base) if requantized is not None else None
    if requantized is None or of_base is None:
        return facts
    # 4.
    times = 1.0 if math.isinf(fit.error) else fit.strength
    expected = base.lerp(merged, times) if fit.delta else base
    proper = requantized(expected) if fit.delta else of_base
    if proper is None:
        return facts
    again = _Fit(base, merged, proper, dtype)
    whole = torch.tensor([1.0, times, 0.0, 0.0, 0.0]).double()
    (own, loudest, uneven), (_, _, of_columns) = (_compared(fit, again, whole, axis) for axis in (0, 1))
    own_noise = math.sqrt(float(own.sum()))
    facts = replace(
        facts,
        own_noise=own_noise,
        own_scale=again.scale,
        loudest=loudest,
        uneven=max(uneven, of_columns),
        changed=int((of_base != actual).count_nonzero()) / max(1, fit.numel),
    )
    # 5.
    if (
        not outline.kind
        or math.isinf(facts.error)
        or (into_codes := requantized((merged - base).add_(of_base))) is None
    ):
        return facts
    to_codes, to_proper, to_base = (float((actual - values).norm()) for values in (into_codes, proper, of_base))
    if min(to_codes, to_proper, to_base) > EXPLAINED * own_noise:
        return replace(facts, error=math.hypot(facts.error, OTHER_QUANTIZER))
    if abs(facts.strength) > UNLIKE:
        lost = max(UNLIKE, again.strength / facts.strength)
        if abs(lost - 1) > SURE_ERRORS * facts.error:
            facts = replace(facts, strength=facts.strength / lost, error=facts.error / lost)
    return replace(facts, is_erased=to_codes < EXPLAINED * min(to_proper, to_base))


def _nonfinite(tensor: torch.Tensor) -> int:
    """How many values are not finite."""
    values = tensor.reshape(-1)
    parts = (values[start : start + BLOCK] for start in range(0, len(values), BLOCK))
    return len(values) - sum(int(part.isfinite().count_nonzero()) for part in parts)


def _compared(fit: _Fit, again: _Fit, whole: torch.Tensor, axis: int) -> tuple[torch.Tensor, float, float]:
    """Step 4, for rows or columns: squares of the noise to expect, and how far noise and strength of one are off."""
    sizes, noise = (fit.squares(vector, axis) for vector in (whole, fit.residual))
    own = again.squares(again.residual, axis) + ROUNDED**2 * sizes
    own += LEAST_NOISE * own.mean()
    shares = noise / (sizes + LEAST_ROW * sizes.mean())
    is_unlike = float(shares.max()) > max(UNLIKE, MOST_SHARES * float(shares.median()))
    noise = torch.maximum(noise, own)
    far, usual = fit.chances(noise, axis), again.chances(own, axis)
    largest = 2 * math.log(len(far) + 1)  # of as many squares by chance
    uneven = max(float(far.mean() / usual.mean().clamp(min=1)), float(far.max() / usual.max().clamp(min=largest)))
    return own, math.inf if is_unlike else math.sqrt(float((noise / own).max())), uneven


def _is_rotated(scale: float, base: torch.Tensor, actual: torch.Tensor) -> bool:
    """Whether rows or columns have the base's norms, with other values: a rotation keeps the norms."""
    if abs(scale) > UNLIKE or base.dim() != 2 or min(base.shape) < LEAST_NORMS:  # noqa: PLR2004 - a matrix
        return False
    pairs = (torch.stack([tensor.norm(dim=dim) for tensor in (base, actual)]) for dim in (0, 1))
    return any(float(pair.corrcoef()[0, 1]) > SAME_NORMS for pair in pairs)
