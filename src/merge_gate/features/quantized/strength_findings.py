"""Names the kind of a quantized release, from the strength of the delta in each tensor.

In: a `Measurement`, those of other candidates, and the adapter's config. Out: findings. Imports no torch.

1. The strengths of all tensors are pooled, weighted by their errors. If the error is too large, nothing is said.
2. The strengths of each kind of module are pooled, too: of q_proj, and of self_attn. None may differ from 1, or from
   that of the quantization that is repeated, by so much that it happens in one of 10,000 right releases.
3. Tensors that are further from base and delta than the noise of their format show another base, or other changes.
4. All strengths are 1, 0, or another factor, or some layers have none. Each comparison allows for its error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist, median
from typing import Any, NamedTuple

from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.quantized.measurement import PADDING, TEMPLATE, TOLERANCE, Measurement, Setting, TensorStrength
from merge_gate.features.verify.tensor_findings import MOST_UNTOUCHED, reasons
from merge_gate.judging.kinds import finding, note
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Finding, Origin

MOST_ERROR, LEAST_STRENGTH = 0.25, 0.9
"""Above this error, 0 and 1 cannot be told apart. Below this strength, rounding may have erased the delta."""

CHANCE, POOLED_ERRORS, LEAST_BEND = 0.01, 3.0, 4.0
"""How often errors of right merges exceed the limit in all tensors together; limits in standard errors."""

CHANCE_OF_KINDS = 1e-4
"""How often the strengths of kinds exceed their limits in a right release, of all kinds together, if errors are normal.

Of 220 right releases that llama.cpp's quantizers made in ten types (Q2_K to Q8_0; 20 seeds, and two of 220 million
values), none did: the furthest kind was at 0.60 of its limit, and half of them below 0.06."""

FACTOR_TOLERANCE = 0.05
MOST_UNITS, MOST_USUAL = 3.0, 1.5
"""A tensor has other values if its noise is more than so many times that of rounding (GPTQ has up to 2.3 times), or so
many times what is usual for its kind."""

MOST_OF_ROW, MOST_UNEVEN = 2.0, 4.0
"""Limits of the noise of a row, against the limit of its tensor, and of the strengths of rows and columns."""

UNLIKE, MOST_SHRUNK = 0.5, 0.1
"""Noise above this share of the weight's norm is too much if the noise to expect is unknown; and so much may formats of
few bits scale a tensor."""

MOST_SAME, LEAST_CHANGED = 0.01, 0.05
"""If a tensor that the adapter leaves alone differs from the base's codes in less than the first share of its values,
others of its kind may differ in at most the second share."""

MORE_LIKELY = 30.0
"""A candidate fits better if twice the logarithm of the likelihoods' ratio is above this."""

LISTED = 5
_LIKE_ANOTHER = {"not-applied", "other-strength", "applied-in-part"}
_MAYBE_ANOTHER = (
    "the noise is larger than the delta, so this may be the merge of another adapter: name others with --candidate"
)
"""What a release of another adapter may look like: its own delta is then a part of the noise."""


class Strength(NamedTuple):
    """A factor of the delta, and its standard error."""

    value: float
    error: float

    def is_near(self, value: float, errors: float, tolerance: float = TOLERANCE) -> bool:
        return abs(self.value - value) <= tolerance * max(1.0, abs(value)) + errors * self.error

    def __str__(self) -> str:
        return f"{round(self.value, 2) or 0.0:.2f} ± {math.ceil(min(self.error, 99) * 100) / 100:.2f}"


def pooled(tensors: Iterable[TensorStrength], what: str = "strength") -> Strength:
    """Step 1: the mean strength. Errors count as half the tolerance at least."""
    known = [
        (getattr(t, what), t.error, 1 / (t.error**2 + (TOLERANCE / 2) ** 2)) for t in tensors if math.isfinite(t.error)
    ]
    if not known:
        return Strength(0.0, math.inf)
    total = sum(weight for _, _, weight in known)
    value = sum(weight * strength for strength, _, weight in known) / total
    return Strength(value, math.sqrt(sum((weight * error) ** 2 for _, error, weight in known)) / total)


