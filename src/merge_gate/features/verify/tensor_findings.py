"""Names the kind of a finished model, from the facts about each tensor: its values, its name, its dtype, and its file.

In: a `Comparison`, those of other candidates, the adapter's strength, and the headers of both directories. Out:
findings, one for each kind. Imports no torch, and opens no files.

1. Each tensor that the merge touches has a state: as merged, as in the base, along the delta, or other.
2. The states of all tensors together give the kind: one adapter is applied by one program.
3. Tensors that the merge does not touch must equal those of the base.
4. A name that is missing may be stored under another one: transformers renames tensors while it loads them. So names
   are compared as stored, and then by the tensors of the model that they make.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.verify.comparison import Comparison, LoadedKeys, TensorComparison
from merge_gate.judging.kinds import ANSWERS, finding
from merge_gate.records.files import AdapterConfig, BaseFiles
from merge_gate.records.terms import Finding

CHANCE = 6.3e-5
"""Random rounding exceeds a limit of four standard deviations this often."""

FACTOR_TOLERANCE = 0.05
"""A factor within this share of another one is that factor."""

_LISTED = 5
MOST_UNTOUCHED = 0.5
"""If more of the untouched tensors differ than this share, the base is another one."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class TensorState(Enum):
    """What a touched tensor is."""

    EXACT = "exact"
    OTHER_ORDER = "other order"
    CLOSE = "close"
    BIASED = "biased"
    IMPRECISE = "imprecise"
    BASE = "base"
    SCALED = "scaled"
    OTHER = "other"


GOOD = (TensorState.EXACT, TensorState.OTHER_ORDER, TensorState.CLOSE)


def state_of(tensor: TensorComparison, limit: float) -> TensorState:
    """The state of a tensor that the merge touches. `limit`: the standard deviations that random rounding may show."""
    if tensor.same or tensor.in_other_order:
        return TensorState.EXACT if tensor.same else TensorState.OTHER_ORDER
    if tensor.outside == 0:
        return TensorState.CLOSE if tensor.bias <= limit else TensorState.BIASED
    if tensor.is_base:
        return TensorState.BASE
    if not tensor.has_figures or not tensor.is_along_delta or tensor.astray:
        return TensorState.OTHER
    if tensor.delta_sq and abs(tensor.factor - 1) > _tolerance(tensor):
        return TensorState.SCALED
    return TensorState.IMPRECISE if tensor.bias <= limit else TensorState.BIASED


