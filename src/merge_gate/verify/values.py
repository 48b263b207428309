"""Names the kind of a finished model, from the facts about each tensor.

In: a `Comparison`, those of other candidates, and the adapter's strength. Out: findings, one for each kind. Imports no
torch.

1. Each tensor that the merge touches has a state: as merged, as in the base, along the delta, or other.
2. The states of all tensors together give the kind: one adapter is applied by one program.
3. Tensors that the merge does not touch must equal those of the base.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

from merge_gate.judging.answer_kinds import finding
from merge_gate.records.comparison import Comparison, TensorComparison
from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Finding
from merge_gate.text import counted, listing, quoted, verb

MOST_UNITS = 2.0
"""The merge within one rounding: PEFT rounds the delta and the sum once each, and so may the other program."""

PRODUCT_ROUNDING = 2.0**-18
"""The order of the sums in a product of float32 factors changes the delta by less than this share of its norm."""

FACTOR_TOLERANCE = 0.05
"""A factor within this share of another one is that factor."""

FEW = 8
"""If a merge changes fewer values of a tensor than this, rounding may undo all of it."""

_LISTED = 5
MOST_UNTOUCHED = 0.5
"""If more of the untouched tensors differ than this share, the base is another one."""


class TensorState(Enum):
    """What a touched tensor is."""

    EXACT = "exact"
    OTHER_ORDER = "other order"
    CLOSE = "close"
    IMPRECISE = "imprecise"
    BASE = "base"
    SCALED = "scaled"
    OTHER = "other"


GOOD = (TensorState.EXACT, TensorState.OTHER_ORDER, TensorState.CLOSE)


def state_of(one: TensorComparison) -> TensorState:
    """The state of a tensor of the right shape that the merge touches."""
    if one.same or one.in_other_order:
        return TensorState.EXACT if one.same else TensorState.OTHER_ORDER
    if not one.has_figures:
        return TensorState.OTHER
    if one.same_as_base:
        return TensorState.BASE if one.changed >= FEW else TensorState.CLOSE
    is_merge = abs(one.factor - 1) <= _tolerance(one)
    is_close = one.units <= MOST_UNITS and (is_merge or one.changed < FEW)
    if is_close or one.distance_sq <= PRODUCT_ROUNDING**2 * one.delta_sq:
        return TensorState.CLOSE
    if one.is_along_delta:
        return TensorState.IMPRECISE if is_merge else TensorState.SCALED
    return TensorState.OTHER


def _tolerance(one: TensorComparison) -> float:
    """How far the factor of a right merge may be from 1: rounding moves it if the delta is small."""
    spread = one.rounding_sq / one.numel / one.delta_sq if one.numel and one.delta_sq else 0.0
    return FACTOR_TOLERANCE + 4 * math.sqrt(spread)


def value_findings(
    comparison: Comparison,
    *,
    config: AdapterConfig | None = None,
    candidates: Mapping[str, Comparison] | None = None,
) -> Iterator[Finding]:
    """The findings on the values of all tensors."""
    shaped = [one for one in comparison.tensors if one.shape == one.expected_shape]
    yield from _shapes(one for one in comparison.tensors if one.shape != one.expected_shape)
    yield from _nonfinite(one for one in shaped if one.nonfinite)
    finite = [one for one in shaped if not one.nonfinite]
    touched = [(one, state_of(one)) for one in finite if one.touched]
    others = [one for one in finite if not one.touched]
    base = _wrong_base(touched, others, comparison)
    if base is not None:
        yield base
        return
    yield from _merged(comparison, touched, others, config or AdapterConfig(), candidates or {})
    retied = retied_names(comparison)
    yield from _base_changed([one for one in others if one.name not in retied])


def retied_names(comparison: Comparison) -> frozenset[str]:
    """Names of tensors that are tied in the base or in the finished model, and not in both."""
    before, after = dict(comparison.base_keys.ties), dict(comparison.merged_keys.ties)
    return frozenset(before.keys() ^ after.keys()) - frozenset(comparison.untied)


def is_the_merge(comparison: Comparison) -> bool:
    """Whether all touched tensors are as merged."""
    touched = [one for one in comparison.tensors if one.touched]
    return bool(touched) and all(
        one.shape == one.expected_shape and not one.nonfinite and state_of(one) in GOOD for one in touched
    )


def _names(tensors: Iterable[TensorComparison]) -> str:
    return listing([quoted(one.name, 120) for one in tensors], _LISTED)


def _shapes(tensors: Iterable[TensorComparison]) -> Iterator[Finding]:
    odd = list(tensors)
    if odd:
        first = odd[0]
        yield finding(
            "shape-changed",
            f"{counted(len(odd), 'tensor')} {verb(len(odd), 'has', 'have')} "
            f"another shape than in the merge: {quoted(first.name, 120)} has "
            f"{list(first.shape)}, expected {list(first.expected_shape)}",
            tensor=first.name,
        )


def _nonfinite(tensors: Iterable[TensorComparison]) -> Iterator[Finding]:
    broken = list(tensors)
    if broken:
        total = sum(one.nonfinite for one in broken)
        yield finding(
            "nonfinite",
            f"{counted(total, 'value')} of {counted(len(broken), 'tensor')} {verb(total, 'is', 'are')} "
            f"NaN or Inf, expected finite values: "
            f"{_names(broken)}",
            tensor=broken[0].name,
            measured=(("values", float(total)),),
        )


# --- the merged tensors ----------------------------------------------------------------------------------------------

_Touched = Sequence[tuple[TensorComparison, TensorState]]


def _merged(
    comparison: Comparison,
    touched: _Touched,
    others: Sequence[TensorComparison],
    config: AdapterConfig,
    candidates: Mapping[str, Comparison],
) -> Iterator[Finding]:
    by_state: dict[TensorState, list[TensorComparison]] = {state: [] for state in TensorState}
    for one, state in touched:
        by_state[state].append(one)
    good = [one for state in GOOD for one in by_state[state]]
    if not touched or len(good) == len(touched):
        if len(others) < comparison.compared:
            yield _good(by_state, comparison)
        return
    candidate = next((name for name, one in candidates.items() if is_the_merge(one)), None)
    if candidate is not None:
        yield finding(
            "other-candidate",
            f"it is the merge of the candidate {quoted(candidate, 200)}, expected the merge of --adapter",
        )
        return
    if len(by_state[TensorState.BASE]) == len(touched):
        yield finding(
            "not-applied",
            f"{_all(len(touched))} that the adapter changes have the bits of the base",
            tensor=touched[0][0].name,
        )
        return
    yield from _scaled(by_state, len(touched), config)
    if by_state[TensorState.BASE]:
        left = by_state[TensorState.BASE]
        yield finding(
            "applied-in-part",
            f"{len(left):,} of {counted(len(touched), 'tensor')} that the adapter changes "
            f"{verb(len(left), 'has', 'have')} the bits of the base: "
            f"{_names(left)}",
            tensor=left[0].name,
            measured=(("tensors", float(len(left))),),
        )
    yield from _odd(by_state)


def _all(count: int) -> str:
    return "the only tensor" if count == 1 else f"all {count:,} tensors"


def _good(by_state: Mapping[TensorState, Sequence[TensorComparison]], comparison: Comparison) -> Finding:
    count = sum(len(by_state[state]) for state in GOOD)
    rest = comparison.compared - len(comparison.tensors)
    if by_state[TensorState.CLOSE]:
        close = by_state[TensorState.CLOSE]
        worst = max(close, key=lambda one: one.units)
        return finding(
            "rounding",
            f"{len(close):,} of {counted(count, 'merged tensor')} {verb(len(close), 'differs', 'differ')} "
            f"from PEFT's merge by at most "
            f"{worst.units:.3g} units of the last place; the remaining tensors and {counted(rest, 'other tensor')} "
            "have the expected bits",
            tensor=worst.name,
            measured=(("units", worst.units),),
        )
    if by_state[TensorState.OTHER_ORDER]:
        other = by_state[TensorState.OTHER_ORDER]
        return finding(
            "other-order",
            f"{len(other):,} of {counted(count, 'merged tensor')} {verb(len(other), 'has', 'have')} "
            f"the bits of PEFT's merge without safe_merge; "
            f"the remaining tensors and {counted(rest, 'other tensor')} have the expected bits",
        )
    return finding(
        "exact", f"{counted(count, 'merged tensor')} and {counted(rest, 'other tensor')} have the expected bits"
    )


def _scaled(
    by_state: Mapping[TensorState, Sequence[TensorComparison]], total: int, config: AdapterConfig
) -> Iterator[Finding]:
    """One finding for each factor, most tensors first."""
    left = list(by_state[TensorState.SCALED])
    groups: list[list[TensorComparison]] = []
    for one in sorted(left, key=lambda one: one.factor):
        if groups and abs(one.factor - groups[-1][0].factor) <= 2 * max(_tolerance(one) * abs(one.factor), 0.01):
            groups[-1].append(one)
        else:
            groups.append([one])
    for group in sorted(groups, key=len, reverse=True)[:_LISTED]:
        factor = sum(one.cross for one in group) / sum(one.delta_sq for one in group)
        where = f"{_all(total)}" if len(group) == total else f"{len(group):,} of {total:,} tensors ({_names(group)})"
        kind = "applied-twice" if _is(factor, 2) else "other-strength"
        reasons = ", or ".join(_reasons(factor, config))
        why = f": {reasons}" if reasons else ""
        yield finding(
            kind,
            f"the delta is in {where} {factor:.4g} times, expected once{why}",
            tensor=group[0].name,
            measured=(("factor", factor),),
        )


def _is(factor: float, value: float) -> bool:
    return abs(factor - value) <= FACTOR_TOLERANCE * abs(value)


def _reasons(factor: float, config: AdapterConfig) -> Iterator[str]:
    """What explains a factor: scalings of LoRA that programs confuse."""
    if _is(factor, 2):
        yield "it was merged twice, or at twice its strength"
    if _is(factor, 0.5):
        yield "at half its strength"
    if _is(factor, -1):
        yield "it was subtracted, or the model and --base are exchanged"
    r, alpha = config.r, config.lora_alpha
    if not r or not alpha or r < 1:
        return
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    guesses = {
        "alpha/√r instead of alpha/r": alpha / math.sqrt(r),
        "alpha/r instead of alpha/√r": alpha / r,
        "no scaling at all": 1.0,
        "alpha without the division": float(alpha),
        "1/r": 1 / r,
    }
    if scaling > 0:
        yield from (
            f"scaled by {name}" for name, value in guesses.items() if value != scaling and _is(factor, value / scaling)
        )


def _odd(by_state: Mapping[TensorState, Sequence[TensorComparison]]) -> Iterator[Finding]:
    other, imprecise = by_state[TensorState.OTHER], by_state[TensorState.IMPRECISE]
    if other:
        worst = max(other, key=lambda one: one.units)
        yield finding(
            "unexplained",
            f"{counted(len(other), 'merged tensor')} {verb(len(other), 'has', 'have')} "
            f"other values than the merge, the base, or any multiple of "
            f"the delta: {_names(other)}",
            tensor=worst.name,
            measured=(("units", worst.units), ("factor", worst.factor)),
        )
    if imprecise:
        worst = max(imprecise, key=lambda one: one.units)
        yield finding(
            "imprecise",
            f"{counted(len(imprecise), 'merged tensor')} {verb(len(imprecise), 'differs', 'differ')} "
            f"from PEFT's merge by up to {worst.units:.3g} units of "
            f"the last place, expected at most {MOST_UNITS:g}: {_names(imprecise)}",
            tensor=worst.name,
            measured=(("units", worst.units),),
        )


# --- the other tensors -----------------------------------------------------------------------------------------------


def _wrong_base(touched: _Touched, others: Sequence[TensorComparison], comparison: Comparison) -> Finding | None:
    """Another base explains what the delta does not: a quantized one, or one with other values nearly everywhere."""
    odd = [one for one, state in touched if state is TensorState.OTHER]
    explained = [one for one in (*odd, *others) if one.requantized is not None]
    if explained:
        kinds = Counter(one.requantized[0] for one in explained if one.requantized is not None)
        name = kinds.most_common(1)[0][0]
        return finding(
            "wrong-base",
            f"{counted(len(odd) + len(others), 'tensor')} {verb(len(odd) + len(others), 'differs', 'differ')} "
            f"as the base does after {name} quantization, expected "
            f"the base as it is stored: {_names(explained)}",
            tensor=explained[0].name,
        )
    untouched = comparison.compared - len(touched)
    if odd and untouched and len(others) > MOST_UNTOUCHED * untouched:
        return finding(
            "wrong-base",
            f"{len(others):,} of {untouched:,} tensors that the adapter does not touch differ from the base, and "
            f"{counted(len(odd), 'merged tensor')} from the merge: {_names(others)}",
            tensor=others[0].name,
        )
    return None


def _base_changed(others: Sequence[TensorComparison]) -> Iterator[Finding]:
    odd = [one for one in others if not one.same]
    if not odd:
        return
    worst = max(odd, key=lambda one: one.units)
    yield finding(
        "base-changed",
        f"{counted(len(odd), 'tensor')} that the adapter does not touch {verb(len(odd), 'differs', 'differ')} "
        f"from the base: {_names(odd)}",
        tensor=worst.name,
        measured=(("units", worst.units), ("tensors", float(len(odd)))),
    )