def _kinds(tensors: Iterable[TensorStrength]) -> dict[str, list[TensorStrength]]:
    """The tensors of each kind of module: by its name, and by that of the module that has it, without numbers."""
    kinds = defaultdict[str, list[TensorStrength]](list)
    for tensor in tensors:
        *path, leaf = (part for part in tensor.name.split(".") if not part.isdecimal() and part != "weight")
        for name in dict.fromkeys((leaf, *path[-1:])):
            kinds[name + " (new rows)" * bool(tensor.first_row)].append(tensor)
    return dict(kinds)


class _Release:
    """The tensors of one measurement, and what they say together.

    Attributes:
        touched, others: the tensors with a delta, and those without one.
        odd, far: those of them that have other values than base, delta, and noise explain.
        has_nonfinite: whether a tensor has values that are not finite, and counts as neither.
    """

    def __init__(self, measurement: Measurement) -> None:
        known = _with_own_noise([tensor for tensor in measurement.tensors if not tensor.nonfinite])
        self.has_nonfinite = len(known) < len(measurement.tensors)
        self.touched = [tensor for tensor in known if tensor.delta]
        self.others = [tensor for tensor in known if not tensor.delta]
        self.parts = [tensor for tensor in self.touched if math.isfinite(tensor.error)]
        self.pooled = pooled(self.parts)
        self.kinds = _kinds(self.parts)
        self.errors = NormalDist().inv_cdf(1 - CHANCE / 2 / max(1, len(self.parts)))
        noise, delta = (math.sqrt(sum(getattr(t, what) ** 2 for t in self.touched)) for what in ("noise", "delta"))
        self.figures: dict[str, Any] = {"factor": self.pooled.value, "error": self.pooled.error}
        self.figures["noise"] = ratio = noise / delta if delta else math.inf
        self.noise = f"the noise of {measurement.format} is {ratio:,.2g} times its size"
        units, same = defaultdict[str, list[float]](list), set[str]()
        for tensor in known:
            if tensor.own_noise:
                units[tensor.kind].append(tensor.noise / tensor.own_noise)
            if not tensor.delta and tensor.changed is not None and tensor.changed < MOST_SAME:
                same.add(tensor.kind)
        self._most = {kind: min(MOST_UNITS, MOST_USUAL * max(1.0, median(own))) for kind, own in units.items()}
        self._same = same - {""}
        self.odd, self.far = ([*filter(self._is_odd, tensors)] for tensors in (self.touched, self.others))

    def _is_odd(self, tensor: TensorStrength) -> bool:
        """Whether a tensor has other values than base, delta, and noise explain, or a row has."""
        if tensor.differing and _strength(tensor).is_near(1, POOLED_ERRORS):
            return True
        most, own = self._most.get(tensor.kind, MOST_UNITS), tensor.own_noise
        share = (tensor.noise if own is None else own) / (tensor.weight or 1.0)
        tolerance = TOLERANCE + min(MOST_SHRUNK, share**2) + POOLED_ERRORS * tensor.scale_error
        is_scaled = abs(tensor.scale - tensor.own_scale) > tolerance
        is_changed = not tensor.delta and tensor.kind in self._same and (tensor.changed or 0.0) > LEAST_CHANGED
        is_loud = tensor.noise > (UNLIKE * tensor.weight if own is None else most * own)
        return tensor.loudest > MOST_OF_ROW * most or is_loud or is_scaled or is_changed or tensor.uneven > MOST_UNEVEN

    def far_from(self, value: float) -> list[TensorStrength]:
        """The tensors whose strength is not this value; those that cannot be measured alone are judged together."""
        vague = [tensor for tensor in self.parts if tensor.error > MOST_ERROR]
        together = pooled(vague)
        is_far = together.error <= MOST_ERROR and not together.is_near(value, self.errors)
        return [
            tensor
            for tensor in self.parts
            if (is_far and tensor.error > MOST_ERROR) or not _strength(tensor).is_near(value, self.errors)
        ]

    @property
    def is_vague(self) -> bool:
        """Whether the strength may be both 1 and none, or both 1 and twice that."""
        near = [value for value in (0, 1, 2) if self.pooled.is_near(value, POOLED_ERRORS)]
        return self.pooled.error > MOST_ERROR or (1 in near and len(near) > 1)

    def far_kinds(self) -> dict[str, list[TensorStrength]]:
        """Step 2: the kinds that are not at their strength, the furthest first."""
        limit = NormalDist().inv_cdf(1 - CHANCE_OF_KINDS / 2 / max(1, len(self.kinds)))
        known = [
            (name, tensors, pooled(tensors), pooled(tensors, "own_strength")) for name, tensors in self.kinds.items()
        ]
        off = [
            (abs(own.value - right.value) / math.hypot(own.error, TOLERANCE), name, tensors)
            for name, tensors, own, right in known
        ]
        return {name: tensors for ratio, name, tensors in sorted(off, key=lambda kind: -kind[0]) if ratio > limit}

    @property
    def is_applied(self) -> bool:
        is_near = not self.is_vague and self.pooled.is_near(1, POOLED_ERRORS)
        return is_near and not self.far_from(1) and not self.far_kinds()

    @property
    def is_sound(self) -> bool:
        return self.is_applied and not self.odd

    @property
    def is_erased(self) -> bool:
        """Whether the merge was rounded to the grid of the quantized base, by the most telling tensors."""
        parts = [tensor for tensor in self.parts if tensor.kind]
        erased = [tensor.is_erased for tensor in parts if tensor.is_erased is not None]
        bend = sum(tensor.bend for tensor in parts) / math.sqrt(max(1, len(parts)))
        is_bent = bend > LEAST_BEND and self.pooled.value < LEAST_STRENGTH
        return 2 * sum(erased) > len(erased) if erased else is_bent


