"""Measures one tensor of a release: the factor of the delta that is in it, and the error of that factor.

In: tensors of base, merge, and release. Out: a `TensorStrength`. Judges nothing.

1. The products of W, D, e, and Q - W are added up in float64, row by row, in blocks of rows (`_Products`).
2. Least squares gives Q ≈ aW + kD + e. D is split into a part that W and e explain and the rest, D⊥, so that
   k = ⟨Q - W, D⊥⟩ / ‖D⊥‖².
3. The standard error of k is the largest of three: for white noise, ‖r‖ / (√n ‖D⊥‖); for noise that is alike within a
   row, from the sums ⟨rᵢ, D⊥ᵢ⟩ of the rows (White, Econometrica 48, 1980); and of the same fit on shuffled rows of D.
4. If much of the delta is missing, the tensor is quantized again, from the base and from the merge: which is nearer?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from merge_gate.features.quantized.measurement import TensorStrength

BLOCK = 1 << 18
"""Values that are multiplied at once: 14 MiB in float64."""

SHUFFLES = 4
"""Deltas with shuffled rows. The seed is fixed, so that a report can be repeated."""

LARGE = 1.5
"""A value of D is large above this multiple of its root mean square in a block."""

PARALLEL = 1e-6
"""A vector has no part of its own if other ones explain all but this share of its square."""

UNLIKE = 0.5
"""Below this factor of the base's values, a tensor does not resemble them."""

LEAST_NORMS, SAME_NORMS = 16, 0.8
"""Norms of so many rows or columns are the same if they correlate more than this."""

EXPLAINED = 0.5
"""A quantized tensor explains another one that is nearer to it than to others by this factor."""

Requantize = Callable[[torch.Tensor], torch.Tensor | None]

_W, _D, _E, _Y, _LARGE = range(5)


