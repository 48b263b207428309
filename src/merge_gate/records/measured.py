"""What the engine measures of bases and merges, or why it could not measure them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import BaseKey, Origin, record, reported


@record
class TensorStats:
    """The measured values of one tensor.

    `minimum` and `maximum` cover the finite elements, and are None if no element is finite. `dtype` is torch's name
    without the prefix (bfloat16). A quantized weight is measured after dequantization. `first_index` is the index of
    the first non-finite element in row-major order. `is_buffer`: a persistent buffer of the base, not a parameter.
    """

    name: str = reported("Its name in the merged model.")
    dtype: str = reported(
        "Its dtype after the merge, in torch's words. A quantized weight has the dtype of its dequantized values."
    )
    shape: tuple[int, ...] = reported("Its shape.")
    numel: int = reported("How many elements it has.")
    minimum: float | None = reported("Smallest finite value; null if no value is finite.", default=None)
    maximum: float | None = reported("Largest finite value; null if no value is finite.", default=None)
    nan: int = reported("How many elements are NaN.", default=0)
    posinf: int = reported("How many elements are +Infinity.", default=0)
    neginf: int = reported("How many elements are -Infinity.", default=0)
    first_index: tuple[int, ...] | None = reported("Index of the first non-finite element, row-major.", default=None)
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

    `stats` describes the merged tensor in its final dtype, with its name in the merged model. `module` is the base's
    module. `dtype_max` is the largest finite value of the dtype. `changed` says whether any value differs from the
    base's (−0.0 equals 0.0) by more than the roundings of the merge itself. `base_norm` and `delta_norm` are the
    Frobenius norms of the base's tensor and of the exact delta. `lost_norm` is ‖merged − (W + delta)‖. A norm is None
    if it was not measured. `unchanged_fraction` is the share of elements whose bits the merge did not change.

    `estimated`: `base_norm`, `lost_norm`, `unchanged_fraction` and DoRA's `delta_norm`
    are estimates from a sample of the rows (engine/merge/plan.py).

    `keeps_rows`: no row changed by more than 0.7 times its norm (engine/forward); False if not measured.
    """

    module: str = reported("Module of the base.")
    stats: TensorStats = reported("The merged tensor in its final dtype.")
    dtype_max: float = reported("Largest finite value of the dtype.")
    changed: bool = reported("Whether any element differs from the base.")
    base_norm: float | None = reported("‖W‖, the Frobenius norm of the base's tensor.", default=None)
    delta_norm: float | None = reported("‖ΔW‖, the Frobenius norm of the exact delta.", default=None)
    lost_norm: float | None = reported(
        "What rounding lost: the norm of the merged tensor minus the exact sum W + ΔW.", default=None
    )
    unchanged_fraction: float | None = reported("Share of elements whose bits the merge did not change.", default=None)
    estimated: bool = reported(
        "Whether `base_norm`, `lost_norm`, `unchanged_fraction` and DoRA's `delta_norm` are estimated from a sample.",
        default=False,
    )
    keeps_rows: bool = False

    @property
    def delta_ratio(self) -> float | None:
        """‖ΔW‖/‖W‖."""
        return _share(self.delta_norm, self.base_norm)

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding lost."""
        return _share(self.lost_norm, self.delta_norm)


def _share(part: float | None, whole: float | None) -> float | None:
    """None if a norm is unknown or not finite, or `whole` is 0."""
    if part is None or not whole or not math.isfinite(part) or not math.isfinite(whole):
        return None
    return part / whole


NORM_LIMIT = 0.5
"""Above this share of the delta's norm, what rounding takes may matter, so its effect on the outputs is measured."""


@record
class MeasureOptions:
    """Which figures may be estimated, because no check needs them exactly, and which are measured. By default none may.

    With `estimates`, norms and losses may come from a sample of the rows. If a ‖ΔW‖/‖W‖ is above `estimated_ratio`, all
    rows are measured, and `Evidence.typical_rms` too. If rounding loses more than `norm_limit` of the delta's norm, its
    change of the adapter's effect is measured, and above `error_limit` of that, the typical effect. With `rows`,
    `TensorMerge.keeps_rows` is measured, and the model is not run if activations cannot leave the dtype.
    """

    estimates: bool = False
    estimated_ratio: float = math.inf
    norm_limit: float = NORM_LIMIT
    error_limit: float = 0.0
    rows: bool = False


MEASURE_ALL = MeasureOptions()


@record
class FileTensor:
    """One tensor of the adapter's file. `used` False: the merge does not read it."""

    stats: TensorStats
    used: bool = True


@record
class UnreadLayer:
    """A layer whose weight the model reads without calling it. Its adapter does nothing until it is merged.

    `share` is ‖merged − read‖/‖read‖ of its tensors; `read` is what the model reads unmerged. `never_called`: no
    release of torch calls it (the output of `nn.MultiheadAttention`). `in_logits`: a forward pass has shown that the
    model's logits depend on it.
    """

    module: str
    share: float
    never_called: bool = False
    in_logits: bool = False


