"""How a finished directory differs from the merge that is expected: facts of the worker, before they are classified."""

from __future__ import annotations

import math

from merge_gate.records.files import Snapshot
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import record

LOST = 1e-3
"""Factors in 16 bits change the square of a delta's norm by less than this share."""


@record
class Deviation:
    """How the values of a tensor deviate from the expected ones: figures that `TensorComparison` explains."""

    units: float = 0.0
    delta_sq: float = 0.0
    cross: float = 0.0
    actual_sq: float = 0.0
    rounding_sq: float = 0.0
    nonfinite: int = 0


@record
class TensorComparison(Deviation):
    """One tensor of the finished model, compared with the tensor that the merge gives.

    `same` is about PEFT's merge with safe_merge, and the figures are about the merge without it, which rounds once.

    Let W be the base's values, E the expected ones, and A the actual ones. A tensor with the same bits has no figures.
    If the shapes differ, all of this is about the part that both tensors have.

    Attributes:
        name: the name in the model, or the stored name if transformers does not load the tensor.
        touched: whether the merge gives the tensor a value of its own.
        same: whether A has the bits of E. If the dtypes differ, of E in the dtype of A.
        same_as_base: the same for W.
        in_other_order: whether A has the bits of PEFT's other order of rounding.
        dtype, expected_dtype: torch's words.
        shape, expected_shape: the tensor has no figures if these have not the same number of dimensions.
        numel: the number of values.
        units: the largest |A - E|, in units of the last place of the larger of |W| and |E|.
            Inf if a value of A is finite and E's is not.
        delta_sq: the sum of (E - W)².
        cross: the sum of (A - W)(E - W).
        actual_sq: the sum of (A - W)².
        rounding_sq: the sum of the squares of these units.
        nonfinite: how many values of A are not finite although E's are.
        outside: how many values of A no order of rounding explains; None if the exact merge is not known.
        bias: the largest sum of signed differences of a row, a column, or the tensor, in standard deviations of random
            rounding.
        astray: how many values of A are further from W + k(E - W) than factors in 16 bits explain.
        requantized: a quantization of the base that explains A - E, and the share that it explains; None if none does.
    """

    name: str
    touched: bool
    same: bool
    same_as_base: bool = False
    in_other_order: bool = False
    dtype: str
    expected_dtype: str
    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    numel: int
    outside: int | None = None
    bias: float = 0.0
    astray: int = 0
    requantized: tuple[str, float] | None = None

    @property
    def has_figures(self) -> bool:
        """Whether the values could be compared one by one."""
        return not self.same and math.isfinite(self.units) and self.rounding_sq > 0

    @property
    def is_base(self) -> bool:
        """Whether A has the values of W, except for values that are not finite."""
        return self.same_as_base or (self.nonfinite > 0 and self.has_figures and self.actual_sq == 0)

    @property
    def factor(self) -> float:
        """The k for which W + k(E - W) is nearest to A, by least squares. 1 is the merge, 0 the base."""
        return self.cross / self.delta_sq if self.delta_sq else 0.0

    @property
    def is_along_delta(self) -> bool:
        """Whether A is W + k(E - W) for some k, except for rounding: to the last place, and of the delta's factors."""
        residual_sq, factor_sq = max(0.0, self.actual_sq - self.factor * self.cross), self.factor**2
        return residual_sq <= 2 * (1 + factor_sq) * self.rounding_sq + LOST * factor_sq * self.delta_sq


@record
class LoadedKeys:
    """What transformers makes of the stored tensors of one directory.

    Attributes:
        targets: each stored tensor that is loaded, and the tensors of the model that it is part of.
        stale_buffers: stored tensors that transformers computes: earlier releases stored them, and it saves none.
        without_source: tensors of the model that no stored tensor makes.
        ties: a name of a tied tensor, and its first name.
    """

    targets: tuple[tuple[str, tuple[str, ...]], ...] = ()
    stale_buffers: tuple[str, ...] = ()
    without_source: tuple[str, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()


@record
class SettingsFiles:
    """The files next to the weights that a finished model has, and those that it should have.

    Attributes:
        expected: the name of each expected file, and its path: the adapter's own file, or else the base's.
        merged: names of the finished model's files of these kinds that can be read.
        has_own_tokenizer: whether the expected tokenizer is the adapter's.
    """

    expected: tuple[tuple[str, str], ...]
    merged: tuple[str, ...]
    has_own_tokenizer: bool = False


@record
class SettingDifference:
    """A key of a file, or a property of the loaded tokenizer, that differs. The values are JSON, cut to one line.

    Without a key, the whole file differs, and `actual` continues a sentence that begins with its name.
    `row` is the reason of the expected difference that it is (features/verify/expected_differences.py); else empty.
    """

    file: str
    key: str
    expected: str
    actual: str
    row: str = ""


@record
class ReadSettings:
    """What transformers makes of the files next to the weights.

    Attributes:
        read: the finished model's files that were compared key by key. Any other file must be equal byte for byte.
        written: names of the files that transformers writes for the expected ones.
        differences: the keys that differ, with those whose difference is expected.
    """

    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    differences: tuple[SettingDifference, ...] = ()


@record
class Comparison:
    """A finished directory, compared with the merge of one adapter.

    Attributes:
        tensors: the tensors that the merge touches, and the others that differ.
        compared: how many tensors were compared, with those that transformers does not load.
        absent: tensors of the merge that the finished model lacks, by their names in the model.
        unloadable: why the finished model cannot be loaded as the base's class; nothing was compared then.
        base_keys, merged_keys: what transformers makes of both directories.
        is_other_class: whether the adapter's task needs another class than the base's own, with other stored names.
        lacked: stored tensors of the base that the class of the adapter's task does not have.
        untied: names of tensors that the merge itself unties.
        settings: the differences of the files next to the weights.
    """

    tensors: tuple[TensorComparison, ...] = ()
    compared: int = 0
    absent: tuple[str, ...] = ()
    unloadable: Refusal | None = None
    base_keys: LoadedKeys = LoadedKeys()
    merged_keys: LoadedKeys = LoadedKeys()
    is_other_class: bool = False
    lacked: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    settings: ReadSettings = ReadSettings()


SETTINGS = tuple[Snapshot, SettingsFiles | None]
"""What the worker gets of a finished model."""

FACT = Comparison
"""What it adds to the evidence."""
