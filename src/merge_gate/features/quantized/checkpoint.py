"""A quantized release in safetensors files, as the values that the base's tensors would have.

In: the headers of release and base, and the release's config.json. Out: a `Checkpoint`. What cannot be read is refused
by these headers, before any weight is read. Runs in the worker.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from merge_gate._internal.errors import EngineError
from merge_gate.engine.base.stored_spans import StoredBytes, stored_bytes
from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.features.quantized.folds import ROWS, Folds
from merge_gate.features.quantized.layouts import LAYOUTS, DeclaredGrid, Grid, Layout, LayoutError, Weight
from merge_gate.features.quantized.measurement import Setting
from merge_gate.features.quantized.quantization_settings import read_settings
from merge_gate.features.quantized.release import OpenTensor
from merge_gate.features.verify.finished_model import Files
from merge_gate.files.base_formats import KNOWN_NAMES
from merge_gate.files.feed import Feed
from merge_gate.files.headers import DTYPE_BITS, shown
from merge_gate.records.files import StoredTensor

MOST = 0.5
"""A release has the scales of the base if this share of them is the same."""

PLAIN = ("F16", "BF16", "F32", "F64")
UNREAD = {"input_scale", "input_scale_ub", "input_zero_point", "activation_scale", "output_scale", "k_scale", "v_scale",
          "q_scale", "inv_freq"}  # fmt: skip
"""Parts that the values of a weight do not need: scales of activations, and frequencies, which are computed."""

_SCALES = ("scales", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax")
_HINT = (
    "quantize the merge again, or verify a GGUF, AWQ (gemm), bitsandbytes, compressed-tensors, FP8, GPTQ, or MLX "
    "(affine) release of it"
)


def open_checkpoint(
    files: Files,
    base: Files,
    label: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
    own: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Checkpoint:
    """Open a release. `aliases` are further names of tied tensors, with those that the base stores.

    `own` are the shapes of tensors that the model has and the base does not store, such as a classifier's head.

    Raises:
        EngineError: it cannot be read. The message names the format or the tensor.
        ValueError, OSError: as `stored_bytes`.
    """
    stored = {tensor.name: tensor for tensor in base.stored}
    stored = {alias: stored[first] for alias, first in aliases.items() if first in stored} | stored
    try:
        return Checkpoint(files, base, stored, *read_settings(files.directory), own)
    except LayoutError as error:
        raise EngineError(f"the release {shown(label)} {error}", hint=_HINT) from error


class Checkpoint:
    """The tensors of a release, by the names of the base's stored tensors: a `Release` (release.py).

    `of_base` are the base's tensors by name, and `method` is a key of `LAYOUTS`. `folds` are the scales that AWQ or
    SmoothQuant has moved, and `head` is the size of an attention head. `own` are the shapes of further tensors of the
    model. `added` are tensors that neither has.

    Raises:
        LayoutError: a weight has parts that do not fit. The text names it.
    """

    def __init__(  # noqa: PLR0917
        self,
        files: Files,
        base: Files,
        of_base: Mapping[str, StoredTensor],
        method: str,
        declared: DeclaredGrid,
        head: int,
        own: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._feed, self._method, self._declared = files.feed, method, declared
        self._shapes = {name: tensor.shape for name, tensor in of_base.items()}
        self._shapes |= {name: tuple(shape) for name, shape in own.items() if name not in self._shapes}
        self._parts, others = _parts(files.stored, self._shapes)
        self._plain = {tensor.name for tensor in files.stored if tensor.dtype in PLAIN} & self._shapes.keys()
        if not self._parts:
            raise LayoutError(f"stores no weight of the base in the parts of {method}: its tensors have other names")
        if method == "mlx":
            self._shapes |= dict(self._with_other_rows())
        self._layouts = {name: _layout(name, parts, self._shapes[name], method) for name, parts in self._parts.items()}
        try:
            self._is_transposed = False
            self._check()
        except LayoutError as error:
            try:
                self._is_transposed = True  # as the layers of GPT-2 store their weights
                self._check()
            except LayoutError:
                raise error from None
        self._places = stored_bytes(files.directory, {tensor.name: tensor for tensor in files.stored})
        self._base_feed, known = base.feed, {name: tensor for name, tensor in of_base.items() if name in self}
        self._base = stored_bytes(base.directory, known)
        shapes = {
            name: tensor.shape
            for name, tensor in known.items()
            if not self._is_transposed and self.shape(name) == tuple(tensor.shape)
        }
        self.folds = Folds(self._stored, self._base_rows, shapes, head)
        self._latest = threading.local()
        kinds = Counter(map(self.kind, self._parts))
        title = {"bitsandbytes": "bitsandbytes", "mlx": "MLX"}.get(method) or KNOWN_NAMES[method.removesuffix("_v2")]
        self.format = f"{title} ({'; '.join(kind for kind, _ in kinds.most_common(3))})"
        self.settings: tuple[Setting, ...] = ()
        self.added = tuple(name for name in others if not self._is_zero_bias(name))

    def _with_other_rows(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The shapes of MLX's weights, which may have other rows than in the base: MLX quantizes embeddings, too."""
        for name, parts in self._parts.items():
            shape, scales = self._shapes[name], parts["scales"].shape if "scales" in parts else ()
            is_matrix = len(shape) == len(scales) == 2 and scales[0] > 0  # noqa: PLR2004
            if is_matrix and any(scales[1] * size == shape[1] for _, size in self._declared.blocks):
                yield name, (scales[0], shape[1])

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._plain

    def _is_zero_bias(self, name: str) -> bool:
        """Whether it is a bias of zeros, as GPTQ stores for layers without one."""
        rows = self._shapes.get(f"{name.removesuffix('bias')}weight", ())[:1]
        is_bias = name.endswith(".bias") and self._places[name].shape == rows
        return is_bias and not bool(self._places[name].read(self._feed).any())

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as `4 bits in groups of 128`. Empty for plain floats."""
        if name not in self._parts:
            return ""
        parts, layout, values = self._parts[name], self._layouts[name], math.prod(self._shapes[name])
        codes, scales = parts[next(iter(layout.parts))], parts[next(part for part in _SCALES if part in parts)]
        if codes.dtype.startswith("F8"):
            return "FP8"
        bits = math.prod(codes.shape) * DTYPE_BITS[codes.dtype] // max(1, values)
        group = values // max(1, math.prod(scales.shape))
        return f"{bits} bits" + (
            f" in groups of {group}" if group < self._shapes[name][1 - self._is_transposed] else ""
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shapes[name] if name in self._parts else self._places[name].shape)

    def open(self, name: str) -> OpenTensor:
        if name not in self._parts:
            return OpenTensor(
                self.shape(name),
                lambda rows: self.folds.undone(name, self._stored(name, rows), rows),
                lambda _values, _rows: None,
            )
        grid, shape = self._grid(name), self._shapes[name]
        step = shape[0] if self._is_transposed or len(grid.codes) % shape[0] else grid.height
        is_of_base: list[bool] = []

        def again(values: torch.Tensor, rows: slice) -> torch.Tensor:
            if not is_of_base and name not in self._base:
                is_of_base.append(False)
            if not is_of_base:
                rows_of_base = min(shape[0], self._base[name].shape[0])
                first = slice(0, rows_of_base if step == shape[0] else min(rows_of_base, -(-ROWS // step) * step))
                own, base = self._part(name, grid, first), self._base_rows(name, first)
                scales = own.refitted(self._folded(name, base, own, first)).scales
                is_of_base.append(float((scales == own.scales).float().mean()) > MOST)
            own = self._part(name, grid, rows)
            folded = self._folded(name, values, own, rows)
            made = (own if is_of_base[0] else own.refitted(folded)).nearest(folded)
            return self.folds.undone(name, self._oriented(made, values.shape), rows)

        return OpenTensor(
            tuple(shape), lambda rows: self.folds.undone(name, self._stored(name, rows), rows), again, step
        )

    def _part(self, name: str, grid: Grid, rows: slice) -> Grid:
        """The rows of a grid that have these rows of the weight. A row of the weight may take several."""
        if self._is_transposed or (rows.start or 0, rows.stop) == (0, self._shapes[name][0]):
            return grid
        count = len(grid.codes) // self._shapes[name][0]
        return grid.part(slice((rows.start or 0) * count, None if rows.stop is None else rows.stop * count))

    def _stored(self, name: str, rows: slice) -> torch.Tensor:
        if name not in self._parts:
            return _rows(self._places[name], self._feed, rows)
        grid, shape = self._grid(name), self._shapes[name]
        if self._is_transposed or len(grid.codes) % shape[0]:
            return self._oriented(grid.values(), shape)[rows]
        return self._oriented(self._part(name, grid, rows).values(), (-1, shape[1]))

    def _base_rows(self, name: str, rows: slice) -> torch.Tensor:
        return _rows(self._base[name], self._base_feed, rows)

    def _folded(self, name: str, values: torch.Tensor, grid: Grid, rows: slice) -> torch.Tensor:
        """Rows of a tensor in the shape of its codes, with the scales that were moved."""
        by_row, columns = self.folds.factors(name)
        if len(by_row) * len(columns) > 1:
            values = (values * columns).mul_((by_row[rows] if len(by_row) > 1 else by_row)[:, None])
        return (values.mT.contiguous() if self._is_transposed else values).view(grid.codes.shape)

    def _grid(self, name: str) -> Grid:
        """The grid of a weight. Each thread keeps its latest one, because it reads a weight in parts."""
        if getattr(self._latest, "name", None) != name:
            self._latest.name = self._latest.grid = None
            parts = {part: self._places[tensor.name].read(self._feed) for part, tensor in self._parts[name].items()}
            try:
                self._latest.grid = self._layouts[name].read(self._weight(name), parts).settled()
            except LayoutError as error:
                raise EngineError(f"the release cannot be read: its {shown(name)} {error}", hint=_HINT) from error
            self._latest.name = name
        grid: Grid = self._latest.grid
        return grid

    def _oriented(self, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Values in the shape of their codes, in the shape of the weight."""
        if self._is_transposed:
            return values.view(tuple(shape)[::-1]).mT.contiguous()
        return values.view(tuple(shape))

    def _weight(self, name: str) -> Weight:
        rows, columns = self._shapes[name][:: -1 if self._is_transposed else 1]
        return Weight((rows, columns), self._declared, self._method)

    def _check(self) -> None:
        """Raise `LayoutError` if a weight does not fit."""
        for name, parts in self._parts.items():
            on_meta = {part: _on_meta(tensor) for part, tensor in parts.items()}
            try:
                self._layouts[name].check(self._weight(name), on_meta)
            except LayoutError as error:
                raise LayoutError(f"has a weight {shown(name)} that {error}") from error


