"""Formats of quantized bases: what the files declare, what the tensors are, and whether the two agree.

In: config.json and the files next to it, names, dtypes and shapes of tensors. Out: `DeclaredQuantization`, and
findings of `base-format` and `base-inconsistent`. Opens no weights.

Transformers reads a declaration from config.json only, under `quantization_config` (quantizers/auto.py). Without one it
reads codes as weights. A method that it does not know is skipped with a warning in the log.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate._internal.text import counted
from merge_gate.files.headers import shown
from merge_gate.files.json_object import read_as_transformers
from merge_gate.judging.checks.base_format import BASE_FORMAT
from merge_gate.judging.checks.base_inconsistent import BASE_INCONSISTENT
from merge_gate.judging.checks.check import Check
from merge_gate.records.files import DeclaredQuantization, StoredTensor
from merge_gate.records.terms import Finding

JUDGED = {"bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "mxfp8", "mxfp4"}
"""Methods whose weights the gate dequantizes and merges into."""

JUDGED_WITH = {"compressed-tensors": "compressed_tensors"}
"""Methods that the gate judges as well if a package is installed, with the name that Python imports."""

KNOWN_NAMES = {
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "bitnet": "BitNet", "compressed-tensors":
    "compressed-tensors", "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3", "fbgemm_fp8": "fbgemm FP8", "fouroversix":
    "FourOverSix", "fp_quant": "FP-Quant", "gemma": "Gemma's own quantization", "gguf": "GGUF", "gptq": "GPTQ", "higgs":
    "HIGGS", "hqq": "HQQ", "metal": "Metal", "modelopt": "NVIDIA ModelOpt", "nvfp4": "NVFP4", "quanto": "quanto",
    "quark": "AMD Quark", "sinq": "SINQ", "spqr": "SpQR", "torchao": "torchao", "vptq": "VPTQ",
    "bitsandbytes_4bit": "bitsandbytes 4-bit", "bitsandbytes_8bit": "bitsandbytes 8-bit", "fp8": "FP8", "mxfp8":
    "MXFP8", "mxfp4": "MXFP4",
}  # fmt: skip
"""Methods as people write them."""

_ALWAYS_CODES = {"aqlm", "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "fbgemm_fp8", "fp8",
                 "gptq", "higgs", "hqq", "mxfp4", "mxfp8", "quanto", "spqr", "vptq"}  # fmt: skip
"""Methods that transformers knows and that never store plain weights. Others, such as bitnet and torchao, may."""

_SIDE_FILES = (
    ("hf_quant_config.json", "modelopt"),
    ("quantize_config.json", "gptq"),
    ("quanto_qmap.json", "quanto"),
    ("quant_config.json", ""),
)
"""Files that other programs write and read, with the method that each one means."""

_FLOATS = {"F16", "BF16", "F32", "F64"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_PACKED = {"U8", "I8", "I16", "I32"}

_OWN_FORMATS = (
    ("exl2", re.compile(r".*\.q_weight"), _PACKED),
    ("exl3", re.compile(r".*\.trellis"), _PACKED),
    ("quanto", re.compile(r".*\.weight\._data(\..+)?"), _PACKED | _FLOAT8),
    ("bitsandbytes_4bit", re.compile(r".*\.weight\.(absmax|quant_map|quant_state\.bitsandbytes__\w+)"), None),
    ("bitsandbytes_8bit", re.compile(r".*\.SCB"), None),
    ("gptq", re.compile(r".*\.qweight"), _PACKED),
    ("hqq", re.compile(r".*\.W_q"), None),
    ("compressed-tensors", re.compile(r".*\.weight_packed"), _PACKED),
    ("torchao", re.compile(r".*\._weight_qdata"), None),
    ("mxfp4", re.compile(r".*_blocks"), {"U8"}),
)
"""Names that only one format has, with the dtypes that go with them (None: any)."""

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_HEADS = re.compile(r"(?:^|\.)(?:mtp|nextn|medusa|eagle)\w*\.")
_UNQUANTIZED_PARTS = re.compile(r"(?:^|\.)(?:lm_head|embed_tokens|embeddings?|wte|word_embeddings)\.")

Tensors = Mapping[str, StoredTensor]


def is_judged(method: str) -> bool:
    """Whether bases of this method are judged here; packages are looked for and not imported."""
    return method in JUDGED or (method in JUDGED_WITH and importlib.util.find_spec(JUDGED_WITH[method]) is not None)


# --- what the files declare ------------------------------------------------------------------------------------------


def declared_in(directory: str, config: Mapping[str, Any]) -> DeclaredQuantization | None:
    """The declaration that transformers reads, else one that it does not read, else None."""
    for part in (config, *(config.get(key) for key in ("text_config", "decoder", "generator"))):
        declared = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(declared, dict):
            return _declaration(declared, "config.json", "quantization_config", is_read=True)
    if isinstance(declared := config.get("compression_config"), dict):
        return _declaration(declared, "config.json", "compression_config", is_read=False, method="compressed-tensors")
    for file, method in _SIDE_FILES:
        if (content := read_as_transformers(Path(directory, file))) is not None:
            inner = content.get("quantization")
            return _declaration(inner if isinstance(inner, dict) else content, file, "", is_read=False, method=method)
    return None


def _declaration(
    content: Mapping[str, Any], file: str, key: str, *, is_read: bool, method: str = ""
) -> DeclaredQuantization:
    quant_method = content.get("quant_method")
    if isinstance(quant_method, str):
        method = quant_method
    for bits in ("8bit", "4bit"):  # as transformers: these flags go before the method's name, and 4 bits before 8
        if content.get(f"load_in_{bits}"):
            method = f"bitsandbytes_{bits}"
    block = content.get("weight_block_size", [128, 128] if method in {"fp8", "mxfp8"} else None)
    ignored: list[Any] = next((content[k] for k in _IGNORED_KEYS if isinstance(content.get(k), list)), [])
    return DeclaredQuantization(
        method=method,
        file=file,
        key=key,
        is_read=is_read,
        format=_text(next((content[k] for k in ("fmt", "format", "quant_algo") if content.get(k)), None)),
        block_size=tuple(block) if _is_block(block) else None,
        ignored=tuple(name for name in ignored if isinstance(name, str)),
    )


_IGNORED_KEYS = (
    "modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules", "exclude_modules",
)  # fmt: skip


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)  # noqa: PLR2004


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# --- what the tensors are --------------------------------------------------------------------------------------------


def findings_of(
    tensors: Iterable[StoredTensor],
    declared: DeclaredQuantization | None,
    config: Mapping[str, Any],
    *,
    label: str,
    original: str | None,
) -> tuple[Finding, ...]:
    """The reasons why a base with these tensors cannot be judged. The first one is the cause."""
    own = {tensor.name: tensor for tensor in tensors if _belongs(tensor.name, config)}
    judge = _Judge(label, declared, original)
    if wrapped := next((tensor for name, tensor in own.items() if ".base_layer." in name), None):
        return (judge.wrapped(wrapped),)
    if declared is None or not declared.is_read:
        return tuple(judge.undeclared(own))
    return tuple(judge.declared(own))


def _belongs(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor may belong to the model's body: heads that predict several tokens at once do not."""
    if _OTHER_HEADS.search(name):
        return False
    layer, count = _LAYER.search(name), config.get("num_hidden_layers")
    return not (layer and type(count) is int and name.startswith("model.layers.") and int(layer[1][:9]) >= count)


