"""Layouts of quantized weights in safetensors files: the parts of a weight, and the values that they make.

In: the parts of a weight by their suffixes. Out: a `Grid`, which has the values. The same functions run on the meta
device first, and show there whether the shapes fit. Sources: the layers of AutoGPTQ (qlinear_cuda_old), GPTQModel, and
AutoAWQ (packing_utils); the compressors of compressed-tensors; finegrained_fp8 and fbgemm_fp8 of transformers;
QuantState and Linear8bitLt of bitsandbytes; and `mlx.core.quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional

from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.engine.tensors.quantized import bnb

VALUES = 1 << 20
"""So many values are computed at once."""

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place in a word of each of eight columns."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of values that share a scale in bitsandbytes."""

SAME_SCALE = 0.1
"""Scales by extremes differ so little from those of the release, by their median: else these were found otherwise."""

LARGEST_STATE = 1 << 16
"""A part of a small weight may have so many values."""

WHOLE = 1 << 62
"""So many rows or columns share a scale if all do."""

UNFIT = (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError)
"""What torch and Python raise for shapes that do not fit together."""

Parts = Mapping[str, torch.Tensor]


class LayoutError(Exception):
    """The parts do not fit. The text continues a sentence that begins with the name of the weight."""


class DeclaredGrid(NamedTuple):
    """What is declared of the weights; nothing if it is empty or None. Engines rely on it instead of the weights.

    `bits` are the numbers of bits that a code may have, and `blocks` the rows and columns that may share a scale.
    `is_symmetric`: the code in the middle means zero. `is_ordered`: columns of a group may be anywhere.
    """

    bits: frozenset[int] = frozenset()
    blocks: tuple[tuple[int, int], ...] = ()
    is_symmetric: bool | None = None
    is_ordered: bool | None = None

    def __str__(self) -> str:
        blocks = (f"{'all' if size == WHOLE else size}" for _, size in self.blocks)
        return f"{_either(self.bits)} bits, and groups of {_either(blocks)} columns"


def _either(values: Iterable[object]) -> str:
    return " or ".join(map(str, values)) or "any number of"


class Weight(NamedTuple):
    """A weight of shape (rows, columns), what is declared of it, and its method."""

    shape: tuple[int, int]
    declared: DeclaredGrid
    method: str