def _with_own_noise(tensors: Sequence[TensorStrength]) -> list[TensorStrength]:
    """The tensors. If the noise of one could not be repeated, it is as large as in others of its kind."""
    usual: dict[str, float] = {}
    for kind in {tensor.kind for tensor in tensors}:
        own = [tensor for tensor in tensors if tensor.kind == kind and tensor.weight]
        shares = [tensor.own_noise / tensor.weight for tensor in own if tensor.own_noise is not None]
        if shares := shares or [tensor.noise / tensor.weight for tensor in own if tensor.delta]:
            usual[kind] = median(shares)
    return [
        replace(tensor, own_noise=tensor.weight * usual[tensor.kind])
        if tensor.own_noise is None and tensor.kind in usual
        else tensor
        for tensor in tensors
    ]


def _strength(tensor: TensorStrength) -> Strength:
    return Strength(tensor.strength, tensor.error)


def strength_findings(
    measurement: Measurement,
    candidates: Mapping[str, Measurement],
    *,
    adapter: str,
    config: AdapterConfig,
    unread: Sequence[str] = (),
) -> Iterator[Finding]:
    """The findings on a release. `unread` are files next to it that may have parts of the model."""
    release, adapter = _Release(measurement), quoted(adapter, 200, "")
    yield from _unfit(measurement, unread)
    yield from _per_tensor(release)
    odd, far = release.odd, release.far
    is_odd = len(odd) > MOST_UNTOUCHED * len(release.touched)
    if 2 * sum(tensor.rotated for tensor in far) > len(release.others):
        what = (
            "the release is rotated, as by QuaRot or SpinQuant: rows or columns have the base's norms, not its values"
        )
        yield not_judged(what, "verify the merged model before it is rotated and quantized", origin=Origin.MODEL)
        return
    if len(far) > MOST_UNTOUCHED * len(release.others) or (is_odd and not release.others):
        what = f"{len(far) + len(odd):,} of {counted(len(release.others) + len(release.touched), 'tensor')}"
        message = f"{what} differ from the base by more than the noise of {measurement.format}: {_listed([*far, *odd])}"
        yield finding("wrong-base", message, tensor=(far or odd)[0].name)
        return
    yield _kind(release, {name: _Release(other) for name, other in candidates.items()}, adapter, config)
    if far:
        what = counted(
            len(far), "tensor that the adapter does not touch differs", "tensors that it does not touch differ"
        )
        message = f"{what} from the base by more than noise: {_listed(far)}"
        yield finding("base-changed", message, tensor=far[0].name, tensors=len(far))


