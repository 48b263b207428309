"""What the engine measures of bases and merges, and why it could not."""

from __future__ import annotations

import math

from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import BaseKey, record, told


@record
class TensorStats:
    """One tensor, measured. `minimum` and `maximum` are over the finite elements, None where there is none.

    `dtype` in torch's words without the prefix (bfloat16). Of a quantised weight, the dequantised values.
    `first_index` is the index of the first non-finite element in row-major order. `is_buffer`: a persistent buffer of
    the base, no parameter.
    """

    name: str = told("Its name in the merged model.")
    dtype: str = told("Its dtype after the merge, in torch's words; of a quantised weight, of the dequantised values.")
    shape: tuple[int, ...] = told("Its shape.")
    numel: int = told("How many elements it has.")
    minimum: float | None = told("Smallest finite value; null where there is none.", default=None)
    maximum: float | None = told("Largest finite value; null where there is none.", default=None)
    nan: int = told("How many elements are NaN.", default=0)
    posinf: int = told("How many elements are +Infinity.", default=0)
    neginf: int = told("How many elements are -Infinity.", default=0)
    first_index: tuple[int, ...] | None = told("Index of the first non-finite element, row-major.", default=None)
    is_buffer: bool = False

    @property
    def finite(self) -> bool:
        return not (self.nan or self.posinf or self.neginf)

    @property
    def max_abs(self) -> float:
        return max((abs(value) for value in (self.minimum, self.maximum) if value is not None), default=0.0)


@record
class TensorMerge:
    """One parameter of the base as the merge leaves it.

    `stats` is of the merged tensor in its final dtype, named as in the merged model. `module` is the base's module.
    `dtype_max` is the largest finite value of the dtype. `changed` says whether any value differs from the base's (−0.0
    is 0.0) by more than the roundings of the merge itself. `base_norm` and `delta_norm` are Frobenius norms of the
    base's tensor and of the exact delta; `lost_norm` is ‖merged − (W + delta)‖; None where they were not measured.
    `unchanged_fraction` is the share of elements whose bits the merge left alone.

    `bounded` counts elements that were not merged one by one. Where there are some, `stats.minimum` and `stats.maximum`
    are bounds that no element exceeds. `estimated`: `base_norm`, `lost_norm`, `unchanged_fraction` and, of DoRA,
    `delta_norm` are estimates by a sample of the rows (engine/merge/plan.py).
    """

    module: str = told("Module of the base.")
    stats: TensorStats = told("The merged tensor in its final dtype.")
    dtype_max: float = told("Largest finite value of the dtype.")
    changed: bool = told("Whether any element differs from the base.")
    base_norm: float | None = told("‖W‖, the Frobenius norm of the base's tensor.", default=None)
    delta_norm: float | None = told("‖ΔW‖, the Frobenius norm of the exact delta.", default=None)
    lost_norm: float | None = told(
        "What rounding took: the norm of the merged tensor less the exact sum W + ΔW.", default=None
    )
    unchanged_fraction: float | None = told("Share of elements whose bits the merge left alone.", default=None)
    bounded: int = told(
        "Elements that were not merged one by one; where there are some, `minimum` and `maximum` are bounds that no "
        "element exceeds.",
        default=0,
    )
    estimated: bool = told(
        "Whether `base_norm`, `lost_norm`, `unchanged_fraction` and, of DoRA, `delta_norm` are estimated from a "
        "sample.",
        default=False,
    )

    @property
    def headroom(self) -> float | None:
        """The largest magnitude as a share of what the dtype holds."""
        return _share(self.stats.max_abs, self.dtype_max)

    @property
    def delta_ratio(self) -> float | None:
        """‖ΔW‖/‖W‖."""
        return _share(self.delta_norm, self.base_norm)

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding took."""
        return _share(self.lost_norm, self.delta_norm)


def _share(part: float | None, whole: float | None) -> float | None:
    """None where one is not known, or the share is no number."""
    if part is None or not whole or not math.isfinite(part) or not math.isfinite(whole):
        return None
    return part / whole


@record
class Leeway:
    """What need not be merged or measured, because the checks do not ask for it; none of it by default.

    With `estimates`, norms and losses may be those of a sample of the rows. A `headroom` above 0 lets a bound stand for
    the merge of a weight, if it proves every value finite and below this share of the dtype's largest (`--quick`).
    """

    headroom: float = 0.0
    estimates: bool = False


NO_LEEWAY = Leeway()


@record
class FileTensor:
    """One tensor of the adapter's file. `used` False: the merge does not read it."""

    stats: TensorStats
    used: bool = True