def format_of(tensors: Tensors) -> tuple[str, StoredTensor] | None:
    """The quantized format that the names of tensors show, and the first tensor that shows it; None for none."""
    for method, pattern, dtypes in _OWN_FORMATS:
        for name, tensor in tensors.items():
            if (dtypes is None or tensor.dtype in dtypes) and pattern.fullmatch(name):
                if method == "gptq":
                    stem = name.rpartition(".")[0]
                    return ("gptq" if f"{stem}.g_idx" in tensors else "awq or gptq"), tensor
                return method, tensor
    return None


def _is_coded(tensor: StoredTensor) -> bool:
    """Whether the stored numbers of a weight are codes by their dtype."""
    return tensor.name.endswith(".weight") and tensor.dtype in _INTEGERS | _FLOAT8 and len(tensor.shape) > 1


def _codes(tensors: Tensors) -> Iterator[StoredTensor]:
    return filter(_is_coded, tensors.values())


def _needed(method: str, weight: StoredTensor, tensors: Tensors) -> Iterator[str]:
    """The tensors that the values of a weight need: scales, and the state of its packing."""
    name, is_coded = weight.name, _is_coded(weight)
    if method == "compressed-tensors" and (is_coded or name.endswith(".weight_packed")):  # whatever their layout
        yield f"{name.removesuffix('_packed')}_scale"
    elif method == "bitsandbytes_8bit" and is_coded and weight.dtype == "I8":  # the scales of its rows
        yield f"{name.removesuffix('weight')}SCB"
    elif method == "bitsandbytes_4bit" and is_coded and weight.dtype == "U8":
        absmax = tensors.get(f"{name}.absmax")  # if it is quantized, it has scales of its own
        nested = ("nested_absmax", "nested_quant_map") if absmax is not None and absmax.dtype == "U8" else ()
        yield from (f"{name}.{part}" for part in ("absmax", *nested, "quant_map"))
    elif method == "mxfp4" and weight.dtype == "U8":
        pairs = (("_blocks", "_scales"), ("_scales", "_blocks"))
        yield from (name.removesuffix(own) + other for own, other in pairs if name.endswith(own))