def bias_limit(comparison: Comparison) -> float:
    """The standard deviations that random rounding exceeds in no row, column, or tensor, except by `CHANCE` in all.

    By Hoeffding's inequality, a sum of n terms with random signs exceeds k of them with a chance of 2·exp(-k²/2).
    """
    touched = [tensor for tensor in comparison.tensors if tensor.touched and tensor.numel and tensor.shape]
    lines = sum(1 + tensor.shape[0] + tensor.numel // tensor.shape[0] for tensor in touched)
    return math.sqrt(2 * math.log(2 * max(1, lines) / CHANCE))


def _tolerance(tensor: TensorComparison) -> float:
    """How far the factor of a right merge may be from 1: rounding moves it if the delta is small."""
    spread = tensor.rounding_sq / tensor.numel / tensor.delta_sq if tensor.numel and tensor.delta_sq else 0.0
    return FACTOR_TOLERANCE + 4 * math.sqrt(spread)


def value_findings(
    comparison: Comparison,
    *,
    config: AdapterConfig | None = None,
    candidates: Mapping[str, Comparison] | None = None,
) -> Iterator[Finding]:
    """The findings on the values of all tensors."""
    limit = bias_limit(comparison)
    yield from _shapes([tensor for tensor in comparison.tensors if tensor.shape != tensor.expected_shape])
    for is_touched in (True, False):
        yield from _nonfinite(
            [tensor for tensor in comparison.tensors if tensor.nonfinite and tensor.touched is is_touched]
        )
    states = [(tensor, state_of(tensor, limit)) for tensor in comparison.tensors if tensor.touched]
    others = [tensor for tensor in comparison.tensors if not tensor.touched and not tensor.same and not tensor.is_base]
    odd = [*(tensor for tensor, state in states if state not in GOOD), *others]
    carriers = _carriers(odd, candidates or {})
    yield from _of_candidates(carriers, len(odd))
    touched = [(tensor, state) for tensor, state in states if tensor.name not in carriers]
    others = [tensor for tensor in others if tensor.name not in carriers]
    if (base := _wrong_base(touched, others, comparison)) is not None:
        yield base
        return
    if len(odd) > len(carriers) or not odd:
        yield from _merged(comparison, touched, others, config or AdapterConfig(), has_candidates=bool(candidates))
    yield from _base_changed(others)


def _carriers(odd: Iterable[TensorComparison], candidates: Mapping[str, Comparison]) -> dict[str, str]:
    """The names of tensors that have a candidate's values, and that candidate.

    If the model is the candidate's merge, the tensors that this merge leaves alone count too.
    """
    carriers: dict[str, str] = {}
    for name, comparison in candidates.items():
        limit = bias_limit(comparison)
        theirs = {
            tensor.name: state_of(tensor, limit) in GOOD
            and tensor.shape == tensor.expected_shape
            and not tensor.nonfinite
            for tensor in comparison.tensors
        }
        is_whole = bool(theirs) and all(theirs.values())
        carriers |= {
            tensor.name: name for tensor in odd if tensor.name not in carriers and theirs.get(tensor.name, is_whole)
        }
    return carriers


def _of_candidates(carriers: Mapping[str, str], total: int) -> Iterator[Finding]:
    for candidate in dict.fromkeys(carriers.values()):
        names = [name for name, carrier in carriers.items() if carrier == candidate]
        message = f"it is the merge of the candidate {quoted(candidate, 200)}, expected the merge of --adapter"
        if len(names) < total:
            odd = f"{len(names):,} of {counted(total, 'tensor that differs', 'tensors that differ')} from the merge"
            has = "has" if len(names) == 1 else "have"
            message = f"{odd} {has} the values of {message.removeprefix('it is ')}: {_listed(names)}"
        yield finding("other-candidate", message, tensor=names[0], tensors=len(names))


def _listed(names: Iterable[str]) -> str:
    return listing([quoted(name, 120) for name in names])


def _tensor_finding(
    kind: str, message: str, odd: Sequence[TensorComparison], *, first: TensorComparison | None = None, **more: Any
) -> Finding:
    """The finding whose message ends with the names of these tensors. `first` is its place, or else the first one."""
    names = _listed(tensor.name for tensor in odd)
    return finding(kind, f"{message}: {names}", tensor=(first or odd[0]).name, **more)


def _worst(odd: Iterable[TensorComparison]) -> TensorComparison:
    return max(odd, key=lambda tensor: tensor.units)


def _shapes(odd: Sequence[TensorComparison]) -> Iterator[Finding]:
    if odd:
        first = odd[0]
        yield finding(
            "shape-changed",
            f"{counted(len(odd), 'tensor has', 'tensors have')} another shape than in the merge: "
            f"{quoted(first.name, 120)} has {list(first.shape)}, expected {list(first.expected_shape)}",
            tensor=first.name,
        )


def _nonfinite(odd: Sequence[TensorComparison]) -> Iterator[Finding]:
    if odd:
        merge_again, copy_again = ANSWERS["nonfinite"].hint.split("; ")
        total = sum(tensor.nonfinite for tensor in odd)
        are = "is" if total == 1 else "are"
        what = f"{counted(total, 'value')} of {counted(len(odd), 'tensor')} {are} NaN or Inf, expected finite values"
        yield _tensor_finding("nonfinite", what, odd, values=total, hint=merge_again if odd[0].touched else copy_again)


# --- the merged tensors ----------------------------------------------------------------------------------------------

_Touched = Sequence[tuple[TensorComparison, TensorState]]


def _merged(
    comparison: Comparison,
    touched: _Touched,
    others: Sequence[TensorComparison],
    config: AdapterConfig,
    *,
    has_candidates: bool,
) -> Iterator[Finding]:
    by_state: dict[TensorState, list[TensorComparison]] = {state: [] for state in TensorState}
    for tensor, state in touched:
        by_state[state].append(tensor)
    good = [tensor for state in GOOD for tensor in by_state[state]]
    if len(good) == len(touched):
        if len(others) < comparison.compared:
            yield _good(by_state, comparison)
        return
    if len(by_state[TensorState.BASE]) == len(touched):
        message = f"{_all(len(touched))} that the adapter changes have the bits of the base"
        yield finding("not-applied", message, tensor=touched[0][0].name)
        return
    yield from _scaled(by_state, len(touched), config)
    if left := by_state[TensorState.BASE]:
        has = "has" if len(left) == 1 else "have"
        what = f"{len(left):,} of {counted(len(touched), 'tensor')} that the adapter changes {has} the bits of the base"
        yield _tensor_finding("applied-in-part", what, left, tensors=len(left))
    yield from _odd(by_state, has_candidates=has_candidates)


def _all(count: int) -> str:
    return "the only tensor" if count == 1 else f"all {count:,} tensors"


def _good(by_state: Mapping[TensorState, Sequence[TensorComparison]], comparison: Comparison) -> Finding:
    merged = counted(sum(len(by_state[state]) for state in GOOD), "merged tensor")
    rest = f"{counted(comparison.compared - len(comparison.tensors), 'other tensor')} have the expected bits"
    if close := by_state[TensorState.CLOSE]:
        worst = _worst(close)
        return finding(
            "rounding",
            f"{len(close):,} of {merged} {'differs' if len(close) == 1 else 'differ'} from PEFT's merge by at most "
            f"{worst.units:.3g} units of the last place, as another order of rounding does; the remaining tensors and "
            f"{rest}",
            tensor=worst.name,
            units=worst.units,
        )
    if other := by_state[TensorState.OTHER_ORDER]:
        bits = f"{'has' if len(other) == 1 else 'have'} the bits of PEFT's merge without safe_merge"
        return finding("other-order", f"{len(other):,} of {merged} {bits}; the remaining tensors and {rest}")
    return finding("exact", f"{merged} and {rest}")


def _scaled(
    by_state: Mapping[TensorState, Sequence[TensorComparison]], total: int, config: AdapterConfig
) -> Iterator[Finding]:
    """One finding for each factor, most tensors first."""
    groups: list[list[TensorComparison]] = []
    for tensor in sorted(by_state[TensorState.SCALED], key=lambda tensor: tensor.factor):
        tolerance = max(_tolerance(tensor) * abs(tensor.factor), 0.01)
        if groups and abs(tensor.factor - groups[-1][0].factor) <= 2 * tolerance:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    for group in sorted(groups, key=len, reverse=True)[:_LISTED]:
        factor = sum(tensor.cross for tensor in group) / sum(tensor.delta_sq for tensor in group)
        where = (
            _all(total)
            if len(group) == total
            else f"{len(group):,} of {total:,} tensors ({_listed(tensor.name for tensor in group)})"
        )
        kind = "applied-twice" if _is(factor, 2) else "other-strength"
        why = ", or ".join(reasons(factor, config))
        message = f"the delta is in {where} {factor:.4g} times, expected once" + (f": {why}" if why else "")
        yield finding(kind, message, tensor=group[0].name, factor=factor)


def _is(factor: float, value: float) -> bool:
    return abs(factor - value) <= FACTOR_TOLERANCE * abs(value)


def reasons(factor: float, config: AdapterConfig) -> Iterator[str]:
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


def _odd(by_state: Mapping[TensorState, Sequence[TensorComparison]], *, has_candidates: bool) -> Iterator[Finding]:
    other, biased, imprecise = (
        by_state[state] for state in (TensorState.OTHER, TensorState.BIASED, TensorState.IMPRECISE)
    )
    if other:
        worst = _worst(other)
        yield _tensor_finding(
            "unexplained",
            f"{counted(len(other), 'merged tensor has', 'merged tensors have')} other values than the merge, the base, "
            "or any multiple of the delta",
            other,
            first=worst,
            units=worst.units,
            factor=worst.factor,
            hint="check the base and its revision: no candidate has these values" if has_candidates else "",
        )
    if biased:
        worst = max(biased, key=lambda tensor: tensor.bias)
        yield _tensor_finding(
            "unexplained",
            f"in {counted(len(biased), 'merged tensor')}, small differences from the exact merge add up in one "
            f"direction: up to {worst.bias:.3g} standard deviations of random rounding in a row, a column, or the "
            "tensor",
            biased,
            first=worst,
            deviations=worst.bias,
            hint="merge again: no order of rounding gives such values",
        )
    if imprecise:
        worst = _worst(imprecise)
        values = sum(tensor.outside or 0 for tensor in imprecise)
        yield _tensor_finding(
            "imprecise",
            f"{counted(values, 'value')} of {counted(len(imprecise), 'merged tensor')} "
            f"{'is' if values == 1 else 'are'} off by more than float32 and rounding explain, by up to "
            f"{worst.units:.3g} units of the last place",
            imprecise,
            first=worst,
            units=worst.units,
            values=values,
        )


# --- the other tensors -----------------------------------------------------------------------------------------------


def _wrong_base(touched: _Touched, others: Sequence[TensorComparison], comparison: Comparison) -> Finding | None:
    """Another base explains what the delta does not: a quantized one, or one with other values nearly everywhere."""
    odd = [tensor for tensor, state in touched if state is TensorState.OTHER]
    explained = sorted((*odd, *others), key=lambda tensor: tensor.requantized is None)
    if kinds := Counter(tensor.requantized[0] for tensor in explained if tensor.requantized is not None):
        what = counted(len(explained), "tensor differs", "tensors differ")
        how = f"as the base does after {kinds.most_common(1)[0][0]} quantization, expected the base as it is stored"
        return _tensor_finding("wrong-base", f"{what} {how}", explained)
    untouched = comparison.compared - len(touched)
    if odd and untouched and len(others) > MOST_UNTOUCHED * untouched:
        what = f"{len(others):,} of {untouched:,} tensors that the adapter does not touch differ from the base"
        return _tensor_finding("wrong-base", f"{what}, and {counted(len(odd), 'merged tensor')} from the merge", others)
    return None


def _base_changed(odd: Sequence[TensorComparison]) -> Iterator[Finding]:
    if odd:
        worst, untouched = _worst(odd), "that the adapter does not touch"
        what = counted(len(odd), f"tensor {untouched} differs", f"tensors {untouched} differ")
        yield _tensor_finding(
            "base-changed", f"{what} from the base", odd, first=worst, units=worst.units, tensors=len(odd)
        )


# --- names, ties, dtypes, and files ----------------------------------------------------------------------------------


def stored_findings(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    """The findings on names, ties, dtypes, and files."""
    yield from _stored(base, merged, comparison)
    yield from _ties(comparison)
    yield from _files(merged)
    yield from _dtypes(base, merged, comparison)


def _stored(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    before, after = comparison.base_keys, comparison.merged_keys
    of_base, of_merged = dict(before.targets), dict(after.targets)
    ties = dict(before.ties) | dict(after.ties)
    stored, own = ({tensor.name: None for tensor in files.tensors} for files in (base, merged))
    expected_absent = {*before.stale_buffers, *comparison.lacked}
    lacking = [name for name in stored if name not in own and name not in expected_absent]
    extra = [name for name in own if name not in stored]
    renamed = [name for name in lacking if _makes(of_base.get(name), _made(after))]
    gone = [name for name in lacking if not _makes(of_base.get(name), _with_tied(_made(after), ties))]
    made = {target for name in gone for target in of_base.get(name, ())}
    gone += [name for name in comparison.absent if name not in made and name not in gone and name not in stored]
    expected = _with_tied(_made(before) | {*before.without_source}, ties)
    expected |= {tensor.name for tensor in comparison.tensors if tensor.touched}
    expected -= {target for name in own if name in stored for target in of_merged.get(name, ())}  # made already
    added = [name for name in extra if not _makes(of_merged.get(name), expected)]
    if gone:
        what = counted(len(gone), "tensor of the base or the merge is", "tensors of the base or the merge are")
        message = f"{what} not in the directory: {_groups(gone)}"
        yield finding("not-carried", message, tensor=gone[0], tensors=len(gone))
    if added:
        what = counted(len(added), "tensor is", "tensors are")
        message = f"{what} in the directory and not in the merge: {_groups(added)}"
        yield finding("added", message, tensor=added[0], tensors=len(added))
    if renamed and not comparison.is_other_class:
        first = renamed[0]
        new = next((name for name in extra if {*of_base[first]}.intersection(of_merged.get(name, ()))), "")
        what = counted(len(renamed), "tensor of the base is", "tensors of the base are")
        message = f"{what} stored under other names or in another layout: {quoted(first, 120)} as {quoted(new, 120)}"
        yield finding("renamed", message, tensor=first, tensors=len(renamed))


def _made(keys: LoadedKeys) -> set[str]:
    """The tensors of the model that stored tensors make."""
    return {target for _, targets in keys.targets for target in targets}


def _makes(targets: Collection[str] | None, those: set[str]) -> bool:
    """Whether a stored tensor is loaded, and makes only tensors that are among those."""
    return bool(targets) and those.issuperset(targets or ())


def _with_tied(made: set[str], ties: Mapping[str, str]) -> set[str]:
    """With every tensor that is tied to one of these."""
    firsts = {ties.get(name, name) for name in made}
    return made | firsts | {name for name, first in ties.items() if first in firsts}


def _groups(names: Sequence[str]) -> str:
    """Names by their first part: 15 of `mtp.*`."""
    heads = Counter(name.partition(".")[0] for name in names)
    if len(names) <= _LISTED:
        return _listed(names)
    return listing([f"{count:,} {quoted(f'{head}.*', 80, '`')}" for head, count in heads.most_common()])


def _ties(comparison: Comparison) -> Iterator[Finding]:
    before, after = dict(comparison.base_keys.ties), dict(comparison.merged_keys.ties)
    own = {*_made(comparison.base_keys), *comparison.base_keys.without_source}
    tied = [name for name in after if name not in before and name in own]
    made = _made(comparison.merged_keys).difference(comparison.untied)
    untied = [name for name in before if name not in after and name in made]
    for lost, how in (
        (tied, "one tensor in the directory and two in the base"),
        (untied, "two tensors in the directory and one in the base"),
    ):
        if lost:
            other = (after | before)[lost[0]]
            yield finding("tied", f"{quoted(lost[0], 120)} and {quoted(other, 120)} are {how}", tensor=lost[0])


def _files(merged: BaseFiles) -> Iterator[Finding]:
    """The findings on the directory's weight files alone."""
    for problem in merged.findings:
        _, is_judged_as_base, what = problem.message.partition(" cannot be judged: ")
        message = f"the model cannot be loaded as it is stored: {what}" if is_judged_as_base else problem.message
        hint = problem.hint.replace("the base", "the model")
        yield finding("broken-files", message, tensor=problem.tensor, hint=hint)
    for names, has, lacks in (
        ([name for name, _ in merged.ghosts], "the index names", "the files that it names do not have"),
        ([*merged.unlisted], "the weight files have", "the index does not name"),
    ):
        if names:
            what = f"{has} {counted(len(names), 'tensor')} that {lacks}"
            yield finding("ghost-index", f"{what}: {_groups(names)}", tensor=names[0])


def _dtypes(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    before = {tensor.name: tensor for tensor in base.tensors}
    expected = {tensor.name: tensor.expected_dtype for tensor in comparison.tensors if tensor.touched}
    targets: Mapping[str, tuple[str, ...]] = dict(comparison.merged_keys.targets)
    changed: dict[tuple[str, str], list[str]] = {}
    for tensor in merged.tensors:
        was = before.get(tensor.name)
        merged_dtypes = {expected.get(target) for target in targets.get(tensor.name, (tensor.name,))}
        if was is None or was.dtype == tensor.dtype or merged_dtypes == {_DTYPES.get(tensor.dtype, "")}:
            continue
        changed.setdefault((was.dtype, tensor.dtype), []).append(tensor.name)
    for (old, new), names in sorted(changed.items(), key=lambda item: -len(item[1])):
        what = f"{counted(len(names), 'tensor is', 'tensors are')} stored as {quoted(new, 20)}"
        message = f"{what}, expected {quoted(old, 20)} as in the base: {_groups(names)}"
        yield finding("dtype-changed", message, tensor=names[0])