@record
class UnreadLayer:
    """A layer whose weight the model reads without calling it, so that its adapter does nothing until it is merged.

    `share` is ‖merged − read‖/‖read‖ of its tensors, `read` being what the model reads unmerged. `never_called`: no
    release of torch calls it (the output of `nn.MultiheadAttention`). `in_logits`: a forward pass has shown that the
    model's logits depend on it.
    """

    module: str
    share: float
    never_called: bool = False
    in_logits: bool = False


@record
class BaseFacts:
    """The base as it was measured, once. `parameters` counts elements of parameters and persistent buffers.

    `loaded_as` is the class of the model. `replaced` names the tensors of its own head that gave way to the head of
    another size that the adapters bring. `quantization` and `dtype` are what was loaded; `dtypes` counts the parameters
    of each dtype if there are several. `incomplete` are parameters of the base's own class that its files lack,
    `unloaded` stored tensors that are not part of the model.
    """

    model: str
    revision: str | None
    dtype: str
    quantization: str
    dtypes: tuple[tuple[str, float], ...] = ()
    sha256: str | None = None
    parameters: int = 0
    nonfinite: tuple[TensorStats, ...] = ()
    loaded_as: str = ""
    replaced: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()

    @property
    def key(self) -> BaseKey:
        return BaseKey(model=self.model, revision=self.revision, dtype=self.dtype, quantization=self.quantization)


@record
class Evidence:
    """Everything that was measured of one adapter on one base: what the checks judge.

    `missing` are tensors the config promises and that did not arrive in the model, `dropped` those of them that are in
    the file, `unexpected` those in the file that nothing in the merge uses, in the file's own names. `targeted` are
    the base's modules that the adapter was put on. `shared` pairs a module with the one by whose name its tensor goes,
    where two modules hold one tensor. `tied` pairs a merged tensor with the module that shares it
    unmerged. `refused_by_safe_merge` names modules that PEFT's `safe_merge=True` refuses although the merged tensor is
    finite. `unnamed` are tensors of the base in whose place the file has others, although the config names them
    nowhere. `initialised` are tensors of the merged model that are in neither the base's files nor the adapter's.
    `mended` are tensors of the base that are not finite, and in whose place the merged model has finite ones.
    `instead_of` is the class that the adapter's task type asks for, where its names fit only the class that the base
    was loaded as. `unread` are layers that do nothing until they are merged.

    `layers_in_blocks` were merged a block of rows at a time, `layers_by_peft` by PEFT itself; `witnessed` are those of
    the former that PEFT merged as well, with the same bits. Where PEFT's bits were others, `differing` names the
    layers, and all were merged by PEFT.
    """

    base: BaseFacts
    peft_type: str | None = None
    file_tensors: tuple[FileTensor, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    targeted: tuple[str, ...] = ()
    merges: tuple[TensorMerge, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    refused_by_safe_merge: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    unread: tuple[UnreadLayer, ...] = ()
    mended: tuple[str, ...] = ()
    layers_in_blocks: int = 0
    layers_by_peft: int = 0
    witnessed: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    refusal: Refusal | None = None
    instead_of: str | None = None
    seed: int | None = None
    parameters_checked: int = 0
    parameters_bounded: int = 0
    parameters_total: int = 0
    seconds: float = 0.0

    @property
    def rounded(self) -> tuple[TensorMerge, ...]:
        """The merges of which it is known what rounding took."""
        return tuple(
            one
            for one in self.merges
            if one.lost_norm is not None and one.delta_norm and math.isfinite(one.lost_norm + one.delta_norm)
        )

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding took, over all of these; None where there are none."""
        lost, delta = (
            math.hypot(*(norm or 0.0 for norm in norms))
            for norms in ([one.lost_norm for one in self.rounded], [one.delta_norm for one in self.rounded])
        )
        return lost / delta if delta else None
