"""A quantized release in safetensors files, as the values that the base's tensors would have.

In: the headers of release and base, and the release's config.json. Out: a `Checkpoint`. What cannot be read is refused
by these headers, before any weight is read. Runs in the worker.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merge_gate._internal.errors import EngineError
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.features.quantized.folds import ROWS, Folds
from merge_gate.features.quantized.layouts import LAYOUTS, Grid, Layout, LayoutError, Weight
from merge_gate.features.verify.finished_model import Files
from merge_gate.files.base_formats import KNOWN_NAMES
from merge_gate.files.headers import DTYPE_BITS, shown
from merge_gate.files.json_object import read_as_transformers
from merge_gate.records.files import StoredTensor

MOST = 0.5
"""A release has the scales of the base if this share of them is the same."""

PLAIN = ("F16", "BF16", "F32", "F64")
UNREAD = ("bias", "input_scale", "input_scale_ub", "input_zero_point", "output_scale", "k_scale", "v_scale")
"""Parts that the values of a weight do not need: scales of activations, and a bias that the base lacks."""

_SCALES = ("scales", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax")
_PACKED = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense", None}
_HINT = "verify a GGUF, AWQ (gemm), bitsandbytes, compressed-tensors, FP8, GPTQ, or MLX (affine) release of this merge"


def open_checkpoint(files: Files, base: Files, label: str) -> Checkpoint:
    """Open a release.

    Raises:
        EngineError: it cannot be read. The message names the format or the tensor.
        ValueError, OSError: as `stored_bytes`.
    """
    config = read_as_transformers(Path(files.directory, "config.json")) or {}
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    keys = ("quantization_config", "compression_config", "quantization")
    settings: dict[str, Any] = next(
        (part[key] for part in parts for key in keys if isinstance(part.get(key), dict)), {}
    )
    try:
        return Checkpoint(files, base, _method(settings), _block(settings), _head_size(parts))
    except LayoutError as error:
        raise EngineError(f"the release {shown(label)} {error}", hint=_HINT) from error


def _head_size(configs: Sequence[Mapping[str, Any]]) -> int:
    """The number of columns of an attention head; 1 if it is not known."""
    for config in configs:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if type(hidden) is int and type(heads) is int and heads > 0:
            own = config.get("head_dim")
            return own if type(own) is int and own > 0 else max(1, hidden // heads)
    return 1


def _method(settings: Mapping[str, Any]) -> str:
    """The key of `LAYOUTS` for these settings of a quantization."""
    formats = [str(part["format"]) for part in (settings, *_dicts(settings, "config_groups")) if part.get("format")]
    method = str(settings.get("quant_method") or ("mlx" if {"bits", "group_size"} <= settings.keys() else ""))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    version = str(settings.get("checkpoint_format") or "gptq")
    other = {
        "gptq": {version} - {"gptq", "gptq_v2"},
        "awq": {str(settings.get("version") or "gemm").lower()} - {"gemm"},
        "compressed-tensors": {*formats} - _PACKED,
        "mlx": {str(settings.get("mode") or "affine")} - {"affine"},
    }.get(method, set())
    if settings.get("transform_config"):
        raise LayoutError("has rotated weights (transform_config in config.json), and cannot be compared with a merge")
    if not method:
        raise LayoutError("has no quantization_config in config.json: nothing says how its weights are stored")
    if other or method not in LAYOUTS:
        name = ": ".join((KNOWN_NAMES.get(method, shown(method)), *map(shown, sorted(other))))
        raise LayoutError(f"is stored in a format that cannot be read ({name})")
    return version if method == "gptq" else method


def _dicts(settings: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    groups = settings.get(key)
    return [part for part in groups.values() if isinstance(part, dict)] if isinstance(groups, dict) else []


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The rows and columns that share a scale; 0 if they are not declared."""
    weights = [part.get("weights") for part in _dicts(settings, "config_groups")]
    blocks = [part.get("block_structure") for part in weights if isinstance(part, dict)]
    for size in (settings.get("weight_block_size"), *blocks, [0, settings.get("group_size")]):
        if isinstance(size, list) and len(size) == 2 and all(type(part) is int and part >= 0 for part in size):  # noqa: PLR2004
            return size[0], size[1]
    return (128, 128) if settings.get("quant_method") == "fp8" else (0, 0)


