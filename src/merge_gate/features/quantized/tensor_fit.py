"""Measures one tensor of a release: the factor of the delta that is in it, the error of that factor, and the rest.

In: rows of base, merge, and release, in order. Out: a `TensorStrength`. Judges nothing.

1. W + D is quantized again, to Z, which gives the noise to expect: of the tensor, and of each row. The products of W,
   D, e, Q - W, and Z - W are made in float32 over blocks of rows, and added up in float64 (`_Sums`).
2. Least squares gives Q ≈ a(W + kD) + e: quantizers that fit or clip their scales shrink values. With D⊥, the part of
   D that W and e do not explain, ak = ⟨Q - W, D⊥⟩ / ‖D⊥‖².
3. The standard error of k is the largest of three: for white noise, ‖r‖ / (√n ‖D⊥‖); for noise that is alike within a
   row, from the sums ⟨rᵢ, D⊥ᵢ⟩ of the rows (White, Econometrica 48, 1980); and of the same fit on shuffled rows of D.
4. k is divided by the share of D that quantizing W + D leaves, because clipped scales take more from some deltas. If k
   is then not that of the merge, the share is that of W + kD.
5. Is the tensor nearer to a merge into codes?

Steps 1 to 4 rest on every value. The shuffles, the bend, the share of W + kD, and step 5 rest on blocks that are spread
over the tensor, with `SAMPLED` values (`_Sample`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from merge_gate.features.quantized.measurement import TOLERANCE, TensorStrength

BLOCK = 1 << 17
"""Values that are multiplied at once: they stay in the processor's cache."""

SAMPLED, LEAST_ROWS = 1 << 19, 64
"""The blocks of a sample have so many values, and so many rows, if the tensor has."""

SHUFFLES, FITTED = 8, 3
"""Deltas with shuffled rows, whose seed is fixed, so that a report can be repeated; the number of fitted factors."""

LARGE = 1.5
"""A value of D is large above this multiple of its root mean square."""

LEAST_COLUMNS = 32
"""A tensor of three dimensions has rows of its last one if that has so many values, as the experts of a layer have."""

MOST_VALUE = 1e15
"""If the products are not finite, values above this are counted as such: float32 has no place for their squares."""

PARALLEL = 1e-6
"""A vector has no part of its own if other ones explain all but this share of its square."""

UNLIKE = 0.5
"""Below this factor of the base's values, a tensor does not resemble them; above this share of its square, a row."""

MOST_SHARES, MOST_SHARE = 4.0, 1.0
"""The share of noise in the square of a row may be so many times the median of its tensor, and so much at most: the
noise to expect is as large if it was repeated with the release's own scales, which may be those of any values."""

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

Requantize = Callable[[torch.Tensor, slice], torch.Tensor | None]
"""Values of these rows (float32), quantized as the release is. None if that cannot be repeated."""

_W, _D, _E, _Y, _Z = range(5)
_PAIRS = [(i, j) for i in range(5) for j in range(i, 5) if (i, j) != (_Y, _Z)]
_PLACES = {
    which: torch.tensor([[_PAIRS.index((min(i, j), max(i, j))) for j in (_W, _D, _E, which)]
                         for i in (_W, _D, _E, which)]) for which in (_Y, _Z)
}  # fmt: skip
"""Where the products of W, D, e, and one more vector are among those of all pairs."""

_UNIT = torch.eye(4).double()


