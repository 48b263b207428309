"""Which stored tensors make which tensors of a model: transformers' own loader, run on headers and recorded.

In: a base's directory, its model class, and the headers of its weight files. Out: `TensorMap`. Reads no weights, and
knows no PEFT.

transformers loads named tensors of its meta device, which have a shape and a dtype and no data. The names of its
loader that are recorded (transformers/core_model_loading.py) are checked first: a release without them gives no map.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import core_model_loading
from transformers.utils import logging

from merge_gate.engine.tensors.quantized import dequantizing_options
from merge_gate.records.files import StoredTensor

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""safetensors' names of dtypes, and torch's."""

RENAMED = ""
"""The conversion of a tensor that keeps its values: it has another name at most."""


class NoMapError(Exception):
    """The headers or this release of transformers do not allow a map; the load itself has to account for the base."""


Recipe = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""transformers' own conversion: the tensors of the model, from the stored ones. Not for two threads at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Stored tensors that make one or several tensors of the model together.

    `sources` are in the order in which transformers takes them: all that match one pattern before the next.
    `conversion` names transformers' operations on them (RENAMED: none). `failed`: on headers alone, these operations
    gave no result, because they need values or some of the tensors are missing. Then there is no `recipe`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    conversion: str = RENAMED
    failed: bool = False
    recipe: Recipe | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMap:
    """What becomes of each stored tensor, and where each tensor of the model comes from."""

    stored: Mapping[str, StoredTensor]
    """The stored tensors by name."""
    groups: tuple[TensorGroup, ...]
    """Stored tensors that are loaded, with what they make."""
    unloaded: Mapping[str, str]
    """Each stored tensor that is not loaded, and the name that the model would have for it."""
    unexpected: frozenset[str]
    """Unloaded tensors that transformers does not expect to find."""
    missing: frozenset[str]
    """Tensors of the model without a source. Tied tensors have that of their partner."""
    mismatched: tuple[tuple[str, Sequence[int], Sequence[int]], ...]
    """Tensors of the model whose stored shape is another: the name, the stored shape, and the model's."""
    model: Any
    """The model on the meta device."""
    sources: Mapping[str, tuple[str, ...]] = field(init=False)
    """Each tensor of the model that is loaded, and the stored tensors that make it."""

    def __post_init__(self) -> None:
        made = {target: group.sources for group in self.groups for target in group.targets}
        object.__setattr__(self, "sources", made)

    def targets(self) -> dict[str, tuple[str, ...]]:
        """Each stored tensor that is loaded, and the tensors of the model that it is part of."""
        return {source: group.targets for group in self.groups for source in group.sources}