class _Products:
    """Step 1: the products of W, D, e, Y = Q - W, and the large values of D, for each row and with shuffled rows."""

    def __init__(self, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> None:
        by_row, shuffled = [], torch.zeros(SHUFFLES, 5, dtype=torch.float64)
        random = torch.Generator().manual_seed(0)
        for rows in _blocks(base):
            w, m, q = (tensor[rows].double().flatten(1) for tensor in (base, merged, actual))
            d, e = m - w, merged[rows].to(dtype).double().flatten(1) - m
            is_large = d.abs() > LARGE * d.square().mean().sqrt()
            vectors = torch.stack((w, d, e, q - w, d * is_large), 1)
            by_row.append(vectors @ vectors.mT)
            for number in range(SHUFFLES):
                order = torch.randperm(len(d), generator=random)
                shuffled[number] += (vectors * d[order, None]).sum((0, 2))
        self.by_row = torch.cat(by_row)
        self.total = self.by_row.sum(0)
        self.shuffled = shuffled

    def norm(self, which: int) -> float:
        return math.sqrt(max(0.0, float(self.total[which, which])))

    def rest(self, of: int, others: list[int]) -> torch.Tensor:
        """The coefficients of the part of a vector that the others do not explain, by least squares."""
        coefficients = torch.zeros(5, dtype=torch.float64)
        coefficients[of] = 1.0
        if others:
            sizes = self.total.diagonal()[others].sqrt()
            gram = self.total[others][:, others] / sizes[:, None] / sizes
            solution = torch.linalg.lstsq(gram, self.total[others, of] / sizes, driver="gelsd").solution
            coefficients[others] = -solution / sizes
        return coefficients

    def product(self, first: torch.Tensor, second: torch.Tensor) -> float:
        return float(first @ self.total @ second)

    def error(self, residual: torch.Tensor, rest: torch.Tensor, numel: int, fitted: int) -> float:
        """Step 3: the standard error of the coefficient of `rest` in a fit with this residual."""
        size = self.product(rest, rest)
        rows = torch.einsum("i,rij,j->r", residual, self.by_row, rest)
        count = len(rows)
        variances = (
            max(0.0, self.product(residual, residual)) / max(1, numel - fitted) * size,
            float(rows.square().sum()) * count / max(1, count - fitted),
            float((self.shuffled @ residual).square().mean()),
        )
        return math.sqrt(max(variances)) / size


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    count = max(1, BLOCK // max(1, tensor[0].numel())) if len(tensor) else 1
    return (slice(start, start + count) for start in range(0, len(tensor), count))


def fitted(
    outline: TensorStrength, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype
) -> TensorStrength:
    """The figures of a tensor that the merge changes, from W, W + D, and Q in one shape and in float32.

    `dtype` is that of the base's files: the merge may have been rounded to it.
    """
    base, merged, actual = (tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor for tensor in (base, merged, actual))  # noqa: PLR2004 - a vector
    if bad := int((~actual.isfinite()).sum()):
        return replace(outline, nonfinite=bad)
    # 1.
    products, numel = _Products(base, merged, actual, dtype), base.numel()
    facts = replace(
        outline,
        numel=numel,
        weight=products.norm(_W),
        delta=products.norm(_D),
        distance=products.norm(_Y),
        noise=products.norm(_Y),
    )
    # 2.
    others = [which for which in (_W, _E) if products.norm(which) > math.sqrt(PARALLEL) * products.norm(_D)]
    rest = products.rest(_D, others)
    size = products.product(rest, rest)
    if not facts.delta or size <= PARALLEL * facts.delta**2:
        return facts
    residual = products.rest(_Y, [*others, _D])
    strength = -float(residual[_D])
    facts = replace(
        facts,
        strength=strength,
        scale=1 - float(residual[_W]),
        noise=math.sqrt(max(0.0, products.product(residual, residual))),
        # 3.
        error=products.error(residual, rest, numel, len(others) + 1),
    )
    large = products.rest(_LARGE, [*others, _D])
    if (size := products.product(large, large)) > PARALLEL * facts.delta**2:
        error = products.error(residual, large, numel, len(others) + 2)
        facts = replace(facts, bend=products.product(residual, large) / size / error if error else 0.0)
    return facts


def repeated(
    facts: TensorStrength, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, requantized: Requantize
) -> TensorStrength:
    """Step 4: the facts, with those of the same quantization of the base, of the merge, and of a merge into codes."""
    of_base = requantized(base)
    if of_base is None:
        return facts
    facts = replace(
        facts,
        own_noise=float((of_base - base).norm()),
        changed=float((of_base != actual).float().mean()),
    )
    if not facts.touched:
        return facts
    delta = merged - base
    into_codes, proper = requantized(of_base + delta), requantized(base + facts.strength * delta)
    if into_codes is None or proper is None:
        return facts
    to_codes, to_proper, to_base = (float((actual - values).norm()) for values in (into_codes, proper, of_base))
    return replace(facts, is_erased=to_codes < EXPLAINED * min(to_proper, to_base))


def untouched(outline: TensorStrength, base: torch.Tensor, actual: torch.Tensor) -> TensorStrength:
    """The figures of a tensor that the merge leaves alone, in float32 and of one shape."""
    if bad := int((~actual.isfinite()).sum()):
        return replace(outline, nonfinite=bad)
    weight, distance, cross = 0.0, 0.0, 0.0
    for rows in _blocks(base) if base.dim() else ():
        w, q = base[rows].double(), actual[rows].double()
        weight, distance = weight + float(w.square().sum()), distance + float((q - w).square().sum())
        cross += float((q * w).sum())
    scale = cross / weight if weight else 1.0
    facts = replace(outline, numel=base.numel(), weight=math.sqrt(weight), distance=math.sqrt(distance), scale=scale)
    return replace(facts, rotated=_is_rotated(facts, base, actual))


def _is_rotated(facts: TensorStrength, base: torch.Tensor, actual: torch.Tensor) -> bool:
    """Whether rows or columns have the base's norms, with other values: a rotation keeps the norms."""
    if abs(facts.scale) > UNLIKE or base.dim() != 2 or min(base.shape) < LEAST_NORMS:  # noqa: PLR2004 - a matrix
        return False
    pairs = (torch.stack([tensor.norm(dim=dim) for tensor in (base, actual)]) for dim in (0, 1))
    return any(float(pair.corrcoef()[0, 1]) > SAME_NORMS for pair in pairs)