def _kind(release: _Release, candidates: Mapping[str, _Release], adapter: str, config: AdapterConfig) -> Finding:
    """What a release of this base is."""
    at, odd = f"{release.pooled} of its strength", release.odd
    for name, other in candidates.items():
        if other.is_sound and (not release.is_sound or _fits_better(other, release)):
            message = (
                f"the candidate {quoted(name, 200)} is in it at {other.pooled} of its strength, the adapter at {at}"
            )
            return finding("other-candidate", message, **release.figures)
    if math.isinf(release.pooled.error):
        why = "its delta is parallel to the weights, and quantizers scale these too"
        if not release.touched:
            why = "no tensor that it changes has only finite values" if release.has_nonfinite else "it changes nothing"
        return finding("not-measurable", f"{adapter} cannot be measured: {why}")
    if release.is_vague:
        message = f"{adapter} cannot be measured: it is at {at}; {release.noise}"
        return finding("not-measurable", message, **release.figures)
    if odd and (release.is_applied or not release.is_erased):
        what = counted(len(odd), "tensor that the adapter changes differs", "tensors that the adapter changes differ")
        message = f"{what} from the base by more than noise and delta, and the adapter is in this release at {at}"
        hint = "check the base and its revision: no candidate has these values" if candidates else ""
        return finding("unexplained", f"{message}: {_listed(odd)}", tensor=odd[0].name, hint=hint, **release.figures)
    if not release.is_applied:
        problem = _misapplied(release, f"{adapter} is in this release at {at}", config)
        is_unsure = not candidates and release.figures["noise"] > 1 and problem.check in _LIKE_ANOTHER
        return replace(problem, hint=f"{problem.hint}; {_MAYBE_ANOTHER}") if is_unsure else problem
    vague = sum(not tensor.error <= MOST_ERROR for tensor in release.touched)
    more = f". {vague:,} of {counted(len(release.touched), 'tensor')} cannot be measured alone" if vague else ""
    share = sum(t.sampled * t.numel for t in release.parts) / max(1, sum(t.numel for t in release.parts))
    more += f". Its errors rest on {share:.0%} of the values" if share < 1 else ""
    return finding("applied", f"{adapter} is in this release at {at}; {release.noise}{more}", **release.figures)


def _unfit(measurement: Measurement, unread: Sequence[str]) -> Iterator[Finding]:
    if absent := measurement.absent:
        what = counted(len(absent), "tensor of the model is", "tensors of the model are")
        names = listing([quoted(name, 120) for name in dict.fromkeys((*measurement.lost, *absent))], LISTED)
        hint = "export the merge again, with every tensor that it changes" if measurement.lost else ""
        yield finding("not-carried", f"{what} not in the release: {names}", tensor=absent[0], hint=hint)
    if others := measurement.not_in_format:
        what = counted(len(others), "tensor that the adapter changes has", "tensors that the adapter changes have")
        names = listing([quoted(name, 120) for name in others], LISTED)
        files = f", and {listing([quoted(name, 120) for name in unread], LISTED)} was not read" if unread else ""
        message = f"{what} no place in this file{files}, so they were not compared: {names}"
        yield finding("not-in-format", message, tensor=others[0])
    if added := measurement.added:
        what = counted(len(added), "tensor is", "tensors are")
        names = listing([quoted(name, 120) for name in added], LISTED)
        yield finding("added", f"{what} in the release and not in the merge: {names}", tensor=added[0])
    for setting in measurement.settings[:LISTED]:
        what = f"{quoted(setting.name, 120)} in the release is {quoted(setting.actual, 60)}"
        hint = "quantize the merge again, with the config.json of the base"
        yield finding("config-differs", f"{what}, expected {quoted(setting.expected, 60)} as in the base", hint=hint)
    if bad := [tensor for tensor in measurement.tensors if tensor.nonfinite]:
        what = f"{counted(sum(tensor.nonfinite for tensor in bad), 'value')} of {counted(len(bad), 'tensor')}"
        hint = "verify the merged model; if its values are finite, quantize it again"
        yield finding("nonfinite", f"{what} are NaN or Inf: {_listed(bad)}", tensor=bad[0].name, hint=hint)
    for tensor in [tensor for tensor in measurement.tensors if tensor.shape != tensor.expected_shape][:LISTED]:
        message = f"a tensor has the shape {list(tensor.shape)}, expected {list(tensor.expected_shape)} as in the merge"
        yield finding("shape-changed", message, tensor=tensor.name)