def tensor_map(
    transformers_class: Any,
    directory: str,
    stored: Sequence[StoredTensor],
    *,
    dtype: Any = "auto",
    is_plain: bool = False,
    **config_options: Any,
) -> TensorMap:
    """Record what transformers' loader makes of these headers.

    Of the directory, only config.json is read. If two headers have one name, the last counts, as in transformers. The
    options are those that `from_pretrained` passes to the config, such as `num_labels`. `is_plain`: the headers are
    those of a plain model, whatever quantization config.json declares.

    Raises:
        NoMapError: there are no headers (pickled weights), transformers cannot load them, or has other internals.
    """
    if not stored:
        raise NoMapError("the headers of its weight files are not known")
    by_name = {tensor.name: tensor for tensor in stored}
    try:
        config = transformers_class.config_class.from_pretrained(directory, local_files_only=True, **config_options)
        if is_plain:
            _forget_quantization(config)
        given = {name: _on_meta(tensor) for name, tensor in by_name.items()}
        with _quiet(), traced() as trace:
            model, info = transformers_class.from_pretrained(
                None,
                config=config,
                state_dict=given,
                dtype=config.dtype if dtype == "auto" else dtype,
                **dequantizing_options(config),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # libraries have their own exceptions; the load will say what is wrong
        raise NoMapError(f"{type(error).__name__}: {error}"[:400]) from error
    groups = tuple(trace.groups())
    loaded = {source for group in groups for source in group.sources}
    unloaded = {name: trace.renamed.get(name, name) for name in by_name if name not in loaded}
    made = {target for group in groups for target in group.targets}
    return TensorMap(
        stored=by_name,
        groups=groups,
        unloaded=unloaded,
        unexpected=frozenset(name for name, renamed in unloaded.items() if renamed in info["unexpected_keys"]),
        missing=frozenset(info["missing_keys"]) - made,
        mismatched=tuple(sorted(info["mismatched_keys"])),  # sorted, because it is a set
        model=model,
    )


def _forget_quantization(config: Any) -> None:
    """Remove the keys that transformers/quantizers/auto.py reads."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _on_meta(stored: StoredTensor) -> torch.Tensor:
    dtype = getattr(torch, DTYPES.get(stored.dtype, ""), None)
    if dtype is None:
        raise NoMapError(f"{stored.name}: torch has no dtype {stored.dtype}")
    return torch.empty(stored.shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's report, which only helps users who load the base."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# --- the recording ---------------------------------------------------------------------------------------------------


Step = tuple[str, str, str, torch.dtype]
"""The arguments of `add_tensor` for a stored tensor: the tensor of the model, the stored one, and the pattern that
matched; and the dtype that the stored tensor is cast to before the conversion."""


class LoaderTrace:
    """What the loader did: `renamed` maps stored names to the model's names, and `groups` yields its conversions."""

    def __init__(self) -> None:
        self.renamed: dict[str, str] = {}
        self._steps: dict[int, list[Step]] = defaultdict(list)
        self._options: dict[int, Mapping[str, Any]] = {}
        self._mappings: dict[int, Any] = {}  # keeps each alive, so that no id is used twice
        self._targets: dict[int, tuple[str, ...]] = {}
        self._failed: set[int] = set()

    def collect(self, mapping: Any, target: str, source: str, pattern: str, dtype: torch.dtype) -> None:
        self._mappings[id(mapping)] = mapping
        self._steps[id(mapping)].append((target, source, pattern, dtype))

    def convert(self, mapping: Any, realized: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._targets[id(mapping)] = tuple(realized)
        self._options[id(mapping)] = {name: value for name, value in options.items() if name != "loading_info"}

    def fail(self, mapping: Any) -> str:
        """Note that the conversion gave nothing; the name that its first tensor would have."""
        self._failed.add(id(mapping))
        return self._steps[id(mapping)][0][0]

    def groups(self) -> Iterator[TensorGroup]:
        for key, steps in self._steps.items():
            mapping, name, is_failed = self._mappings[key], steps[0][0], key in self._failed
            patterns = list(dict.fromkeys(pattern for _, _, pattern, _ in steps))
            in_order = sorted(steps, key=lambda step: patterns.index(step[2]))
            recipe = None
            if key in self._options and not is_failed:
                recipe = functools.partial(_converted, mapping, name, tuple(steps), self._options[key])
            yield TensorGroup(
                sources=tuple(source for _, source, _, _ in in_order),
                targets=self._targets.get(key) or (name,),
                conversion=", ".join(type(operation).__name__ for operation in getattr(mapping, "operations", ())),
                failed=is_failed,
                recipe=recipe,
            )


def _converted(
    mapping: Any, name: str, steps: Sequence[Step], options: Mapping[str, Any], stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Repeat a conversion. `mapping` is transformers' WeightRenaming or WeightConverter, which this recipe alone uses.

    `options` are the other arguments of `convert`.
    """
    for target, source, pattern, dtype in steps:
        mapping.add_tensor(target, source, pattern, stored[source].to(dtype))
    made = mapping.convert(name, **options)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@contextlib.contextmanager
def traced() -> Iterator[LoaderTrace]:
    """Record transformers' loader for as long as the `with` block lasts.

    Raises:
        NoMapError: this release of transformers has other internals.
    """
    loader, trace = core_model_loading, LoaderTrace()
    transform = getattr(loader, "WeightTransform", None)
    kinds = [getattr(loader, name, None) for name in ("WeightRenaming", "WeightConverter")]
    names = (transform is not None and hasattr(transform, "add_tensor"), hasattr(loader, "rename_source_key"))
    if not all(names) or any(kind is None or "convert" not in vars(kind) for kind in kinds):
        raise NoMapError(f"transformers {transformers.__version__} has another loader")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(loader, "rename_source_key", lambda own: _renaming(own, trace)))
        stack.enter_context(_replaced(transform, "add_tensor", lambda own: _adding(own, trace)))
        for kind in kinds:
            stack.enter_context(_replaced(kind, "convert", lambda own: _converting(own, trace)))
        yield trace


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, wrap(own))
    try:
        yield
    finally:
        setattr(owner, name, own)


def _renaming(own: Any, trace: LoaderTrace) -> Any:
    def rename(source_key: str, *args: Any, **options: Any) -> Any:
        renamed = own(source_key, *args, **options)
        trace.renamed[source_key] = renamed[0]
        return renamed

    return rename


def _adding(own: Any, trace: LoaderTrace) -> Any:
    def add(self: Any, target_key: str, source_key: str, source_pattern: str, future: Any) -> Any:
        held = future() if callable(future) else future.result()
        trace.collect(self, target_key, source_key, source_pattern, held.dtype)
        return own(self, target_key, source_key, source_pattern, future)

    return add


def _converting(own: Any, trace: LoaderTrace) -> Any:
    def convert(self: Any, layer_name: str, **options: Any) -> Any:
        info = options.get("loading_info")
        try:
            realized = own(self, layer_name, **options)
        except core_model_loading.SkipParameters:
            if info is None:
                raise
            # Tensors are missing, or a quantizer needs values (a state in JSON, an `.item()`), which headers lack.
            name = trace.fail(self)
            info.conversion_errors.pop(layer_name, None)
            realized = {name: _as_it_is(options["model"], name)}
        trace.convert(self, realized, options)
        return realized

    return convert


def _as_it_is(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), last)
    return tensor
