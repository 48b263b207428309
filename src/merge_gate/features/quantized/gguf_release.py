"""Reads the tensors of a GGUF file by the names of the base's model, rows at a time.

In: a GGUF file, and the base's model without values. Out: a `Release`. The package `gguf` dequantizes, and transformers
maps names and reverts what llama.cpp's converter changes (rows of q and k, norms of Gemma).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import modeling_gguf_pytorch_utils as of_transformers

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate._internal.text import listing, quoted
from merge_gate.features.quantized.gguf_file import GgufTensor, read_header
from merge_gate.features.quantized.gguf_names import differing_factors, differing_settings, named, rope_factors
from merge_gate.features.quantized.measurement import Setting
from merge_gate.features.quantized.release import OpenTensor, whole

BLOCK = 1 << 17
"""Values that are dequantized at once: they stay in the processor's cache."""

_FLOATS = {"F32", "F16", "BF16", "F64"}
_SIMILAR = {
    "Q2_K": (16, 3, False), "Q3_K": (16, 7, True), "Q4_K": (32, 15, False), "Q5_K": (32, 31, False),
    "Q6_K": (16, 63, True), "IQ4_NL": (32, 15, True), "IQ4_XS": (32, 15, True),
}  # fmt: skip
"""Types that `gguf` does not quantize: values that share a scale, steps, and whether there is no offset.

Rounding to these steps has nearly the noise of the type. Other types have as many steps as their bits allow, in blocks
of this size."""
_BLOCK = 16


class _Order(NamedTuple):
    """Where the file has each row. `is_plain`: in the same order."""

    of_rows: np.ndarray[Any, Any]
    is_plain: bool