@record
class BaseFacts:
    """The measured base. `parameters` counts elements of parameters and persistent buffers.

    `loaded_as` is the class of the model. `replaced` names the tensors of its own head that the adapters replace by a
    head of another size. `quantization` and `dtype` are those of the loaded model. `dtypes` counts the parameters of
    each dtype if there are several. `incomplete` are parameters of the base's own class that its files lack.
    `unloaded` are stored tensors that are not part of the model. `no_skeleton` says why `from_pretrained` loaded a base
    that is otherwise filled from a feed (engine/base/skeleton.py); it is empty for any other base.
    """

    model: str
    revision: str | None
    dtype: str
    quantization: str
    dtypes: tuple[tuple[str, float], ...] = ()
    parameters: int = 0
    nonfinite: tuple[TensorStats, ...] = ()
    loaded_as: str = ""
    replaced: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    no_skeleton: str = ""

    @property
    def key(self) -> BaseKey:
        return BaseKey(model=self.model, revision=self.revision, dtype=self.dtype, quantization=self.quantization)


@record
class Forward:
    """What a run of the model showed, and the comparison of its layers: merged and unmerged, on the same input.

    The layers are compared in every run (engine/merge). The rest comes from engine/forward, which runs base and
    adapter on made-up inputs. A figure is None if it was not measured.
    """

    ran: bool = reported("Whether base and adapter were run.", default=False)
    why_not: str | None = reported(
        "Why they were not run, or which inputs of the model were not made; null if all were.", default=None
    )
    inputs: str | None = reported("The inputs that they were run on.", default=None)
    parameters_run: float | None = reported("Share of the parameters whose modules ran.", default=None)
    modules: int | None = reported("How many of the adapter's modules these inputs should reach.", default=None)
    modules_run: int | None = reported("How many of them ran.", default=None)
    not_run: tuple[str, ...] = reported("The first of the others, for lack of an input that was not made.", default=())
    not_counted: tuple[str, ...] = reported(
        "The first modules that did not run for another reason, such as experts without a token.", default=()
    )
    largest: float | None = reported(
        "The largest finite value, in absolute terms, that a module returned in the dtype of the merged weights.",
        default=None,
    )
    largest_module: str | None = reported("The module that returned it.", default=None)
    largest_of_base: float | None = reported("The largest that the same module returned in the base.", default=None)
    largest_allowed: float | None = reported("Largest finite value of that dtype.", default=None)
    raised: float | None = reported("The largest value in a module that returns less in the base.", default=None)
    raised_module: str | None = reported("That module.", default=None)
    raised_of_base: float | None = reported("The largest that it returned in the base.", default=None)
    nonfinite_module: str | None = reported(
        "The first module that returned NaN or an infinity; null if all values were finite.", default=None
    )
    nonfinite_of_base: float | None = reported(
        "The largest that the same module returned in the base; null if that is not finite either.", default=None
    )
    nonfinite_origin: Origin | None = reported(
        "Whether the base returns it by itself, the adapter, or only the merged model.", default=None
    )
    output_error: float | None = reported(
        "How far the outputs of a model with a module that is not finite are from those in float32, as a share of what "
        "is allowed: three times the base's own difference, or half of the adapter's effect.",
        default=None,
    )
    layers_compared: int = reported("How many layers PEFT merged and computed with, on the same input.", default=0)
    largest_difference: float | None = reported(
        "The largest difference between a merged layer and the unmerged one, as a share of what the adapter changes.",
        default=None,
    )
    effect: float | None = reported(
        "How much the adapter changes the outputs, as a share of the base's: ‖unmerged - base‖/‖base‖.", default=None
    )
    rounding_change: float | None = reported(
        "How much rounding to the dtype of the merged weights changes it: ‖merged - unmerged‖/‖unmerged - base‖.",
        default=None,
    )
    typical_effect: float | None = reported(
        "The effect of the same delta with random signs of its input columns: the median of three. Measured if "
        "`rounding_change` is above the error limit of rounding-loss.",
        default=None,
    )
    missing: bool = reported(
        "Whether another run can have a figure that is missing: memory did not suffice, or a library raised an error.",
        default=False,
    )
    choices_changed: int | None = reported(
        "How many choices of experts that rounding would change. `rounding_change` is measured without these changes.",
        default=None,
    )


@record
class LayerDifference:
    """A layer whose merge does not compute what the layer computes with its adapter, on the same input in float32.

    `change_share` is ‖merged - unmerged‖/‖change by the adapter‖ of its outputs, `output_share` is
    ‖merged - unmerged‖/‖output‖. `class_name` is that of the base's layer.
    """

    module: str
    class_name: str
    change_share: float
    output_share: float