def _scale_of(weight: str, tensors: Tensors) -> StoredTensor | None:
    stem = weight.removesuffix("weight")
    return next((tensors[stem + scale] for scale in _SCALES if stem + scale in tensors), None)


def _is_plain(tensors: Tensors) -> bool:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    return bool(matrices) and all(tensor.dtype in _FLOATS for tensor in matrices) and format_of(tensors) is None


class _Judge:
    """Findings about one base, which all name it and its declaration."""

    def __init__(self, label: str, declared: DeclaredQuantization | None, original: str | None) -> None:
        self._label, self._declared = label, declared
        name = f" ({shown(original)})" if original else ""
        self._unquantized = f"gate and merge on the unquantized base{name}, from which this one was made"

    # --- without a declaration that transformers reads ---

    def undeclared(self, tensors: Tensors) -> Iterator[Finding]:
        side = self._declared
        format_and_tensor = format_of(tensors)
        codes = next(
            ((scale, tensor) for tensor in _codes(tensors) if (scale := _scale_of(tensor.name, tensors))), None
        )
        if format_and_tensor is None and codes is None:
            yield from self._integers(tensors)
            return
        tensor = format_and_tensor[1] if format_and_tensor else codes[0]  # type: ignore[index] # one of the two is there
        method = format_and_tensor[0] if format_and_tensor else (side.method if side else "")
        names = {"awq or gptq": "AWQ or GPTQ"}
        title = KNOWN_NAMES.get(method) or names.get(method) or _kind_of(codes)
        if side is not None and side.format and side.method == "modelopt":
            title = f"{title} ({side.format})"
        stored = f"its tensor {shown(tensor.name)} ({tensor.dtype}, in {shown(tensor.file)}) is part of {title}"
        if side is not None:
            place = f"{side.file}, key {side.key}" if side.key else side.file
            stored += f", declared in {place}, which transformers does not read"
        missing = "config.json has no quantization_config: transformers would use the codes as weights"
        if method in KNOWN_NAMES.keys() - JUDGED or method == "awq or gptq":
            yield self._finding(BASE_FORMAT, f"{stored}; {missing}", self._unquantized, tensor)
        else:
            hint = f"copy quantization_config from the config.json that this base was made with, or {self._unquantized}"
            yield self._finding(BASE_INCONSISTENT, f"{stored}; {missing}", hint, tensor)

    def _integers(self, tensors: Tensors) -> Iterator[Finding]:
        tensor = next((tensor for tensor in _codes(tensors) if tensor.dtype in _INTEGERS), None)
        if tensor is not None:
            message = (
                f"its weight {shown(tensor.name)} ({_words(tensor.dtype)}, in {shown(tensor.file)}) holds codes, not "
                "floating-point values, and config.json has no quantization_config that gives them a meaning"
            )
            hint = f"save the weight in its real dtype, or {self._unquantized}"
            yield self._finding(BASE_INCONSISTENT, message, hint, tensor)

    def wrapped(self, tensor: StoredTensor) -> Finding:
        """Weights that PEFT had wrapped have other names than the model's."""
        return self._finding(
            BASE_INCONSISTENT,
            f"its tensor {shown(tensor.name)} (in {shown(tensor.file)}) has a name of a layer that PEFT wraps, "
            "expected the base's own names: it was saved with an adapter attached",
            "save the base again after merge_and_unload() or unload(), or remove `.base_layer` from the names",
            tensor,
        )

    # --- with one ---

    def declared(self, tensors: Tensors) -> Iterator[Finding]:
        declared = self._declared
        assert declared is not None  # noqa: S101 - findings_of
        method = declared.method
        if not method or method == "bitsandbytes":
            expected = "load_in_8bit or load_in_4bit" if method else "quant_method"
            message = f"quantization_config in config.json has no {expected}: nothing says how its weights are stored"
            yield self._finding(BASE_INCONSISTENT, message, f"restore the key, or {self._unquantized}", None)
        elif method in _ALWAYS_CODES and _is_plain(tensors):
            matrix = next(tensor for tensor in tensors.values() if len(tensor.shape) > 1)
            message = (
                f"quantization_config in config.json declares {KNOWN_NAMES[method]}, and all of its weights are plain: "
                f"{shown(matrix.name)} is {matrix.dtype} (in {shown(matrix.file)})"
            )
            yield self._finding(BASE_INCONSISTENT, message, "remove quantization_config from config.json", None)
        elif not is_judged(method):
            title = KNOWN_NAMES.get(method, shown(method))
            if declared.format and method == "modelopt":
                title = f"{title} ({declared.format})"
            message, hint = f"its format is {title}, by quantization_config in config.json", self._unquantized
            if method in JUDGED_WITH:
                message += f"; it can be judged with the package {method}, which is not installed"
                hint = f"`pip install {method}` in the environment that runs the gate, or {hint}"
            yield self._finding(BASE_FORMAT, message, hint, None)
        else:
            yield from self.fp8(tensors) if method in {"fp8", "mxfp8"} else self.parts(tensors)

    def fp8(self, tensors: Tensors) -> Iterator[Finding]:
        """Each weight in 8 bits needs its scale, under a name that transformers reads, of a shape that fits."""
        declared = self._declared
        for weight in _codes(tensors):
            if weight.dtype not in _FLOAT8 or self._is_ignored(weight.name):
                continue
            scale = _scale_of(weight.name, tensors)
            if scale is None:
                message = (
                    f"its weight {shown(weight.name)} ({weight.dtype}, in {shown(weight.file)}) has no scale, expected "
                    f"{shown(weight.name + '_scale_inv')}: quantization_config in config.json declares FP8"
                )
                yield self._finding(BASE_INCONSISTENT, message, f"restore the scale, or {self._unquantized}", weight)
                return
            if scale.name.endswith(".weight_scale"):
                message = (
                    f"its scale {shown(scale.name)} (in {shown(scale.file)}) is stored as AutoFP8 stores it, and "
                    "transformers reads weight_scale_inv only: it would use the codes as weights"
                )
                yield self._finding(BASE_INCONSISTENT, message, self._unquantized, scale)
                return
            block = declared.block_size if declared else None
            if wrong := _wrong_blocks(weight, scale, block):
                yield self._finding(BASE_INCONSISTENT, wrong, self._unquantized, weight)
                return

    def parts(self, tensors: Tensors) -> Iterator[Finding]:
        """Each weight in codes needs its other tensors."""
        method = self._declared.method if self._declared else ""
        for weight in tensors.values():
            missing = [name for name in _needed(method, weight, tensors) if name not in tensors]
            if missing and not (method == "compressed-tensors" and self._is_ignored(weight.name)):
                message = (
                    f"its weight {shown(weight.name)} ({weight.dtype}, in {shown(weight.file)}) is stored in "
                    f"{KNOWN_NAMES[method]} without {shown(missing[0])}, which its values need"
                )
                hint = f"fetch the base again with all of its tensors, or {self._unquantized}"
                yield self._finding(BASE_INCONSISTENT, message, hint, weight)
                return

    def _is_ignored(self, name: str) -> bool:
        """Modules that the declaration leaves out, by parts of their names, and embeddings, which it never includes."""
        ignored = self._declared.ignored if self._declared else ()
        return bool(_UNQUANTIZED_PARTS.search(name)) or any(
            pattern.strip("^$.*") in name for pattern in ignored if pattern
        )

    def _finding(self, check: Check, message: str, hint: str, tensor: StoredTensor | None) -> Finding:
        what = f"the base {shown(self._label)} cannot be judged: {message}"
        return check.finding(what, hint, tensor=tensor.name if tensor else None)