class Grid(NamedTuple):
    """Values `codes * scales + offsets`. Scales and offsets (rows, groups) are float32.

    Codes (rows, columns) are float8, int8, or unsigned with so many `bits`. With a `table`, they are places in it.
    `groups` has the group of each column, and `height` is the number of rows that share a scale. The file has the
    scales in this `dtype`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    groups: torch.Tensor
    bits: int = 8
    table: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    height: int = 1
    is_mlx: bool = False
    has_lowest: bool | None = None
    has_zeros: bool | None = None

    def settled(self) -> Grid:
        """The same grid, with what some rows alone may not show.

        `has_lowest`: the lowest code is in use. `has_zeros`: zero has different codes.
        """
        lowest = -128 if self.codes.dtype == torch.int8 else 0
        is_plain = self.table is not None or self.codes.dtype.is_floating_point
        has_lowest = not is_plain and int(self.codes.min()) == lowest
        zeros = self._zeros()
        return self._replace(has_lowest=has_lowest, has_zeros=bool((zeros != zeros[0, 0]).any()))

    def part(self, rows: slice) -> Grid:
        """Some rows of the grid: a multiple of `height`, or up to the last one."""
        return self._replace(codes=self.codes[rows], scales=self.scales[rows], offsets=self.offsets[rows])

    def _zeros(self) -> torch.Tensor:
        """The codes of zero."""
        return (-self.offsets[:: self.height] / self.scales[:: self.height]).nan_to_num().round()

    def values(self) -> torch.Tensor:
        """The values (rows, columns) in float32."""
        values = torch.empty(self.codes.shape)
        for rows, scales, offsets in self._in_rows():
            codes = self.codes[rows].float() if self.table is None else self.table[self.codes[rows].int()]
            torch.addcmul(offsets, codes, scales, out=values[rows])
        return values

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Each of these values (rows, columns), rounded to the nearest one that has a code."""
        rounded = torch.empty(self.codes.shape)
        for rows, scales, offsets in self._in_rows():
            codes = self._rounded(((values[rows] - offsets) / scales).nan_to_num_())
            torch.addcmul(offsets, codes, scales, out=rounded[rows])
        return rounded

    def _rounded(self, codes: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            table = self.table.sort().values
            return table[torch.bucketize(codes, (table[1:] + table[:-1]) / 2)]
        if self.codes.dtype.is_floating_point:
            largest = torch.finfo(self.codes.dtype).max
            return codes.clamp_(-largest, largest).to(self.codes.dtype).float()
        return codes.round_().clamp_(*((0, 2**self.bits - 1) if self.codes.dtype == torch.uint8 else (-128, 127)))

    def refitted(self, values: torch.Tensor) -> Grid:
        """The grid that a quantizer gives these values (rows, columns) by the extremes of each group, if it is settled.

        The same grid if its scales were found otherwise: by calibration, or for columns in another order.
        """
        (rows, columns), count = values.shape, self.scales.shape[1]
        is_even = columns % count == 0 and rows % self.height == 0
        if not is_even or not torch.equal(self.groups.long(), torch.arange(columns) // (columns // count)):
            return self
        blocks = values.view(rows // self.height, self.height, count, -1)
        low, high = blocks.amin((1, 3)).clamp_(max=0), blocks.amax((1, 3)).clamp_(min=0)
        own = self.scales[:: self.height]
        levels, is_signed = 2**self.bits - 1, self.codes.dtype == torch.int8
        if self.is_mlx:
            scales, offsets = (part.to(self.dtype).float() for part in _of_mlx(low, high, levels))
        elif self.has_zeros:
            scales = ((high - low) / levels).to(self.dtype).float()
            offsets = scales * ((low / scales).nan_to_num().round() + 128 * is_signed)
        else:
            scales = (torch.maximum(-low, high) / self._largest_code()).to(self.dtype).float()
            offsets = scales * -self._zeros()
        if not abs(float((scales / own).median()) - 1) < SAME_SCALE:
            return self
        scales, offsets = (part.repeat_interleave(self.height, 0) for part in (scales, offsets))
        return self._replace(scales=scales, offsets=offsets)

    def _largest_code(self) -> float:
        """What the largest value of a group is divided by for its scale, if zero has the middle code."""
        if self.table is not None:
            return 1.0
        if self.codes.dtype.is_floating_point:
            return float(torch.finfo(self.codes.dtype).max)
        return ((1 << self.bits) - (1 if self.has_lowest else 2)) / 2

    def _in_rows(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        step = max(1, VALUES // self.codes.shape[1])
        for start in range(0, len(self.codes), step):
            rows = slice(start, start + step)
            yield rows, self.scales[rows][:, self.groups], self.offsets[rows][:, self.groups]


class Layout(NamedTuple):
    """How a format stores a weight: the suffixes of the parts that its values need, with their dtypes.

    `optional` are further parts. `read` makes the weight, and raises `LayoutError`.
    """

    parts: Mapping[str, str]
    optional: Mapping[str, str]
    read: Callable[[Weight, Parts], Grid]

    def suits(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a weight with parts of these dtypes is stored so."""
        known = {**self.parts, **self.optional}
        suit = (dtype in known.get(part, "").split() for part, dtype in dtypes.items())
        return self.parts.keys() <= dtypes.keys() and all(suit)

    def check(self, weight: Weight, parts: Parts) -> None:
        """Raise `LayoutError` if these parts on the meta device do not make such a weight."""
        if any(tensor.numel() > max(LARGEST_STATE, math.prod(weight.shape)) for tensor in parts.values()):
            raise LayoutError("has a part that is larger than the weight")
        if weight.declared.is_symmetric is False and _ZEROS in self.optional and _ZEROS not in parts:
            raise LayoutError(f"has no {_ZEROS}, and config.json declares codes that are not symmetric")
        try:
            self.read(weight, parts)
        except UNFIT as error:
            shapes = ", ".join(f"{part} {[*tensor.shape]}" for part, tensor in sorted(parts.items()))
            what = f"{shapes}; config.json declares {weight.declared}"
            raise LayoutError(f"has parts that make no weight of shape {[*weight.shape]}: {what}") from error


def _of_mlx(low: torch.Tensor, high: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets for which zero and the value furthest from it have codes."""
    edge, sign = torch.where(-low > high, low, high), torch.where(-low > high, 1, -1)
    scales = sign * ((high - low) / levels).clamp(min=1e-7)
    first = (edge / scales).round()
    return torch.where(first == 0, scales, edge / first), torch.where(first == 0, 0, edge)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes (rows, count) in uint8, from a little-endian stream of bits in each row of `words` (rows, integers)."""
    octets = words.contiguous().view(torch.uint8)
    octets = functional.pad(octets, (0, -octets.shape[1] % bits)).view(len(words), -1, bits)  # 8 codes in `bits` bytes
    codes = octets.new_empty(len(words), octets.shape[1], 8)
    for code in range(8):
        first, shift = divmod(code * bits, 8)
        pair = octets[..., first].short()
        if shift + bits > 8:  # noqa: PLR2004 - bits of a byte
            pair |= octets[..., first + 1].short() << 8
        codes[..., code] = pair >> shift & (1 << bits) - 1
    return codes.view(len(words), -1)[:, :count]


def _bits(words: torch.Tensor, count: int) -> int:
    """The number of bits of each of `count` codes in a row of words."""
    bits = words.shape[1] * 32 // count
    if not 1 <= bits <= 8 or words.shape[1] != -(-count * bits // 32):  # noqa: PLR2004
        raise ValueError(bits)
    return bits


def _spread(weight: Weight, axis: int, groups: int) -> torch.Tensor:
    """The group of each row (axis 0) or column. The last group may be smaller than the others if a size is declared."""
    total, declared = weight.shape[axis], {block[axis] for block in weight.declared.blocks}
    sizes = {min(size, total) for size in declared - {0} if -(-total // size) == groups}
    if 0 in declared or not declared:
        sizes |= {total // groups} if total % groups == 0 else set()
    if len(sizes) != 1:
        raise ValueError(groups)
    return torch.arange(total) // sizes.pop()


def _grid(  # noqa: PLR0917 - what makes a grid
    weight: Weight,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    bits: int,
    index: torch.Tensor | None = None,
) -> Grid:
    """The grid, if the shapes fit. An `index` gives the group of each column, unless it is -1 everywhere."""
    declared = weight.declared
    if declared.bits and bits not in declared.bits:
        raise LayoutError(f"has {bits} bits, and config.json declares {declared}")
    if declared.is_symmetric and isinstance(zeros, torch.Tensor) and not zeros.is_meta:
        middle = 0 if codes.dtype != torch.uint8 else 1 << bits - 1
        if bool((zeros != middle).any()):
            raise LayoutError("has zero points of its own, and config.json declares symmetric codes")
    dtype, scales, groups = scales.dtype, scales.float(), _spread(weight, 1, scales.shape[1])
    offsets, count = -scales * zeros, scales.shape[1]
    if index is not None and index.shape == groups.shape and not index.is_meta and bool((index != -1).any()):
        if declared.is_ordered is False and not torch.equal(index.long(), groups):
            raise LayoutError("has columns in another order (g_idx), and config.json declares none")
        groups = index.long()
        if bool(((index < 0) | (index >= count)).any()):
            raise LayoutError(f"has a g_idx beyond its {count} groups")
    of_rows = torch.Size((weight.shape[0], count))
    if (codes.shape, scales.shape, offsets.shape) != (weight.shape, of_rows, of_rows):
        raise ValueError(of_rows)
    if index is not None and index.shape != groups.shape:
        raise ValueError(index.shape)
    return Grid(codes, scales, offsets, groups, bits, dtype=dtype)


def _gptq(weight: Weight, parts: Parts) -> Grid:
    (rows, columns), words = weight.shape, parts["qweight"].t()
    bits = _bits(words, columns)
    zeros = unpack(parts["qzeros"], bits, rows).t()
    if weight.method == "gptq":  # version 1 stores them less one
        zeros = zeros + 1 & 2**bits - 1
    return _grid(weight, unpack(words, bits, columns), parts["scales"].t(), zeros, bits, parts.get("g_idx"))


def _awq(weight: Weight, parts: Parts) -> Grid:
    codes, zeros = (
        unpack(words, 4, 8 * words.shape[1]).view(*words.shape, 8)[..., AWQ_ORDER].flatten(1).t()
        for words in (parts["qweight"], parts["qzeros"])
    )
    return _grid(weight, codes, parts["scales"].t(), zeros, 4)


def _packed(weight: Weight, parts: Parts) -> Grid:
    (rows, columns), words, zeros = weight.shape, parts["weight_packed"], parts.get("weight_zero_point")
    bits = _bits(words, columns)
    middles = 1 << bits - 1 if zeros is None else unpack(zeros.t(), bits, rows).t()
    codes = unpack(words, bits, columns)
    return _grid(weight, codes, parts["weight_scale"], middles, bits, parts.get("weight_g_idx"))


def _mlx(weight: Weight, parts: Parts) -> Grid:
    words, columns, scales = parts["weight"], weight.shape[1], parts["scales"]
    bits = _bits(words, columns)
    grid = _grid(weight, unpack(words, bits, columns), scales, 0, bits)
    return grid._replace(offsets=parts["biases"].view(scales.shape).float(), is_mlx=True)


def _scaled(weight: Weight, parts: Parts) -> Grid:
    """One scale for all values, for each row, or for each block of rows and columns."""
    scales = next(parts[part] for part in ("weight_scale_inv", "weight_scale", "SCB") if part in parts)
    scales = scales.view(-1, 1) if scales.dim() < 2 else scales  # noqa: PLR2004
    zeros = parts.get("weight_zero_point", torch.zeros((), device=scales.device).expand(scales.shape))
    rows = _spread(weight, 0, len(scales)).to(scales.device)
    layout = parts.get("weight_format")
    if layout is not None and not layout.is_meta and bool(layout.any()):
        raise LayoutError("has a weight_format other than row")
    of_rows = scales[rows] / 127 if "SCB" in parts else scales[rows]  # SCB: the largest value of each row
    grid = _grid(weight, parts["weight"], of_rows, zeros.view(scales.shape)[rows], 8)
    return grid._replace(height=-(-len(rows) // len(scales)))


def _blocks(weight: Weight, parts: Parts) -> Grid:
    """4 bits of bitsandbytes: each block of values is a row of the grid."""
    scales, nested, count = parts["weight.absmax"], parts.get("weight.nested_absmax"), math.prod(weight.shape)
    pairs = unpack(parts["weight"].view(1, -1), 4, count + count % 2).view(-1, 2)  # the first one in the upper half
    part = next((part for part in parts if part in _STATES), None)
    if part is None:
        raise LayoutError("has no quant_state")
    table, counts = parts["weight.quant_map"].view(16), {"blocksize": (count, len(scales))}
    counts |= {"nested_blocksize": (len(scales), len(nested))} if nested is not None else {}
    offset = 0.0 if table.is_meta else _mean_scale(weight, parts[part], part[-3:], table, counts)
    if nested is not None:
        size = _block_size(len(scales), len(nested))
        scales = parts["weight.nested_quant_map"].view(256)[scales.int()]
        scales = scales * nested.repeat_interleave(size)[: len(scales)] + offset
    size = _block_size(count, len(scales))
    in_blocks = Weight((len(scales), size), DeclaredGrid(bits=weight.declared.bits), weight.method)
    grid = _grid(in_blocks, pairs.flip(1).view(-1, size), scales.view(-1, 1), 0, 4)
    return grid._replace(table=table)


def _block_size(values: int, scales: int) -> int:
    """The number of values that share a scale in bitsandbytes."""
    return next((size for size in BLOCK_SIZES if -(-values // size) == scales), 0)


def _mean_scale(
    weight: Weight, state: torch.Tensor, kind: str, table: torch.Tensor, counts: Mapping[str, tuple[int, int]]
) -> float:
    """The mean of the scales, if these are scaled, by the JSON that bitsandbytes stores as bytes.

    bitsandbytes relies on this JSON, and on its own table instead of the stored one. `counts` are the numbers of values
    and of their scales, by the key of their block size.
    """
    try:
        content = parse_strictly(bytes(state.flatten().tolist()))
        mean, sizes = float(content.get("nested_offset", 0)), {key: int(content.get(key, 0)) for key in counts}
        actual = {"shape": content["shape"], "quant_type": content.get("quant_type", kind)}
    except (InvalidJsonError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"has a quant_state that cannot be read: {error}") from error
    if actual != (expected := {"shape": [*weight.shape], "quant_type": kind}) or not math.isfinite(mean):
        raise LayoutError(f"has a quant_state of {str(actual)[:120]}, expected {expected}")
    if key := next((key for key, (values, scales) in counts.items() if -(-values // (sizes[key] or 1)) != scales), ""):
        raise LayoutError(f"has a quant_state with a {key} of {sizes[key]}, expected {_block_size(*counts[key])}")
    if not torch.allclose(table, bnb().get_4bit_type(kind, device="cpu"), atol=1e-3):
        raise LayoutError(f"has another quant_map than the one of {kind}, which bitsandbytes uses")
    return mean


_ZEROS = "weight_zero_point"
_STATES = {f"weight.quant_state.bitsandbytes__{kind}": "U8" for kind in ("nf4", "fp4")}
_FLOATS = "F16 BF16 F32"
_GPTQ = {"qweight": "I32", "qzeros": "I32", "scales": _FLOATS}
_PACKED = {"weight_zero_point": "I32", "weight_g_idx": "I32", "weight_shape": "I32 I64"}
_NF4 = {"weight": "U8", "weight.absmax": "F32", "weight.quant_map": "F32"}
_NESTED = {"weight.absmax": "U8", "weight.nested_absmax": "F32", "weight.nested_quant_map": "F32"}
_SCALED = tuple(
    Layout({"weight": codes, scale: f"{_FLOATS} F8_E8M0"}, zeros, _scaled)
    for scale in ("weight_scale_inv", "weight_scale")
    for codes, zeros in (("F8_E4M3 F8_E5M2", {}), ("I8", {"weight_zero_point": "I8"}))
)

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "gptq": (Layout(_GPTQ, {"g_idx": "I32"}, _gptq),),
    "gptq_v2": (Layout(_GPTQ, {"g_idx": "I32"}, _gptq),),
    "awq": (Layout(_GPTQ, {}, _awq),),
    "compressed-tensors": (Layout({"weight_packed": "I32", "weight_scale": _FLOATS}, _PACKED, _packed), *_SCALED),
    "fp8": _SCALED,
    "fbgemm_fp8": _SCALED,
    "bitsandbytes": (
        Layout(_NF4, _STATES, _blocks),
        Layout({**_NF4, **_NESTED}, _STATES, _blocks),
        Layout({"weight": "I8", "SCB": "F32"}, {"weight_format": "U8"}, _scaled),
    ),
    "mlx": (Layout({"weight": "U32", "scales": _FLOATS, "biases": _FLOATS}, {}, _mlx),),
}
"""The layouts of each method. `gptq_v2` is the version of GPTQ that stores zero points as they are."""
