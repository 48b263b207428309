"""Reads the tensors of a GGUF file by the names of the base's model, one at a time.

In: a GGUF file, and the base's model without values. Out: a `Release`. The package `gguf` dequantizes, and transformers
maps names and reverts what llama.cpp's converter changes (rows of q and k, norms of Gemma).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any

import torch
from transformers import modeling_gguf_pytorch_utils as of_transformers

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate._internal.text import listing, quoted
from merge_gate.features.quantized.gguf_file import GgufTensor, read_header
from merge_gate.features.quantized.gguf_names import differing_factors, differing_settings, named, rope_factors
from merge_gate.features.quantized.measurement import Setting

BLOCK = 1 << 22
"""Values that are dequantized at once: 16 MiB."""

_FLOATS = {"F32", "F16", "BF16", "F64"}
_SIMILAR = {
    "Q2_K": (16, 3, False), "Q3_K": (16, 7, True), "Q4_K": (32, 15, False), "Q5_K": (32, 31, False),
    "Q6_K": (16, 63, True), "IQ4_NL": (32, 15, True), "IQ4_XS": (32, 15, True),
}  # fmt: skip
"""Types that `gguf` does not quantize: values that share a scale, steps, and whether there is no offset.

Rounding to these steps has nearly the noise of the type. Other types have as many steps as their bits allow, in blocks
of this size."""
_BLOCK = 16


class GgufRelease:
    """A GGUF file. Its tensors have the names of the model, and the shapes that transformers gives them."""

    def __init__(self, file: BufferedReader, model: Any) -> None:
        try:
            import gguf  # noqa: PLC0415 - of the extra
        except ImportError as error:
            hint = "install it where merge-gate runs: pip install 'merge-gate[quantized]'"
            raise EngineError("GGUF cannot be read without the package gguf", hint=hint) from error
        self._gguf, self._file = gguf, file
        self._types: Mapping[int, Any] = {kind.value: kind for kind in self._gguf.GGMLQuantizationType}
        header = read_header(file, {kind.value: size for kind, size in self._gguf.GGML_QUANT_SIZES.items()})
        self._names = named(header, model)
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

    def read(self, name: str) -> torch.Tensor:
        parts = self._tensors[name]
        try:
            if len(parts) > 1:
                return torch.cat([self._values(tensor) for tensor in parts], 1)
            parsed: dict[str, Any] = {"tensors": {}}
            more = {"tensor_key_mapping": self._names.names, "parsed_parameters": parsed}
            made = self._names.processor.process(weights=self._values(parts[0]).numpy(), name=parts[0].name, **more)
            values = parsed["tensors"][name] if made.name is None else torch.as_tensor(made.weights)
        except (NotImplementedError, ValueError, LookupError, RuntimeError) as error:  # of gguf and transformers
            raise EngineError(
                f"{quoted(name, 120)} of the GGUF file cannot be read: {str(error)[:200]}",
                hint="verify the merged model before it is converted",
            ) from error
        return values.float().contiguous()

    def _values(self, tensor: GgufTensor) -> torch.Tensor:
        """The values of a tensor as the file has them, in float32."""
        rows = math.prod(tensor.shape[:-1])
        row_bytes, kind = tensor.size_bytes // rows, self._types[tensor.type]
        values = torch.empty(rows, tensor.shape[-1])
        for start, block in _blocks(values):
            packed = torch.empty(len(block), row_bytes, dtype=torch.uint8)
            place = tensor.start + start * row_bytes
            if os.preadv(self._file.fileno(), [packed.numpy().data.cast("B")], place) != packed.numel():
                raise SourceError(
                    f"the GGUF file ends within its tensor {quoted(tensor.name, 120)}: from byte {place:,} on, "
                    f"{packed.numel():,} bytes are expected",
                    hint="write or download it again, and verify it when it is complete",
                )
            block.copy_(torch.as_tensor(self._gguf.quants.dequantize(packed.numpy(), kind)).view(block.shape))
        return values.reshape(tensor.shape)

    def _differing_rope(self, config: Any) -> Iterator[Setting]:
        """The factors of rotary embeddings, if they are not those of the base's config."""
        stored = self._names.rope
        if (wanted := rope_factors(config)) is None:
            return
        for name in {**wanted, **stored}:
            actual = self._values(stored[name]) if name in stored else None
            if (setting := differing_factors(name, wanted.get(name), actual)) is not None:
                yield setting

    def requantized(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """As the release's type. Rows that were exchanged have the same blocks."""
        parts, processor = self._tensors[name], self._names.processor
        if not self.kind(name):
            return None
        if len(parts) > 1:
            halves = zip(parts, values.chunk(2, 1), strict=True)
            return torch.cat([self._again(tensor, own) for tensor, own in halves], 1)
        if isinstance(processor, of_transformers.GPT2TensorProcessor) and parts[0].name.startswith("blk."):
            return self._again(parts[0], values.mT.contiguous()).mT.contiguous()
        return self._again(parts[0], values)

    def _again(self, tensor: GgufTensor, values: torch.Tensor) -> torch.Tensor:
        """Values, quantized and dequantized in blocks of rows."""
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