def _wrong_blocks(weight: StoredTensor, scale: StoredTensor, block: tuple[int, ...] | None) -> str | None:
    """Why transformers would scale wrong rows or columns, or none; None if the scales are right.

    `Fp8Dequantize` (finegrained_fp8.py) divides the weight evenly by the grid of scales. A last block that
    is smaller than the others breaks that.
    """
    if len(scale.shape) < 2 or len(weight.shape) < 2:  # noqa: PLR2004 - one scale for the whole weight
        return None
    for axis, word in ((-2, "rows"), (-1, "columns")):
        size, grid = weight.shape[axis], scale.shape[axis]
        own = block[axis] if block else 0
        uneven = own > 1 and grid > 1 and grid == -(-size // own) and size % own
        if grid and (size % grid or uneven):
            expected = f"a multiple of the block size {own}" if own > 1 else f"a multiple of {grid} scales"
            return (
                f"its weight {shown(weight.name)} (in {shown(weight.file)}) has {counted(size, word[:-1])}, expected "
                f"{expected}: transformers divides the {size} {word} evenly by the {grid} scales in "
                f"{shown(scale.name)}, and would scale the wrong ones"
            )
    return None


def _kind_of(codes: tuple[StoredTensor, StoredTensor] | None) -> str:
    """The format of a scale and its codes, as far as their dtype tells."""
    return "an FP8 format" if codes and codes[1].dtype in _FLOAT8 else "a format of integer codes"


def _words(dtype: str) -> str:
    """A dtype as torch names it, after safetensors' own word."""
    names = {"BOOL": "bool"} | {f"{kind}{bits}": f"{word}{bits}" for kind, word in (("U", "uint"), ("I", "int"))
                                for bits in (8, 16, 32, 64)}  # fmt: skip
    return names.get(dtype, dtype)
