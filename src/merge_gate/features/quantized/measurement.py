"""How much of an adapter's delta each tensor of a release has: facts of the worker, before they are judged."""

from __future__ import annotations

import math

from merge_gate.features.verify.comparison import ReadSettings, SettingsFiles
from merge_gate.records.files import Snapshot
from merge_gate.records.terms import record

TOLERANCE = 0.02
"""The strength of a right merge differs from 1 by its error and so much."""

TEMPLATE, PADDING = "tokenizer.chat_template", "tokenizer.ggml.padding_token_id"
"""Keys of a GGUF file."""


@record
class TensorStrength:
    """One tensor of a release, compared with the base and the merge.

    Let W be the base's values, D the delta of the merge in float32, and Q the release's values. Q is fitted by
    a(W + kD) (tensor_fit.py).

    Attributes:
        name: the name in the model.
        kind: how the release stores it, such as `Q4_K`; empty for plain floats.
        touched: whether the merge can change it.
        shape, expected_shape: in the release, and in the merge. If they differ, the common part is compared.
        first_row: the first of its rows that are compared. The base has none of the rows from there on if it is not 0.
        nonfinite: how many values of W, W + D, and Q are not finite. Nothing else is known then.
        differing: how many of them are not the merge's bits, if these are known: of plain floats in rows that the base
            does not have, copied from the adapter's file.
        numel: the number of values.
        sampled: the share of them that the shuffles, the bend, and the search for a merge into codes rest on.
        strength: k. 1 is the merge, and 0 is the base.
        error: the standard error of k: the largest of the errors for white noise, for noise that differs between rows,
            and of the same fit on deltas whose rows are shuffled. Inf if the fit has no solution.
        scale, scale_error: a, and its standard error for white noise. Quantizers that fit their scales shrink W a
            little.
        weight: the norm of W.
        delta: the norm of D.
        noise: the norm of what the fit leaves.
        distance: the norm of Q - W.
        bend: how much larger k is for large values of D, in standard errors. Rounding to codes erases small values.
        own_noise: the norm of the noise of W + D, quantized in this format; None if that cannot be repeated.
        own_scale, own_strength: a and k of the quantized W + D; 1 if the release has other codes than it.
        loudest: how many times its own noise the noise of a row is, in the row where it is most; Inf if that row does
            not resemble the base's.
        uneven: how far strengths of rows or columns differ from k, against those of the repeated quantization; the
            largest ratio of the mean and of the largest squares, in variances. About 1 if each has the same k.
        changed: the share of values that differ from W, quantized in this format; None if it cannot be repeated.
        is_erased: whether Q is nearer to a merge into that quantized W than to the quantized merge and to that W; None
            if unknown.
        rotated: whether rows or columns keep their norms although Q does not resemble W.
    """

    name: str
    kind: str
    touched: bool
    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    first_row: int = 0
    nonfinite: int = 0
    differing: int = 0
    numel: int = 0
    sampled: float = 1.0
    strength: float = 0.0
    error: float = math.inf
    scale: float = 1.0
    scale_error: float = 0.0
    weight: float = 0.0
    delta: float = 0.0
    noise: float = 0.0
    distance: float = 0.0
    bend: float = 0.0
    own_noise: float | None = None
    own_scale: float = 1.0
    own_strength: float = 1.0
    loudest: float = 0.0
    uneven: float = 0.0
    changed: float | None = None
    is_erased: bool | None = None
    rotated: bool = False


@record
class Setting:
    """What the header of a release says, and what the base's config says instead."""

    name: str
    actual: str
    expected: str


@record
class Measurement:
    """A release, compared with the merge of one adapter.

    `absent` are tensors that the release lacks, and `lost` are those of them that the merge changes. The merge changes
    `not_in_format` too, but no release of this format has them. `format` is what texts call its format.
    `added` are tensors that the model does not have, and `settings` differ from those of the base.
    `tokenizers` has what differs from each tokenizer that may be in a file, and `files` the same for a directory.
    """

    format: str = ""
    tensors: tuple[TensorStrength, ...] = ()
    absent: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    not_in_format: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    tokenizers: tuple[tuple[Setting, ...], ...] = ()
    files: tuple[ReadSettings, ...] = ()


@record
class ReleaseFiles:
    """A release, and the files next to its weights, with those of each tokenizer that it may have."""

    release: Snapshot
    files: tuple[SettingsFiles, ...] = ()


SETTINGS = ReleaseFiles
"""What the worker gets of a release."""

FACT = Measurement
"""What it adds to the evidence."""