def tokenizer_findings(settings: Iterable[Setting]) -> Iterator[Finding]:
    """The findings on the tokenizer and the template in a GGUF file. Another padding token changes no answer."""
    for setting in settings:
        kind = "chat-template-differs" if setting.name == TEMPLATE else "tokenizer-differs"
        message = f"{quoted(setting.name, 120, '')} in the release is {setting.actual}"
        message += f", expected {setting.expected}" * bool(setting.expected)
        yield note(kind, message) if setting.name == PADDING else finding(kind, message)


def _per_tensor(release: _Release) -> Iterator[Finding]:
    """A note on each tensor, those first that are furthest from 1."""
    for tensor in sorted(release.parts, key=lambda tensor: -abs(tensor.strength - 1) / (tensor.error + TOLERANCE)):
        (factor, error), ratio = _strength(tensor), tensor.noise / tensor.delta
        what = f"the values of its rows from {tensor.first_row:,} on are" if tensor.first_row else "the delta is"
        message = f"{what} in it {_strength(tensor)} times; the noise is {ratio:,.2g} times its size"
        yield finding("strength", message, tensor=tensor.name, factor=factor, error=error, noise=ratio)


def _listed(tensors: Sequence[TensorStrength]) -> str:
    return listing([_named(tensor) for tensor in tensors], LISTED)


def _named(tensor: TensorStrength) -> str:
    notes = [f"rows from {tensor.first_row:,} on, which the base does not have"] * bool(tensor.first_row)
    notes += [f"{counted(tensor.differing, 'value differs', 'values differ')} from the adapter's"] * bool(
        tensor.differing
    )
    return quoted(tensor.name, 120) + f" ({'; '.join(notes)})" * bool(notes)


def _fits_better(first: _Release, second: _Release) -> bool:
    noises = {_place(tensor): tensor.noise for tensor in first.touched}
    both = [(t.numel, t.noise, noises[_place(t)]) for t in second.touched if noises.get(_place(t)) and t.noise]
    return sum(2 * numel * math.log(own / other) for numel, own, other in both) > MORE_LIKELY


def _place(tensor: TensorStrength) -> tuple[str, int]:
    return tensor.name, tensor.first_row


def _misapplied(release: _Release, at: str, config: AdapterConfig) -> Finding:
    """Step 4, for a release that does not have the delta once."""
    far, has_delta = release.far_from(1), {*map(_place, release.far_from(0))}
    missing = [tensor for tensor in far if _place(tensor) not in has_delta]
    is_full = len(far) < len(release.parts) and any(_place(t) in has_delta for t in release.parts if t not in far)
    changed = [tensor.changed for tensor in release.parts if tensor.changed is not None]
    if release.is_erased:
        codes = f", and {sum(changed) / len(changed):.1%} of the values are not its own" if any(changed) else ""
        message = f"{at}: it was merged into the codes of the quantized base{codes}; {release.noise}"
        return finding("erased", message, **release.figures)
    if missing and is_full:
        what = f"{len(missing):,} of {counted(len(release.touched), 'tensor')} that the adapter changes have the delta"
        message = f"{what} {pooled(missing)} times, expected once: {_listed(missing)}"
        return finding("applied-in-part", message, tensor=missing[0].name, **release.figures)
    if release.pooled.is_near(0, POOLED_ERRORS):
        codes = "; no code differs from those of the quantized base, as after a merge into its codes that left nothing"
        message = f"{at}; {release.noise}{codes if changed and not any(changed) else ''}"
        return finding("not-applied", message, tensor=release.parts[0].name, **release.figures)
    where, odd, kind = _listed(far) if is_full else "all tensors", far or release.parts, "other-strength"
    explain = (item for item in release.far_kinds().items() if {*map(_place, far)} <= {*map(_place, item[1])})
    name, tensors = next(explain, ("", []))
    if name and len(tensors) < len(release.parts):
        odd = tensors
        where = f"{counted(len(odd), 'tensor')} of the kind {quoted(name, 120)}"
    factor = pooled(odd)
    why = ", or ".join(reasons(factor.value, config))
    message = f"the delta is in {where} {factor} times, expected once" + (f": {why}" if why else "")
    if odd is tensors and factor.is_near(0, POOLED_ERRORS):
        kind = "applied-in-part"
    elif factor.is_near(2, POOLED_ERRORS, FACTOR_TOLERANCE):
        kind = "applied-twice"
    return finding(kind, message, tensor=odd[0].name, **release.figures | {"factor": factor.value})
