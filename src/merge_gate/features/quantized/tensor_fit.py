"""Measures one tensor of a release: the factor of the delta that is in it, and the error of that factor.

In: tensors of base, merge, and release. Out: a `TensorStrength`. Judges nothing.

1. The products of W, D, e, and Q - W are added up in float64, row by row, in blocks of rows (`_Products`).
2. Least squares gives Q ≈ a(W + kD) + e: quantizers that fit or clip their scales shrink values. With D⊥, the part of
   D that W and e do not explain, ak = ⟨Q - W, D⊥⟩ / ‖D⊥‖².
3. The standard error of k is the largest of three: for white noise, ‖r‖ / (√n ‖D⊥‖); for noise that is alike within a
   row, from the sums ⟨rᵢ, D⊥ᵢ⟩ of the rows (White, Econometrica 48, 1980); and of the same fit on shuffled rows of D.
4. A tensor that stands out is quantized again, with k times the delta. k is divided by the share of it that this
   leaves, because clipped scales take more from some deltas. Is the tensor nearer to a merge into codes?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from merge_gate.features.quantized.measurement import TensorStrength

BLOCK = 1 << 18
"""Values that are multiplied at once: 14 MiB in float64."""

SHUFFLES, FITTED = 4, 3
"""Deltas with shuffled rows, whose seed is fixed, so that a report can be repeated; the number of fitted factors."""

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

_VECTORS = 5
_W, _D, _E, _Y, _LARGE = range(_VECTORS)


class _Products:
    """Step 1: the products of the vectors, for each row and with shuffled rows of D."""

    def __init__(self, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> None:
        by_row, self.shuffled = [], torch.zeros(SHUFFLES, _VECTORS, dtype=torch.float64)
        random = torch.Generator().manual_seed(0)
        for rows in _blocks(base):
            w, m, q = (tensor[rows].double().flatten(1) for tensor in (base, merged, actual))
            d, e = m - w, merged[rows].to(dtype).double().flatten(1) - m
            is_large = d.abs() > LARGE * d.square().mean().sqrt()
            vectors = torch.stack((w, d, e, q - w, d * is_large), 1)
            by_row.append(vectors @ vectors.mT)
            for number in range(SHUFFLES):
                order = torch.randperm(len(d), generator=random)
                self.shuffled[number] += (vectors * d[order, None]).sum((0, 2))
        self.by_row = torch.cat(by_row)
        self.total = self.by_row.sum(0)

    def norm(self, which: int) -> float:
        return math.sqrt(max(0.0, float(self.total[which, which])))

    def rest(self, vector: torch.Tensor, others: list[int]) -> torch.Tensor:
        """The part of a combination of vectors that the others do not explain, by least squares: its coefficients."""
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
        residual, count = of - factor * along, len(self.by_row)
        variances = (
            max(0.0, self.product(residual, residual)) / max(1, numel - FITTED) * size,
            float(torch.einsum("i,rij,j->r", residual, self.by_row, along).square().sum())
            * (count / max(1, count - FITTED)),
            float((self.shuffled @ residual).square().mean()),
        )
        return factor, math.sqrt(max(variances)) / size


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    count = max(1, BLOCK // max(1, tensor[0].numel())) if len(tensor) else 1
    return (slice(start, start + count) for start in range(0, len(tensor), count))


def fitted(
    outline: TensorStrength, base: torch.Tensor, merged: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype
) -> TensorStrength:
    """The figures of a tensor that the merge changes, from W, W + D, and Q in one shape and in float32.

    `dtype` is that of the base's files: the merge may have been rounded to it.
    """
    if bad := int((~actual.isfinite()).sum()):
        return replace(outline, nonfinite=bad)
    base, merged, actual = (tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor for tensor in (base, merged, actual))  # noqa: PLR2004 - a vector
    # 1.
    products, numel, unit = _Products(base, merged, actual, dtype), base.numel(), torch.eye(_VECTORS).double()
    weight, delta, distance = (products.norm(which) for which in (_W, _D, _Y))
    facts = replace(outline, numel=numel, weight=weight, delta=delta, distance=distance, noise=distance)
    # 2.
    others = [which for which in (_W, _E) if products.norm(which) > math.sqrt(PARALLEL) * delta]
    along, rest = (products.rest(unit[which], others) for which in (_D, _Y))
    if not delta or products.product(along, along) <= PARALLEL * delta**2:
        return facts
    factor, error = products.factor(rest, along, numel)
    residual = rest - factor * along
    scale = 1 - float(residual[_W])
    noise, shrunk = math.sqrt(max(0.0, products.product(residual, residual))), max(scale, UNLIKE)
    facts = replace(facts, strength=factor / shrunk, error=error / shrunk, scale=scale, noise=noise)
    large = products.rest(unit[_LARGE], [*others, _D])
    if products.product(large, large) > PARALLEL * delta**2:
        bend, error = products.factor(residual, large, numel)
        facts = replace(facts, bend=bend / error if error else 0.0)
    return facts


def repeated(  # noqa: PLR0917
    facts: TensorStrength,
    base: torch.Tensor,
    merged: torch.Tensor,
    actual: torch.Tensor,
    requantized: Requantize,
    dtype: torch.dtype,
) -> TensorStrength:
    """Step 4: the facts, with those of the same quantization of the base, of the merge, and of a merge into codes."""
    of_base = requantized(base)
    if of_base is None:
        return facts
    own_noise, changed = float((of_base - base).norm()), float((of_base != actual).float().mean())
    facts = replace(facts, own_noise=own_noise, changed=changed)
    if not facts.touched or math.isinf(facts.error):
        return facts
    delta = merged - base
    into_codes, proper = requantized(of_base + delta), requantized(base + facts.strength * delta)
    if into_codes is None or proper is None:
        return facts
    if abs(facts.strength) > UNLIKE:
        lost = max(UNLIKE, fitted(facts, base, merged, proper, dtype).strength / facts.strength)
        facts = replace(facts, strength=facts.strength / lost, error=facts.error / lost)
    to_codes, to_proper, to_base = (float((actual - values).norm()) for values in (into_codes, proper, of_base))
    if min(to_codes, to_proper, to_base) > EXPLAINED * own_noise:
        return facts  # another quantizer, with other codes
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
