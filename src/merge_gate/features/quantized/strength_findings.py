"""Names the kind of a quantized release, from the strength of the delta in each tensor.

In: a `Measurement`, those of other candidates, and the adapter's config. Out: findings. Imports no torch.

1. The strengths of all tensors are pooled, weighted by their errors.
2. If the error of the pooled strength is too large, nothing is said about the release.
3. Residuals and untouched tensors that are further from the base than the noise of their format show another base.
4. All strengths are 1, 0, or another factor, or some layers have none. Each comparison allows for its error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist, median
from typing import Any, NamedTuple

from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.quantized.measurement import TOLERANCE, Measurement, TensorStrength
from merge_gate.features.verify.tensor_findings import reasons
from merge_gate.judging.kinds import finding
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Finding, Origin

MOST_ERROR = 0.25
"""Above this error, 0 and 1 cannot be told apart."""

LEAST_STRENGTH = 0.9
"""Below this strength, rounding may have erased the delta."""

CHANCE = 0.01
"""Errors of right merges exceed the limits this often in all tensors together."""

POOLED_ERRORS = 3.0
FACTOR_TOLERANCE = 0.05
LEAST_BEND = 5.0
MOST_UNITS = 2.0
"""A tensor whose distance is more than twice the noise of its format has other values."""

MOST_UNITS_OF_OTHERS = 3.0
"""The same, if the noise is that of other tensors of this format."""

MOST_FLOAT_DISTANCE = 0.01
"""Plain floats are the base's, rounded to 16 bits."""

MOST_OTHERS = 0.5
MORE_LIKELY = 30.0
"""A candidate fits better if twice the logarithm of the likelihoods' ratio is above this."""

LISTED = 5


class Strength(NamedTuple):
    """A factor of the delta, and its standard error."""

    value: float
    error: float

    def is_near(self, value: float, errors: float, tolerance: float = TOLERANCE) -> bool:
        return abs(self.value - value) <= tolerance * max(1.0, abs(value)) + errors * self.error

    def __str__(self) -> str:
        return f"{round(self.value, 2) or 0.0:.2f} ± {math.ceil(self.error * 100) / 100:.2f}"


def pooled(tensors: Iterable[TensorStrength]) -> Strength:
    """Step 1: the mean strength, weighted by errors of at least half the tolerance."""
    known = [(tensor.strength, tensor.error) for tensor in tensors if math.isfinite(tensor.error)]
    weights = [1 / (error**2 + (TOLERANCE / 2) ** 2) for _, error in known]
    if not known:
        return Strength(0.0, math.inf)
    total = sum(weights)
    value = sum(weight * strength for weight, (strength, _) in zip(weights, known, strict=True)) / total
    squares = sum((weight * error) ** 2 for weight, (_, error) in zip(weights, known, strict=True))
    return Strength(value, math.sqrt(squares) / total)


class _Release:
    """The tensors of one measurement, and what they say together."""

    def __init__(self, measurement: Measurement) -> None:
        tensors = [tensor for tensor in measurement.tensors if not tensor.nonfinite]
        self.format = measurement.format
        self.touched = [tensor for tensor in tensors if tensor.touched and tensor.delta]
        self.others = [tensor for tensor in tensors if not tensor.touched]
        self.pooled = pooled(self.touched)
        self.parts = [tensor for tensor in self.touched if math.isfinite(tensor.error)]
        self.errors = NormalDist().inv_cdf(1 - CHANCE / 2 / max(1, len(self.parts)))
        self.noise = math.sqrt(sum(tensor.noise**2 for tensor in self.touched))
        self.delta = math.sqrt(sum(tensor.delta**2 for tensor in self.touched))

    def far_from(self, value: float, tolerance: float = TOLERANCE) -> list[TensorStrength]:
        """The tensors whose strength is not this value."""
        return [tensor for tensor in self.parts if not _strength(tensor).is_near(value, self.errors, tolerance)]

    @property
    def is_applied(self) -> bool:
        is_known = self.pooled.error <= MOST_ERROR
        return is_known and self.pooled.is_near(1, POOLED_ERRORS) and not self.far_from(1)

    @property
    def is_erased(self) -> bool:
        """Whether the merge was rounded to the grid of the quantized base, by the most telling tensors."""
        erased = [tensor.is_erased for tensor in self.parts if tensor.is_erased is not None]
        bend = sum(tensor.bend for tensor in self.parts) / math.sqrt(max(1, len(self.parts)))
        is_bent = bend > LEAST_BEND and self.pooled.value < LEAST_STRENGTH
        return 2 * sum(erased) > len(erased) if erased else is_bent

    def odd_noise(self) -> tuple[list[TensorStrength], list[TensorStrength]]:
        """The tensors that are further from the base than their noise: those that the merge touches, and the others."""
        shares: dict[str, list[float]] = defaultdict(list)
        for tensor in self.touched:
            shares[tensor.kind].append((tensor.own_noise or tensor.noise) / (tensor.weight or 1.0))
        usual = {kind: median(values) for kind, values in shares.items()}
        odd = [t for t in self.touched if t.kind and t.own_noise and t.noise > MOST_UNITS * t.own_noise]
        return odd, [tensor for tensor in self.others if _is_far(tensor, usual.get(tensor.kind))]