class _Sums:
    """Step 1: the products of the vectors: for each row, and for each column; and the columns' sums of each vector."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self.columns = self.sums = torch.zeros(0)

    def add(self, vectors: dict[int, torch.Tensor]) -> bool:
        """Add the vectors (rows, columns) of a block. False, and nothing is added, if a product is not finite."""
        count, width = vectors[_W].shape
        by_row = torch.zeros(count, len(_PAIRS), dtype=torch.float64)
        by_column = torch.zeros(len(_PAIRS), width, dtype=vectors[_W].dtype)
        product = torch.empty_like(vectors[_W])
        for place, (first, second) in enumerate(_PAIRS):
            if first in vectors and second in vectors:
                torch.mul(vectors[first], vectors[second], out=product)
                by_row[:, place] = product.sum(1)
                torch.sum(product, 0, out=by_column[place])
        if not bool(by_row.isfinite().all()):
            return False
        if not self.rows:
            self.columns = torch.zeros(len(_PAIRS), width, dtype=torch.float64)
            self.sums = torch.zeros(5, width, dtype=torch.float64)
        self.columns += by_column
        for which, vector in vectors.items():
            self.sums[which] += vector.sum(0)
        self.rows.append(by_row)
        return True

    def products(self, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The products of W, D, e, and this vector: (rows, 4, 4), and (columns, 4, 4)."""
        return torch.cat(self.rows)[:, _PLACES[which]], self.columns.T[:, _PLACES[which]]


class _Block(NamedTuple):
    """Values of some rows, to be quantized again and shuffled."""

    base: torch.Tensor
    merged: torch.Tensor
    actual: torch.Tensor
    rows: slice


def _rest(total: torch.Tensor, vector: torch.Tensor, others: list[int]) -> torch.Tensor:
    """The part of a combination of vectors that others do not explain, by least squares: its coefficients."""
    if not others:
        return vector
    sizes = total.diagonal()[others].sqrt()
    gram = total[others][:, others] / sizes[:, None] / sizes
    rest = vector.clone()
    rest[others] -= torch.linalg.lstsq(gram, total[others] @ vector / sizes, driver="gelsd").solution / sizes
    return rest


class _Fit:
    """Step 2. For a delta of zero, or one that is parallel to W, only the factor of W is fitted.

    `which` is the vector that is fitted: Q - W or Z - W. `along` and `residual` are combinations of W, D, e, and this
    vector: D⊥, or None, and r. `by_axis` has their products for each row, and for each column.
    """

    def __init__(self, sums: _Sums, which: int) -> None:
        self.by_axis = sums.products(which)
        self._total = self.by_axis[0].sum(0)
        rows, columns = map(len, self.by_axis)
        self.numel = rows * columns
        self.weight, self.delta, self.distance = (self._norm(unit) for unit in (_UNIT[_W], _UNIT[_D], _UNIT[_Y]))
        least = math.sqrt(PARALLEL) * self.delta
        self.others = [other for other in (_W, _E) if self._norm(_UNIT[other]) > least]
        along, self.residual = (_rest(self._total, _UNIT[vector], self.others) for vector in (_D, _Y))
        self.along = along if self.delta and self._norm(along) > least else None
        factor, self.error, self.bend = 0.0, math.inf, 0.0
        if self.along is not None:
            factor = float(self.residual @ self._total @ along) / self._norm(along) ** 2
            self.residual = self.residual - factor * along
        self.scale, self.noise = 1 - float(self.residual[_W]), self._norm(self.residual)
        self.strength = factor / max(self.scale, UNLIKE)
        own = _rest(self._total, _UNIT[_W], [_D] if self.along is not None else [])
        own_size = self._norm(own) * math.sqrt(max(1, self.numel))
        self.scale_error = self.noise / own_size if own_size else 0.0

    def _norm(self, combination: torch.Tensor) -> float:
        return math.sqrt(max(0.0, float(combination @ self._total @ combination)))

    def measure_error(self, along: torch.Tensor, shuffled: float) -> None:
        """Step 3. `shuffled` is the variance of ⟨r, D⟩ for shuffled rows of D."""
        size, by_row = self._norm(along) ** 2, self.by_axis[0]
        of_rows = torch.einsum("i,rij,j->r", self.residual, by_row, along)
        error = _error(self.noise**2, size, of_rows.double(), self.numel, shuffled)
        self.error = error / max(self.scale, UNLIKE)

    def squares(self, vector: torch.Tensor, axis: int) -> torch.Tensor:
        """The square of a combination of vectors in each row, or in each column."""
        return torch.einsum("i,rij,j->r", vector, self.by_axis[axis], vector).clamp(min=0)

    def chances(self, noise: torch.Tensor, axis: int) -> torch.Tensor:
        """How far the strength of each row or column is from k: squares, in variances for noise of this square in it.

        A variance allows for a factor of its own values, which differs from a by half the tolerance.
        """
        if self.along is None:
            return noise.new_zeros(1)
        products, count = self.by_axis[axis], self.numel / len(noise)
        of_noise, of_delta, of_weight = (
            torch.einsum("i,rij,j->r", vector, products, self.along)
            for vector in (self.residual, self.along, _UNIT[_W])
        )
        variance = of_delta.clamp(min=0) * noise / count + (TOLERANCE / 2 * of_weight).square()
        return (of_noise.square() / variance).nan_to_num(0.0, 0.0)