@record
class TensorDifference:
    """A tensor of the final model that is not what it must be, or a layer that was not merged.

    Attributes:
        tensor: its name; the layer's, if that was not merged.
        fault: `before`, `in` or `after` PEFT's merge of the layer; `packed` or `not merged`.
        values: how many values the roundings of PEFT's merge do not explain.
        factor: which multiple of the merge's change the tensor has.
    """

    tensor: str
    fault: str
    values: int | None = None
    factor: float | None = None


@record
class ServedClass:
    """The class that users of the adapter load.

    Attributes:
        name: its name.
        loaded: the class that the base was loaded as.
        is_whole: whether `loaded` is that of a part of the base, and this one that of the whole, which servers load.
        names: the modules of the adapter that it has, by their names in the loaded class and in the adapter's file.
        lacking: those of these names that it lacks, and that transformers does not rename to its own.
        scalings: the factor of the delta of each module, by its own names.
        sizes: the sizes of the input and output of each linear layer; None for other modules.
        sources: the stored tensors that make the weight of a module.
        changed: tensors of the base that the adapter's file has with other values.
    """

    name: str
    loaded: str
    is_whole: bool = False
    names: Mapping[str, str]
    lacking: tuple[str, ...] = ()
    scalings: Mapping[str, float]
    sizes: Mapping[str, tuple[int, int] | None]
    sources: Mapping[str, tuple[str, ...]]
    changed: tuple[str, ...] = ()


@record
class Evidence:
    """Everything that was measured of one adapter on one base. The checks judge it.

    Attributes:
        missing: tensors that the config promises and that did not arrive in the model.
        dropped: those of `missing` that are in the file.
        unexpected: tensors in the file that nothing in the merge uses, with their names in the file.
        targeted: the base's modules that have the adapter's layers.
        typical_rms: the median RMS of the model's matrices; 0.0 if no delta is so large that it matters.
        shared: pairs of modules that hold one tensor; the tensor has the name of the second.
        tied: pairs of a merged tensor and the module that shares it unmerged.
        refused_by_safe_merge: modules that PEFT's `safe_merge=True` refuses although the merged tensor is finite.
        unnamed: tensors of the base that the file replaces, although the config names them nowhere.
        initialized: tensors of the merged model that are absent from the base's files and from the adapter's.
        resized: rows of the vocabulary in the base and after the merge, if it has another size.
        unread: layers that do nothing until they are merged.
        replaced_nonfinite: non-finite tensors of the base that the merged model replaces by finite ones.
        layers_in_blocks: how many layers were merged a block of rows at a time.
        layers_by_peft: how many layers PEFT itself merged.
        cross_checked: layers merged in blocks that PEFT merged as well, with the same bits.
        differing: layers for which PEFT's bits differed. PEFT then merged all layers.
        instead_of: the class that the adapter's task type asks for, if its names fit only the class that the base was
            loaded as.
        forward: what a run of the model showed.
        different: layers whose merge computes something else.
        wrong: tensors of the final model that are not what they must be.
        not_compared: layers that PEFT merged, or cross-checked, and whose merge is not proved; each with the reason.
        versions: those of torch and PEFT.
        served: the class that servers load, if a consumer needs it, or if that class lacks the adapter's names.
        facts: what features add, by their names.
    """

    base: BaseFacts
    peft_type: str | None = None
    file_tensors: tuple[FileTensor, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    targeted: tuple[str, ...] = ()
    merges: tuple[TensorMerge, ...] = ()
    typical_rms: float = 0.0
    shared: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    refused_by_safe_merge: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    resized: tuple[int, int] | None = None
    unread: tuple[UnreadLayer, ...] = ()
    replaced_nonfinite: tuple[str, ...] = ()
    layers_in_blocks: int = 0
    layers_by_peft: int = 0
    cross_checked: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    refusal: Refusal | None = None
    instead_of: str | None = None
    served: ServedClass | None = None
    seed: int | None = None
    parameters_checked: int = 0
    parameters_total: int = 0
    seconds: float = 0.0
    forward: Forward = Forward()
    different: tuple[LayerDifference, ...] = ()
    wrong: tuple[TensorDifference, ...] = ()
    not_compared: tuple[tuple[str, str], ...] = ()
    versions: str = ""
    facts: tuple[tuple[str, object], ...] = ()

    @property
    def rounded(self) -> tuple[TensorMerge, ...]:
        """The merges whose rounding loss was measured."""
        return tuple(
            merge
            for merge in self.merges
            if merge.lost_norm is not None and merge.delta_norm and math.isfinite(merge.lost_norm + merge.delta_norm)
        )

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding lost, over all `rounded` merges; None if there are none."""
        lost, delta = (
            math.hypot(*(norm or 0.0 for norm in norms))
            for norms in ([merge.lost_norm for merge in self.rounded], [merge.delta_norm for merge in self.rounded])
        )
        return lost / delta if delta else None