def _is_far(tensor: TensorStrength, usual: float | None) -> bool:
    share = tensor.distance / (tensor.weight or 1.0)
    if not tensor.kind:
        return share > MOST_FLOAT_DISTANCE
    if tensor.own_noise is not None:
        return tensor.distance > MOST_UNITS * tensor.own_noise
    return usual is not None and share > MOST_UNITS_OF_OTHERS * usual


def _strength(tensor: TensorStrength) -> Strength:
    return Strength(tensor.strength, tensor.error)


def strength_findings(
    measurement: Measurement, candidates: Mapping[str, Measurement], *, adapter: str, config: AdapterConfig
) -> Iterator[Finding]:
    """The findings on a release."""
    yield from _unfit(measurement)
    release = _Release(measurement)
    yield from _per_tensor(release)
    odd, far = release.odd_noise()
    if 2 * sum(tensor.rotated for tensor in far) > len(release.others):
        what = (
            "the release is rotated, as by QuaRot or SpinQuant: rows or columns have the base's norms, and other values"
        )
        yield not_judged(what, "verify the merged model before it is rotated and quantized", origin=Origin.MODEL)
        return
    is_other_base = len(far) > MOST_OTHERS * len(release.others)
    if is_other_base or (len(odd) > MOST_OTHERS * len(release.touched) and not release.others):
        yield _wrong_base(release, odd, far)
        return
    if (carrier := _candidate(release, {name: _Release(found) for name, found in candidates.items()})) is not None:
        yield carrier
        return
    if release.pooled.error > MOST_ERROR:
        yield _not_measurable(release, adapter)
    elif release.is_applied:
        yield _applied(release, adapter)
    elif len(odd) > MOST_OTHERS * len(release.touched) and not release.is_erased:
        yield _unexplained(release, odd, has_candidates=bool(candidates))
    else:
        yield from _misapplied(release, adapter, config)
    if far:
        message = (
            f"{counted(len(far), 'tensor')} that the adapter does not touch differ from the base by more than noise"
        )
        yield finding("base-changed", f"{message}: {_listed(far)}", tensor=far[0].name, tensors=len(far))


def _unfit(measurement: Measurement) -> Iterator[Finding]:
    if measurement.absent:
        names = listing([quoted(name, 120) for name in measurement.absent], LISTED)
        what = counted(
            len(measurement.absent), "tensor that the merge changes is", "tensors that the merge changes are"
        )
        yield finding("not-carried", f"{what} not in the release: {names}", tensor=measurement.absent[0])
    if bad := [tensor for tensor in measurement.tensors if tensor.nonfinite]:
        total = sum(tensor.nonfinite for tensor in bad)
        message = f"{counted(total, 'value')} of {counted(len(bad), 'tensor')} are NaN or Inf: {_listed(bad)}"
        yield finding("nonfinite", message, tensor=bad[0].name, values=total)
    if odd := [tensor for tensor in measurement.tensors if tensor.shape != tensor.expected_shape]:
        first = odd[0]
        message = f"{quoted(first.name, 120)} has {list(first.shape)}, expected {list(first.expected_shape)}"
        what = counted(len(odd), "tensor has", "tensors have")
        yield finding("shape-changed", f"{what} another shape than in the merge: {message}", tensor=first.name)


def _per_tensor(release: _Release) -> Iterator[Finding]:
    """A note on each tensor, those first that are furthest from 1."""
    for tensor in sorted(release.parts, key=lambda tensor: -abs(tensor.strength - 1) / (tensor.error + TOLERANCE)):
        ratio = tensor.noise / tensor.delta
        message = f"the delta is in it {_strength(tensor)} times; the noise is {ratio:,.2g} times its size"
        factor, error = _strength(tensor)
        yield finding("strength", message, tensor=tensor.name, factor=factor, error=error, noise=ratio)


def _listed(tensors: Sequence[TensorStrength]) -> str:
    return listing([quoted(tensor.name, 120) for tensor in tensors], LISTED)


def _figures(release: _Release) -> dict[str, Any]:
    return {"factor": release.pooled.value, "error": release.pooled.error, "noise": release.noise / release.delta}


def _noise(release: _Release) -> str:
    ratio = release.noise / release.delta
    return f"the noise of {release.format} is {ratio:,.2g} times its size"