class Checkpoint:
    """The tensors of a release, by the names of the base's stored tensors: a `Release` (release.py).

    `method` is a key of `LAYOUTS`, and `block` the rows and columns that share a scale; 0 if they are not declared.
    `folds` are the scales that AWQ or SmoothQuant has moved, and `head` is the size of an attention head.

    Raises:
        LayoutError: a weight has parts that do not fit. The text names it.
    """

    def __init__(self, files: Files, base: Files, method: str, block: tuple[int, int], head: int) -> None:
        self._feed, self._method, self._block = files.feed, method, block
        self._shapes = {tensor.name: tensor.shape for tensor in base.stored}
        self._parts = _parts(files.stored, self._shapes)
        self._plain = {tensor.name for tensor in files.stored if tensor.dtype in PLAIN} & self._shapes.keys()
        if not self._parts:
            raise LayoutError(f"stores no weight of the base in the parts of {method}: its tensors have other names")
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
        self._base_feed, known = base.feed, {tensor.name: tensor for tensor in base.stored if tensor.name in self}
        self._base = stored_bytes(base.directory, known)
        shapes = {
            name: tensor.shape
            for name, tensor in known.items()
            if not self._is_transposed and self.shape(name) == tuple(tensor.shape)
        }
        self.folds = Folds(self._stored, self._base_rows, shapes, head)
        self._latest: tuple[str, Grid] | None = None
        kinds = Counter(map(self.kind, self._parts))
        title = {"bitsandbytes": "bitsandbytes", "mlx": "MLX"}.get(method) or KNOWN_NAMES[method.removesuffix("_v2")]
        self.format = f"{title} ({'; '.join(kind for kind, _ in kinds.most_common(3))})"
        self.added = tuple[str, ...]()

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._plain

    def expects(self, name: str) -> bool:
        return name in self._shapes

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

    def read(self, name: str) -> torch.Tensor:
        """The values in float32, in the shape of the base's stored tensor.

        Raises:
            SourceError: the bytes could not be had.
            EngineError: the parts of the tensor contradict each other.
        """
        return self.folds.undone(name, self._stored(name))

    def _stored(self, name: str) -> torch.Tensor:
        if name in self._parts:
            return self._oriented(self._grid(name).values(), name)
        return self._places[name].read(self._feed).float()

    def _base_rows(self, name: str, start: int) -> torch.Tensor:
        """Rows of a tensor of the base, from this one on; all values of a vector."""
        place = self._base[name]
        count = min(ROWS, place.shape[0] - start) if len(place.shape) > 1 else place.shape[0]
        row_bytes = (place.span.end - place.span.start) // place.shape[0]
        span = replace(place.span, start=place.span.start + start * row_bytes)
        return replace(place, shape=(count, *place.shape[1:]), span=span).read(self._base_feed).float()

    def requantized(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """Other values of this tensor, quantized to the nearest codes. None for plain floats.

        The scales follow from the extremes of these values if those of the release are such. If these are the scales of
        the base, the release was merged into the base's codes, and its scales are kept.
        """
        if name not in self._parts:
            return None
        grid = self._grid(name)
        folded = self._folded(name, values, grid)
        starts = range(0, self._shapes[name][0], ROWS)
        base = self._folded(name, torch.cat([self._base_rows(name, start) for start in starts]), grid)
        is_of_base = float((grid.refitted(base).scales == grid.scales).float().mean()) > MOST
        made = (grid if is_of_base else grid.refitted(folded)).nearest(folded)
        return self.folds.undone(name, self._oriented(made, name))

    def _folded(self, name: str, values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Values of a tensor in the shape of its codes, with the scales that were moved."""
        rows, columns = self.folds.factors(name)
        values = (values * columns).mul_(rows[:, None])
        return (values.mT.contiguous() if self._is_transposed else values).view(grid.codes.shape)

    def _grid(self, name: str) -> Grid:
        """The grid of a weight. The latest one is kept, because a weight is read and requantized in turn."""
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            parts = {part: self._places[tensor.name].read(self._feed) for part, tensor in self._parts[name].items()}
            try:
                self._latest = name, self._layouts[name].read(self._weight(name), parts)
            except LayoutError as error:
                raise EngineError(f"the release cannot be read: its {shown(name)} {error}") from error
        return self._latest[1]

    def _oriented(self, values: torch.Tensor, name: str) -> torch.Tensor:
        values = values.view(self._weight(name).shape)
        return values.mT.contiguous() if self._is_transposed else values

    def _weight(self, name: str) -> Weight:
        rows, columns = self._shapes[name][:: -1 if self._is_transposed else 1]
        return Weight((rows, columns), self._block, self._method)

    def _check(self) -> None:
        """Raise `LayoutError` if a weight does not fit."""
        for name, parts in self._parts.items():
            on_meta = {part: _on_meta(tensor) for part, tensor in parts.items()}
            try:
                self._layouts[name].check(self._weight(name), on_meta)
            except LayoutError as error:
                raise LayoutError(f"has a weight {shown(name)} that {error}") from error


def _on_meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype]), device="meta")


def _parts(stored: Iterable[StoredTensor], base: Mapping[str, Sequence[int]]) -> dict[str, dict[str, StoredTensor]]:
    """The parts of each quantized weight by their suffixes, for the weights that the base has."""
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor in stored:
        if tensor.dtype not in DTYPES:
            raise LayoutError(f"stores {shown(tensor.name)} in {tensor.dtype}, which cannot be read")
        pieces = tensor.name.split(".")
        for count in (1, 2, 3):
            weight, part = ".".join((*pieces[:-count], "weight")), ".".join(pieces[-count:])
            if weight in base:
                if part == "weight" or (part not in UNREAD and tensor.name not in base):
                    parts[weight][part] = tensor
                break
        else:
            if pieces[-1] == "scales":
                raise LayoutError(f"has {shown(tensor.name)}: scales of a layer that the base does not have")
    return {name: own for name, own in parts.items() if own.keys() != {"weight"} or own["weight"].dtype not in PLAIN}


def _layout(name: str, parts: Mapping[str, StoredTensor], shape: Sequence[int], method: str) -> Layout:
    dtypes = {part: tensor.dtype for part, tensor in parts.items()}
    layout = next((layout for layout in LAYOUTS[method] if layout.suits(dtypes)), None)
    if layout is None or len(shape) != 2:  # noqa: PLR2004
        stored = ", ".join(f"{shown(part)} ({dtype})" for part, dtype in sorted(dtypes.items())[:8])
        raise LayoutError(f"stores {shown(name)} as {stored}, which cannot be read as {method}")
    return layout