class GgufRelease:
    """A GGUF file. Its tensors have the names of the model, and the shapes that transformers gives them.

    `header` has its keys and its tokens.
    """

    def __init__(self, file: BufferedReader, model: Any) -> None:
        try:
            import gguf  # noqa: PLC0415 - of the extra
        except ImportError as error:
            hint = "install it where merge-gate runs: pip install 'merge-gate[quantized]'"
            raise EngineError("GGUF cannot be read without the package gguf", hint=hint) from error
        self._gguf, self._file = gguf, file
        self._types: Mapping[int, Any] = {kind.value: kind for kind in self._gguf.GGMLQuantizationType}
        header = read_header(file, {kind.value: size for kind, size in self._gguf.GGML_QUANT_SIZES.items()})
        self.header, self._names = header, named(header, model)
        self._tensors, self.added = self._names.tensors, self._names.added
        kinds = dict.fromkeys(self.kind(name) for name in self._tensors)
        self.format = f"GGUF ({listing(sorted(filter(None, kinds))) or 'not quantized'})"
        config = model.config.get_text_config(decoder=True)
        self.settings = (*differing_settings(header, config), *self._differing_rope(config))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def expects(self, name: str) -> bool:
        return name in self._names.names.values()

    def kind(self, name: str) -> str:
        kind: str = self._types[self._tensors[name][0].type].name
        return "" if kind in _FLOATS else kind

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file has it. If several tensors make one, they are joined in their second dimension."""
        first, *others = (tensor.shape for tensor in self._tensors[name])
        return (*first[:1], sum(shape[1] for shape in (first, *others)), *first[2:]) if others else first

    def open(self, name: str) -> OpenTensor:
        parts, is_quantized = self._tensors[name], bool(self.kind(name))
        if len(parts) > 1:
            return OpenTensor(
                self.shape(name),
                lambda rows: torch.cat([self._values(tensor, rows) for tensor in parts], 1),
                lambda values, _rows: self._again_in_parts(parts, values) if is_quantized else None,
            )
        (tensor,) = parts
        order = self._order(name, tensor)
        if order is None:
            values = self._processed(name, self._values(tensor, slice(None)).numpy())
            return whole(values, lambda others: self._again_whole(tensor, others) if is_quantized else None)
        return OpenTensor(
            tensor.shape,
            lambda rows: self._values(tensor, rows if order.is_plain else order.of_rows[rows]),
            lambda values, _rows: self._again(tensor, values) if is_quantized else None,
        )

    def _order(self, name: str, tensor: GgufTensor) -> _Order | None:
        """The order of the rows, if that is all that transformers changes in such a tensor."""
        if len(tensor.shape) < 2:  # noqa: PLR2004 - a vector is small
            return None
        probe = np.arange(2.0 * tensor.shape[0]).reshape(-1, 2)
        probe = probe.reshape(tensor.shape[0], *[1] * (len(tensor.shape) - 2), 2)
        try:
            made = self._processed(name, probe).numpy()
        except EngineError:
            return None
        order = made[..., 0].reshape(-1).astype(np.int64) // 2
        if made.shape != probe.shape or not np.array_equal(made, probe[order]):
            return None
        is_whole = np.array_equal(np.sort(order), plain := np.arange(len(probe)))
        return _Order(order, bool(np.array_equal(order, plain))) if is_whole else None

    def _processed(self, name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """Values of a tensor as transformers gives them to the model."""
        stored = self._tensors[name][0].name
        parsed: dict[str, Any] = {"tensors": {}}
        more = {"tensor_key_mapping": self._names.names, "parsed_parameters": parsed}
        try:
            made = self._names.processor.process(weights=values, name=stored, **more)
            tensor = parsed["tensors"][name] if made.name is None else torch.as_tensor(made.weights)
        except (NotImplementedError, ValueError, LookupError, RuntimeError) as error:  # of gguf and transformers
            raise self._unreadable(stored, error) from error
        return tensor.contiguous() if values.dtype == np.float64 else tensor.float().contiguous()

    def _unreadable(self, name: str, error: Exception) -> EngineError:
        return EngineError(
            f"{quoted(name, 120)} of the GGUF file cannot be read: {str(error)[:200]}",
            hint="verify the merged model before it is converted",
        )

    def _values(self, tensor: GgufTensor, rows: slice | np.ndarray[Any, Any]) -> torch.Tensor:
        """Rows of a tensor in float32, by their places in the file."""
        of_row = tensor.shape[1:-1] if len(tensor.shape) > 1 else ()
        per_row, width = math.prod(of_row), tensor.shape[-1]
        count = tensor.shape[0] if len(tensor.shape) > 1 else 1
        if isinstance(rows, slice):
            first, last, chosen = *rows.indices(count)[:2], None
        else:
            first, last = int(rows.min()), int(rows.max()) + 1
            chosen = rows - first
        row_bytes = tensor.size_bytes // count
        packed = np.empty((last - first, row_bytes), dtype=np.uint8)
        place = tensor.start + first * row_bytes
        if os.preadv(self._file.fileno(), [packed.data.cast("B")], place) != packed.nbytes:
            raise SourceError(
                f"the GGUF file ends within its tensor {quoted(tensor.name, 120)}: from byte {place:,} on, "
                f"{packed.nbytes:,} bytes are expected",
                hint="write or download it again, and verify it when it is complete",
            )
        packed = packed if chosen is None else packed[chosen]
        values = torch.empty(len(packed) * per_row, width)
        packed = packed.reshape(len(values), -1)
        for start, block in _blocks(values):
            part = packed[start : start + len(block)]
            try:
                made = self._gguf.quants.dequantize(part, self._types[tensor.type])
            except (NotImplementedError, ValueError, LookupError, RuntimeError) as error:  # of gguf
                raise self._unreadable(tensor.name, error) from error
            block.copy_(torch.as_tensor(made).view(block.shape))
        return values.view(-1, *of_row, width) if len(tensor.shape) > 1 else values.view(width)

    def _differing_rope(self, config: Any) -> Iterator[Setting]:
        """The factors of rotary embeddings, if they are not those of the base's config."""
        stored = self._names.rope
        if (wanted := rope_factors(config)) is None:
            return
        for name in {**wanted, **stored}:
            actual = self._values(stored[name], slice(None)) if name in stored else None
            if (setting := differing_factors(name, wanted.get(name), actual)) is not None:
                yield setting

    def _again_in_parts(self, parts: Sequence[GgufTensor], values: torch.Tensor) -> torch.Tensor:
        halves = zip(parts, values.chunk(2, 1), strict=True)
        return torch.cat([self._again(tensor, own) for tensor, own in halves], 1)

    def _again_whole(self, tensor: GgufTensor, values: torch.Tensor) -> torch.Tensor:
        is_transposed = isinstance(self._names.processor, of_transformers.GPT2TensorProcessor)
        if is_transposed and tensor.name.startswith("blk."):
            return self._again(tensor, values.mT.contiguous()).mT.contiguous()
        return self._again(tensor, values)

    def _again(self, tensor: GgufTensor, values: torch.Tensor) -> torch.Tensor:
        """Values as the release's type. Rows that were exchanged have the same blocks."""
        type_, quants = self._types[tensor.type], self._gguf.quants
        rows = values.reshape(-1, values.shape[-1])
        made = torch.empty_like(rows)
        for start, block in _blocks(rows):
            again = made[start : start + len(block)]
            try:
                again.copy_(torch.from_numpy(quants.dequantize(quants.quantize(block.numpy(), type_), type_)))
            except NotImplementedError:
                again.copy_(_rounded(block, *_SIMILAR.get(type_.name, (_BLOCK, _steps(tensor), False))))
        return made.view(values.shape)


def _steps(tensor: GgufTensor) -> int:
    """The steps of a type by the bytes that it takes: one at least."""
    return max(1, round(2 ** (8 * tensor.size_bytes / math.prod(tensor.shape))) - 1)


def _blocks(rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows, and where they begin."""
    step = max(1, BLOCK // rows.shape[-1])
    return ((start, rows[start : start + step]) for start in range(0, len(rows), step))


def _rounded(values: torch.Tensor, block: int, steps: int, is_symmetric: bool) -> torch.Tensor:
    """Values rounded to equal steps between the extremes of each block."""
    blocks = values.reshape(-1, block)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    if is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    step = ((high - low) / steps).clamp(min=torch.finfo(torch.float32).tiny)
    return (((blocks - low) / step).round() * step + low).reshape(values.shape)