def _applied(release: _Release, adapter: str) -> Finding:
    message = f"{quoted(adapter, 200, '')} is in this release at {release.pooled} of its strength; {_noise(release)}"
    if vague := [tensor for tensor in release.touched if not tensor.error <= MOST_ERROR]:
        message += f". {len(vague):,} of {counted(len(release.touched), 'tensor')} cannot be measured alone"
    return finding("applied", message, **_figures(release))


def _not_measurable(release: _Release, adapter: str) -> Finding:
    if not release.touched:
        return finding("not-measurable", "the merge changes no tensor of the release")
    if math.isinf(release.pooled.error):
        why = "its delta is parallel to the weights, and quantizers scale those, too"
    else:
        why = f"its strength is {release.pooled}, and errors above {MOST_ERROR} tell nothing; {_noise(release)}"
    return finding("not-measurable", f"{quoted(adapter, 200, '')} cannot be measured: {why}", **_figures(release))


def _wrong_base(release: _Release, odd: list[TensorStrength], far: list[TensorStrength]) -> Finding:
    all_far = [*far, *odd]
    whole = len(release.others) + len(release.touched)
    what = f"{len(all_far):,} of {counted(whole, 'tensor')} differ from the base by more than the noise"
    return finding("wrong-base", f"{what} of {release.format}: {_listed(all_far)}", tensor=all_far[0].name)


def _candidate(release: _Release, candidates: Mapping[str, _Release]) -> Finding | None:
    for name, other in candidates.items():
        if other.is_applied and (not release.is_applied or _fits_better(other, release)):
            message = f"the candidate {quoted(name, 200)} is in it at {other.pooled} of its strength, and the adapter"
            return finding("other-candidate", f"{message} at {release.pooled}", factor=release.pooled.value)
    return None


def _fits_better(first: _Release, second: _Release) -> bool:
    noises = {tensor.name: tensor.noise for tensor in first.touched}
    both = [(t.numel, t.noise, noises[t.name]) for t in second.touched if noises.get(t.name) and t.noise]
    return sum(2 * numel * math.log(own / other) for numel, own, other in both) > MORE_LIKELY


def _unexplained(release: _Release, odd: list[TensorStrength], *, has_candidates: bool) -> Finding:
    message = (
        f"{counted(len(odd), 'tensor')} that the adapter changes differ from the base by more than the noise and the "
        f"delta, which is in them {release.pooled} times: {_listed(odd)}"
    )
    hint = "check the base and its revision: no candidate has these values" if has_candidates else ""
    return finding("unexplained", message, tensor=odd[0].name, hint=hint, **_figures(release))


def _misapplied(release: _Release, adapter: str, config: AdapterConfig) -> Iterator[Finding]:
    """Step 4, for a release that does not have the delta once."""
    far, has_delta = release.far_from(1), {tensor.name for tensor in release.far_from(0)}
    missing = [tensor for tensor in far if tensor.name not in has_delta]
    full = [tensor for tensor in release.parts if tensor.name in has_delta and tensor not in far]
    at = f"{quoted(adapter, 200, '')} is in this release at {release.pooled} of its strength"
    if release.is_erased:
        changed = [tensor.changed for tensor in release.parts if tensor.changed]
        codes = f", and {sum(changed) / len(changed):.1%} of the values are not its own" if changed else ""
        message = f"{at}: it was merged into the codes of the quantized base{codes}; {_noise(release)}"
        yield finding("erased", message, **_figures(release))
    elif missing and full:
        left = pooled(missing)
        what = f"{len(missing):,} of {counted(len(release.touched), 'tensor')} that the adapter changes have the delta"
        message = f"{what} {left} times, expected once: {_listed(missing)}"
        yield finding(
            "applied-in-part", message, tensor=missing[0].name, **_figures(release) | {"tensors": len(missing)}
        )
    elif release.pooled.is_near(0, POOLED_ERRORS):
        same = [tensor.changed for tensor in release.parts if tensor.changed is not None]
        codes = "; no code differs from those of the quantized base, as after a merge into its codes that left nothing"
        message = f"{at}; {_noise(release)}{codes if same and not any(same) else ''}"
        yield finding("not-applied", message, tensor=release.parts[0].name, **_figures(release))
    else:
        odd = far or release.parts
        factor = pooled(odd)
        kind = "applied-twice" if factor.is_near(2, POOLED_ERRORS, FACTOR_TOLERANCE) else "other-strength"
        where = "all tensors" if len(odd) == len(release.parts) or not full else _listed(odd)
        why = ", or ".join(reasons(factor.value, config))
        message = f"the delta is in {where} {factor} times, expected once" + (f": {why}" if why else "")
        yield finding(kind, message, tensor=odd[0].name, **_figures(release) | {"factor": factor.value})