def _rows(place: StoredBytes, feed: Feed, rows: slice) -> torch.Tensor:
    """Rows of a stored tensor in float32."""
    if not place.shape:
        return place.read(feed).float()
    start, stop, _ = rows.indices(place.shape[0])
    row_bytes = (place.span.end - place.span.start) // max(1, place.shape[0])
    span = replace(place.span, start=place.span.start + start * row_bytes)
    return replace(place, shape=(stop - start, *place.shape[1:]), span=span).read(feed).float()


def _on_meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype]), device="meta")


def _parts(
    stored: Iterable[StoredTensor], base: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """The parts of each quantized weight that the base has, by their suffixes; and tensors that it does not have."""
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    others = []
    for tensor in stored:
        if tensor.dtype not in DTYPES:
            raise LayoutError(f"stores {shown(tensor.name)} in {tensor.dtype}, which cannot be read")
        pieces = tensor.name.split(".")
        places = ((".".join((*pieces[:-count], "weight")), ".".join(pieces[-count:])) for count in (1, 2, 3))
        weight, part = next(((weight, part) for weight, part in places if weight in base), ("", pieces[-1]))
        if weight and (part == "weight" or (part not in {*UNREAD, "bias"} and tensor.name not in base)):
            parts[weight][part] = tensor
        elif part == "scales":
            raise LayoutError(f"has {shown(tensor.name)}: scales of a layer that the base does not have")
        elif tensor.name not in base and part not in UNREAD:
            others.append(tensor.name)
    quantized = {
        name: own for name, own in parts.items() if own.keys() != {"weight"} or own["weight"].dtype not in PLAIN
    }
    return quantized, others


def _layout(name: str, parts: Mapping[str, StoredTensor], shape: Sequence[int], method: str) -> Layout:
    dtypes = {part: tensor.dtype for part, tensor in parts.items()}
    layout = next((layout for layout in LAYOUTS[method] if layout.suits(dtypes)), None)
    if layout is None or len(shape) != 2:  # noqa: PLR2004
        stored = ", ".join(f"{shown(part)} ({dtype})" for part, dtype in sorted(dtypes.items())[:8])
        raise LayoutError(f"stores {shown(name)} as {stored}, which cannot be read as {method}")
    return layout