def _error(noise: float, size: float, of_rows: torch.Tensor, numel: int, shuffled: float) -> float:
    """Step 3, from the squares of r and D⊥, and the sums ⟨rᵢ, D⊥ᵢ⟩ of the rows."""
    of_rows_square = float(of_rows.square().sum()) * (len(of_rows) / max(1, len(of_rows) - FITTED))
    return math.sqrt(max(noise / max(1, numel - FITTED) * size, of_rows_square, shuffled)) / size


class _Sample:
    """Blocks of a tensor as vectors (rows, columns) of W, D, e, and Q - W."""

    def __init__(self, blocks: list[_Block], dtype: torch.dtype) -> None:
        parts = ((block.base, block.merged, block.actual) for block in blocks)
        w, m, q = (torch.cat([*map(_matrix, values)]) for values in zip(*parts, strict=True))
        self._vectors = [w, m - w, m.to(dtype).to(m.dtype) - m, q - w]
        random = torch.Generator().manual_seed(0)
        self._orders = [torch.randperm(len(w), generator=random) for _ in range(SHUFFLES)]

    def __len__(self) -> int:
        return len(self._vectors[_W])

    def combined(self, combination: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(self._vectors[_W])
        for factor, vector in zip(combination.tolist(), self._vectors, strict=True):
            made.add_(vector, alpha=factor)
        return made

    def shuffled(self, residual: torch.Tensor) -> float:
        """The mean square of ⟨r, D⟩ for shuffled rows of D, without the part of each that all rows share."""
        deltas, left = (values - values.mean(0) for values in (self._vectors[_D], residual))
        return sum(_dot(deltas[order], left) ** 2 for order in self._orders) / SHUFFLES

    def bend(self, residual: torch.Tensor, others: list[int]) -> float:
        """How much larger the factor is for large values of D, in standard errors."""
        deltas = self._vectors[_D]
        large = deltas * (deltas.abs() > LARGE * deltas.square().mean().sqrt())
        vectors, others = [*self._vectors[:_Y], large], [*others, _D]
        total = torch.tensor([[_dot(first, second) for second in vectors] for first in vectors]).double()
        rest = _rest(total, _UNIT[_Y], others)
        along = torch.zeros_like(large)
        for which in (*others, _Y):
            along.add_(vectors[which], alpha=float(rest[which]))
        if (size := _dot(along, along)) <= PARALLEL * float(total[_D, _D]):
            return 0.0
        factor = _dot(residual, along) / size
        left = residual - factor * along
        of_rows = (left * along).sum(1).double()
        error = _error(_dot(left, left), size, of_rows, left.numel(), self.shuffled(left))
        return factor / error if error else 0.0


def _dot(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum(1).sum(dtype=torch.float64))


def _matrix(values: torch.Tensor) -> torch.Tensor:
    """Values as rows of a matrix in float32. A vector has one value in each row, and is in float64."""
    if values.dim() < 2:  # noqa: PLR2004 - a vector
        return values.double().reshape(-1, 1)
    is_stack = values.dim() > 2 and values.shape[-1] >= LEAST_COLUMNS  # noqa: PLR2004 - a layer's experts
    return values.float().reshape(-1, values.shape[-1]) if is_stack else values.float().flatten(1)


class TensorFit:
    """Takes the rows of a tensor, in order, and has its figures at the end.

    `shape` is that of all these rows. `dtype` is that of the base's files: the merge may have been rounded to it.
    Without `requantized`, the noise to expect is unknown.
    """

    def __init__(
        self,
        outline: TensorStrength,
        shape: Sequence[int],
        dtype: torch.dtype,
        requantized: Requantize | None = None,
    ) -> None:
        self._outline, self._dtype, self._requantized = outline, dtype, requantized
        self._sums, self._sample = _Sums(), list[_Block]()
        self._done = self._sampled = self._nonfinite = self._changed = 0
        count, *others = shape
        self._share = max(SAMPLED, LEAST_ROWS * math.prod(others)) / max(1, count * math.prod(others))

    def add(self, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, rows: slice) -> None:
        """Take the values of these rows. `merged` is `base` if the merge leaves them alone."""
        again = self._requantized(merged, rows) if self._requantized is not None else None
        if again is None:
            self._requantized = None
        made = [_matrix(values) for values in (base, merged, actual, *([] if again is None else [again]))]
        step = max(1, BLOCK // max(1, made[0].shape[1]))
        for start in range(0, len(made[0]), step):
            w, m, q, *z = (values[start : start + step] for values in made)
            vectors = {_W: w, _Y: q - w} | ({_Z: z[0] - w} if z else {})
            if merged is not base:
                vectors |= {_D: m - w, _E: m.to(self._dtype).to(m.dtype) - m}
            if not self._sums.add(vectors):
                bad = sum(values.numel() - int((values.abs() < MOST_VALUE).count_nonzero()) for values in (w, m, q))
                self._nonfinite += max(1, bad)
        self._done += base.numel()
        if merged is base:
            self._changed += int((again != actual).count_nonzero()) if again is not None else 0
        elif self._sampled < self._share * self._done:
            self._sampled += base.numel()
            self._sample.append(_Block(base.clone(), merged.clone(), actual, rows))

    def facts(self) -> TensorStrength:
        """The figures."""
        return self._finite_facts() if not self._nonfinite else replace(self._outline, nonfinite=self._nonfinite)

    def _finite_facts(self) -> TensorStrength:
        fit = _Fit(self._sums, _Y)
        if fit.along is not None:
            self._measure_error(fit, fit.along)
        figures = {name: getattr(fit, name) for name in FIGURES}
        sampled = self._sampled / max(1, fit.numel) if self._sample else 1.0
        facts = replace(self._outline, rotated=self._is_rotated(fit), sampled=sampled, **figures)
        if self._requantized is None:
            return facts
        again = _Fit(self._sums, _Z)
        times = 1.0 if math.isinf(fit.error) else fit.strength
        whole = torch.tensor([1.0, times, 0.0, 0.0]).double()
        (own, loudest, uneven), (_, _, of_columns) = (_compared(fit, again, whole, axis) for axis in (0, 1))
        uneven, own_noise = max(uneven, of_columns), math.sqrt(float(own.sum()))
        facts = replace(facts, own_noise=own_noise, own_scale=again.scale, loudest=loudest, uneven=uneven)
        if not self._sample:
            return replace(facts, changed=self._changed / max(1, fit.numel))
        facts, is_other = self._in_codes(facts, self._requantized, times)
        if is_other:
            return replace(facts, error=math.hypot(facts.error, OTHER_QUANTIZER))
        if facts.is_erased is None:
            return facts
        right = _without_loss(facts, max(UNLIKE, again.strength))
        is_right = abs(right.strength - right.own_strength) <= TOLERANCE + SURE_ERRORS * right.error
        if is_right or abs(facts.strength) <= UNLIKE:
            return right
        return _without_loss(facts, max(UNLIKE, self._kept(self._requantized, times)))

    def _kept(self, requantized: Requantize, times: float) -> float:
        """The share of k times the delta that quantizing leaves, in the sample: of W + kD other values are lost."""
        sums = _Sums()
        for base, merged, _, rows in self._sample:
            proper = requantized(base.lerp(merged, times), rows)
            if proper is None:
                return 1.0
            w, m, z = (_matrix(values) for values in (base, merged, proper))
            sums.add({_W: w, _D: m - w, _E: m.to(self._dtype).to(m.dtype) - m, _Y: z - w})
        return _Fit(sums, _Y).strength / times

    def _measure_error(self, fit: _Fit, along: torch.Tensor) -> None:
        sample, sums = _Sample(self._sample, self._dtype), self._sums.sums
        rows, residual = len(fit.by_axis[0]), sample.combined(fit.residual)
        together = float(sums[_D] @ (fit.residual @ sums[:_Z])) / rows
        fit.measure_error(along, rows / len(sample) * sample.shuffled(residual) + together**2)
        fit.bend = sample.bend(residual, fit.others)

    def _in_codes(self, facts: TensorStrength, requantized: Requantize, times: float) -> tuple[TensorStrength, bool]:
        """Step 5, on the sample. Also whether its quantizer is another one: the release has none of these codes."""
        differing, distances = 0, torch.zeros(3).double()
        is_measured = bool(facts.kind) and math.isfinite(facts.error)
        for base, merged, actual, rows in self._sample:
            of_base = requantized(base, rows)
            if of_base is None:
                return facts, False
            differing += int((of_base != actual).count_nonzero())
            if not is_measured:
                continue
            into_codes, proper = requantized(merged - base + of_base, rows), requantized(base.lerp(merged, times), rows)
            if into_codes is None or proper is None:
                return facts, False
            others = into_codes, proper, of_base
            distances += torch.stack([(actual - values).square().sum(dtype=torch.float64) for values in others])
        facts = replace(facts, changed=differing / max(1, self._sampled))
        if not is_measured:
            return facts, False
        to_codes, to_proper, to_base = distances.sqrt().tolist()
        own_noise = (facts.own_noise or 0.0) * math.sqrt(self._sampled / max(1, facts.numel))
        if min(to_codes, to_proper, to_base) > EXPLAINED * own_noise:
            return facts, True
        return replace(facts, is_erased=to_codes < EXPLAINED * min(to_proper, to_base)), False

    def _is_rotated(self, fit: _Fit) -> bool:
        """Whether rows or columns have the base's norms, with other values: a rotation keeps the norms."""
        shape = self._outline.expected_shape
        if abs(fit.scale) > UNLIKE or len(shape) != 2 or min(shape) < LEAST_NORMS:  # noqa: PLR2004 - a matrix
            return False
        squares = (
            torch.stack([fit.squares(vector, axis) for vector in (_UNIT[_W], _UNIT[_W] + _UNIT[_Y])]) for axis in (0, 1)
        )
        return any(float(pair.sqrt().corrcoef()[0, 1]) > SAME_NORMS for pair in squares)


def _without_loss(facts: TensorStrength, kept: float) -> TensorStrength:
    """Step 4. `kept` is what quantizing W + D leaves of the delta."""
    if abs(facts.strength) > UNLIKE and abs(kept - 1) > SURE_ERRORS * facts.error:
        return replace(facts, strength=facts.strength / kept, error=facts.error / kept)
    return replace(facts, own_strength=kept)


def _compared(fit: _Fit, again: _Fit, whole: torch.Tensor, axis: int) -> tuple[torch.Tensor, float, float]:
    """Step 4, for rows or columns: squares of the noise to expect, and how far noise and strength of one are off."""
    sizes, noise = (fit.squares(vector, axis) for vector in (whole, fit.residual))
    own = again.squares(again.residual, axis) + ROUNDED**2 * sizes
    own += LEAST_NOISE * own.mean()
    shares = noise / (sizes + LEAST_ROW * sizes.mean())
    is_unlike = float(shares.max()) > min(MOST_SHARE, max(UNLIKE, MOST_SHARES * float(shares.median())))
    noise = torch.maximum(noise, own)
    far, usual = fit.chances(noise, axis), again.chances(own, axis)
    largest = 2 * math.log(len(far) + 1)  # of as many squares by chance
    uneven = max(float(far.mean() / usual.mean().clamp(min=1)), float(far.max() / usual.max().clamp(min=largest)))
    return own, math.inf if is_unlike else math.sqrt(float((noise / own).max())), uneven
