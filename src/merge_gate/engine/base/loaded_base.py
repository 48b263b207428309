"""Loads and measures a base once, and makes scratch copies of it.

In: a directory, its `ModelClass`, a dtype, and a quantization. Out: `Base`, and a scratch copy for each adapter. This
module imports no PEFT, and no code writes to the base.
"""

# A scratch copy has its own modules and its own `Parameter` objects over the base's storage, and keeps ties. It takes
# milliseconds and no memory. Code that writes to a tensor of it must give that tensor a private copy first
# (private_copies.py).

from __future__ import annotations

import copy
import math
import re
import statistics
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from merge_gate.engine.base.stored_spans import SharedReads
from merge_gate.engine.tensors.lazy_tensors import LazyTensors
from merge_gate.engine.tensors.measure import distance, dtype_name, joined, measure, row_norms
from merge_gate.engine.tensors.module_copies import tensors_of
from merge_gate.engine.tensors.placement import WeightsOnDevice
from merge_gate.engine.tensors.quantized import (
    QUANTIZED_AS,
    dequantized,
    dequantizing_options,
    elements,
    is_quantized,
    loaded_dtypes,
    loading_options,
    main_dtype,
    packings,
    quantizing,
    scales,
    with_plain_layers,
    with_scales,
)
from merge_gate.engine.tensors.threads import Buffers, spread
from merge_gate.engine.tensors.watch import Memory
from merge_gate.records.files import FileSpan
from merge_gate.records.measured import BaseFacts, TensorStats
from merge_gate.records.refusals import CannotJudge, Caught
from merge_gate.records.terms import Quantization

if TYPE_CHECKING:
    from merge_gate.engine.base.direct_reads import DirectReads
    from merge_gate.engine.base.tensor_map import TensorMap

_OF_ONE_RUN = re.compile(r"\s*For details look at [^.!]*above report!?| at 0x[0-9a-f]+")
"""transformers' errors refer to a table in its log, which the reader of a message does not see, and to addresses."""

ROWS_ELEMENTS = 1 << 22
"""A larger tensor that no adapter changes passes by so many values at a time."""

MOST_TYPICAL = 9
"""So many matrices are read for the typical RMS, because a streamed base may have to send them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """The class that a base is loaded as, and the size of its head. Adapters of one class and size share a load.

    `instead_of` is the class for the adapter's task type, if the names in its file fit only another class
    (model_class.py).
    """

    class_name: str
    num_labels: int | None = None
    instead_of: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """Its name in records of bases: `BertForTokenClassification/7`."""
        return self.class_name if self.num_labels is None else f"{self.class_name}/{self.num_labels}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a base is loaded from, and how.

    `dtype` is the one that is asked for, or `auto`. `dequantizing`: how its packed weights become plain while it is
    loaded. `dequantized`: they are plain again after it was loaded.
    """

    directory: str
    label: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: Quantization = Quantization.NONE
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    dequantizing: Mapping[str, Any] = field(default_factory=dict)
    dequantized: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that its classes share."""
        return {
            "dtype": "auto" if self.dtype == "auto" else getattr(torch, self.dtype),
            "local_files_only": True,
            "trust_remote_code": self.trust_remote_code,
            "use_safetensors": None if self.allow_pickle else True,
            **loading_options(self.quantization, self.dtype, self.device),
            **self.dequantizing,
        }


@dataclass(slots=True, kw_only=True)
class Base:
    """A loaded base.

    `tensors` and `stats` are by name, a tied tensor under its first name only. `aliases` maps the other names of tied
    tensors to the first. `newly_initialized` names tensors that the files lack, or have in another size. `template` is
    a scratch copy that the last adapter left unchanged, for the next adapter (inject.py), and `pattern` one that is
    in use, to be copied for another adapter of the same pass. `direct_reads` is what the forward reads without calling
    layers, once it is traced (probes.py). `ran` is what it returned for made-up inputs (engine/forward/run.py).
    `map` is known if its headers allow one, and `named` is the class that users load, with its own map
    (served_class.py). The tensors are in host memory, quantized ones on `device`.

    Tensors in `lazy` have values only while they are `filled` from `feed` (skeleton.py), and `stats` lacks them until
    their values have passed by: use `figures`, and read `facts` after `complete_facts`. `alone` names tensors that come
    from one stored tensor each, and that the load has not changed.
    """

    model: nn.Module
    facts: BaseFacts
    tensors: dict[str, torch.Tensor]
    stats: dict[str, TensorStats]
    source: Source
    newly_initialized: frozenset[str]
    unexpected: frozenset[str] = frozenset()
    template: Any = None
    pattern: Any = None
    direct_reads: DirectReads | None = None
    ran: dict[object, Any] = field(default_factory=dict)
    map: TensorMap | None = None
    named: tuple[str, bool, TensorMap | None] | None = None
    lazy: LazyTensors | None = None
    feed: SharedReads | None = None
    alone: Mapping[str, tuple[FileSpan, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(init=False)
    weights: WeightsOnDevice = field(default_factory=WeightsOnDevice)
    _buffers: threading.local = field(default_factory=threading.local)
    _row_norms: dict[str, torch.Tensor] = field(default_factory=dict)
    _typical_rms: float | None = None
    _memory: Memory | None = None

    def __post_init__(self) -> None:
        first_names = {id(tensor): name for name, tensor in self.tensors.items()}
        self.aliases = {
            name: first_names[id(parameter)]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if name not in self.tensors and id(parameter) in first_names
        }

    def first_name(self, name: str) -> str:
        """The name of a tensor in `tensors` and `stats`. A tied tensor has more names."""
        return self.aliases.get(name, name)

    @property
    def device(self) -> torch.device:
        return torch.device(self.source.device)

    @property
    def memory(self) -> Memory:
        """The memory of all parameters, scales of packed weights, and buffers, which nothing may write to."""
        if self._memory is None:
            own = [
                (name, part)
                for name, module, tensor in named_tensors(self.model)
                for part in with_scales(module, tensor)
            ]
            self._memory = Memory((*own, *self.model.named_buffers()))
        return self._memory

    def on_device(self, name: str) -> torch.Tensor:
        """A weight on `device`, which computes."""
        return self.weights.take(name, self.tensors[name], self.device)

    def buffers(self) -> Buffers:
        """This thread's buffers for merges in blocks."""
        if not hasattr(self._buffers, "own"):
            self._buffers.own = Buffers()
        buffers: Buffers = self._buffers.own
        return buffers

    def filled(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Give these tensors values for the `with` block."""
        if self.lazy is None:
            return nullcontext()
        return self.lazy.filled(self.tensors[name] for name in names if name in self.tensors)

    def figures(self, name: str) -> TensorStats:
        """The figures of a tensor by its first name. It is measured now if it was not measured before."""
        if name not in self.stats:
            self.stats[name] = joined([(start, measure(rows, name)) for start, rows in self.rows_of(name)])
        return self.stats[name]

    def rows_of(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a tensor by its first name, in order, with the number of the first one.

        They come `ROWS_ELEMENTS` values at a time if they are read for this, into memory that the next ones take.
        """
        tensor = self.tensors[name]
        read = self.lazy.rows_of(tensor) if self.lazy is not None and tensor.numel() > ROWS_ELEMENTS else None
        if read is None:
            with self.filled([name]):
                yield 0, tensor
            return
        count = max(1, ROWS_ELEMENTS * len(tensor) // tensor.numel())
        for start in range(0, len(tensor), count):
            shape = (min(count, len(tensor) - start), *tensor.shape[1:])
            rows = self.buffers().of_shape("rows", shape, tensor.dtype, tensor.device)
            read(rows, start)
            yield start, rows

    def row_norms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The norms of the rows of a tensor, by its first name. They are measured once; `weight` has its values."""
        if name not in self._row_norms:
            self._row_norms[name] = row_norms(weight)
        return self._row_norms[name]

    def typical_rms(self) -> float:
        """The median RMS of the files' matrices and kernels that are not zero; 0.0 if there are none.

        The largest value of each is known. Only the matrices in the middle of that order are read.
        """
        if self._typical_rms is None:
            names = [name for name, _ in self.model.named_parameters() if name not in self.newly_initialized]
            ordered = sorted(map(self.figures, names), key=lambda stats: stats.max_abs)
            matrices = [
                stats for stats in ordered if stats.finite and stats.max_abs and sum(n > 1 for n in stats.shape) > 1
            ]
            middle = matrices[max(0, (len(matrices) - MOST_TYPICAL) // 2) :][:MOST_TYPICAL]
            self._typical_rms = statistics.median([self._rms(stats.name) for stats in middle] or [0.0])
        return self._typical_rms

    def _rms(self, name: str) -> float:
        tensor, module = self.tensors[name], self.model.get_submodule(name.rpartition(".")[0])
        with self.filled([name]):
            values = dequantized(module, tensor) if is_quantized(tensor) else tensor
            return distance(values) / math.sqrt(values.numel())

    def unmeasured(self) -> list[str]:
        """The tensors that have no figures yet."""
        return [name for name in self.tensors if name not in self.stats]

    def complete_facts(self) -> None:
        """Enter into `facts` what was measured after the load."""
        known = {stats.name for stats in self.facts.nonfinite}
        others = [
            replace(stats, is_buffer=_is_buffer(self.model, name))
            for name, stats in self.stats.items()
            if not stats.finite and name not in known
        ]
        if others:
            order = {name: number for number, name in enumerate(self.tensors)}
            nonfinite = sorted((*self.facts.nonfinite, *others), key=lambda stats: order.get(stats.name, len(order)))
            self.facts = replace(self.facts, nonfinite=tuple(nonfinite))

    def was_misread(self) -> bool:
        """Whether some code has read a tensor that had no values. The tensor has values from now on."""
        if self.lazy is None or not self.lazy.fill_touched():
            return False
        self.template = self.pattern = None
        self.ran.clear()
        return True

    def scratch(self, *, private: bool = False) -> nn.Module:
        """A scratch copy: own modules over the base's storage. With `private`, over copies of the tensors."""
        return copy.deepcopy(self.model, tensors_of(self.model, private=private))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """(name, module, tensor) of every parameter and persistent buffer. A tied tensor comes once, by its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        non_persistent = module._non_persistent_buffers_set
        buffers = [(name, buffer) for name, buffer in module._buffers.items() if name not in non_persistent]
        for name, tensor in [*module._parameters.items(), *buffers]:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield (f"{prefix}.{name}" if prefix else name), module, tensor


def measure_in(module: nn.Module, tensor: torch.Tensor, name: str) -> tuple[TensorStats, ...]:
    """Measure one tensor of a module. A quantized weight is dequantized first, and its scales are measured too."""
    if not is_quantized(tensor):
        return (measure(tensor, name),)
    plain = measure(dequantized(module, tensor), name)
    return (plain, *(measure(scale, f"{name}.{suffix}") for suffix, scale in scales(module, tensor)))


def load_base(source: Source, model_class: ModelClass) -> Base:
    """Load a base by `from_pretrained`, and measure every parameter and persistent buffer.

    Raises:
        CannotJudge: the base cannot be loaded, with the library's own reason.
    """
    label = source.label
    transformers_class = getattr(transformers, model_class.class_name)
    try:
        config = _config(transformers_class, source)
        method = declared(config)
        refuse_unknown_format(method, label)
        if source.quantization is Quantization.NONE:
            source = replace(source, dequantizing=dequantizing_options(config))
        with quantizing(source.quantization):
            model, loading = _from_pretrained(transformers_class, source, model_class)
    except CannotJudge:
        raise
    except Exception as error:  # each library has its own exceptions, and all mean that the base cannot be loaded
        if "trust_remote_code" in str(error) and not isinstance(error, (MemoryError, ImportError)):
            raise CannotJudge("remote_code_needed", base=label) from error
        raise CannotJudge("base_raised", base=label, error=caught(error), class_name=model_class.class_name) from error
    refuse_misfits(model, loading, label, model_class)
    return measure_base(model, source, loading, quantization=loaded_quantization(model, method))


def dequantized_base(packed: Base, dtype: str) -> Base:
    """The base with plain weights of this dtype, which have the packed values. `packed` cannot be used any more."""
    source = replace(packed.source, dequantized=True)
    loading = Loading(missing=packed.newly_initialized, unexpected=packed.unexpected)
    model = with_plain_layers(packed.model, getattr(torch, dtype))
    base = measure_base(model, source, loading, quantization=packed.facts.quantization)
    base.facts = replace(base.facts, replaced=packed.facts.replaced)
    return base


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The names that do not fit in a load, as transformers reports them.

    `missing` are not in the files, and `unexpected` are not in the model. `mismatched` has a name, the shape in the
    files, and the shape that the model needs.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = ()

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.mismatched)

    @property
    def newly_initialized(self) -> frozenset[str]:
        return self.missing.union(self.replaced)


def _config(transformers_class: Any, source: Source) -> Any:
    """The base's configuration as `from_pretrained` of a class reads it."""
    config_class = getattr(transformers_class, "config_class", None) or transformers.AutoConfig
    remote = source.trust_remote_code
    return config_class.from_pretrained(source.directory, local_files_only=True, trust_remote_code=remote)


def _from_pretrained(transformers_class: Any, source: Source, model_class: ModelClass) -> tuple[Any, Loading]:
    """The model, and the names that do not fit, which `refuse_misfits` judges.

    A class with a `from_pretrained` of its own may return no loading info, and refuses by itself what does not fit.
    """
    options = {**source.options, **head_options(model_class)}
    if not loads_as_usual(transformers_class) and not _owner(transformers_class).__module__.startswith(
        "transformers.models.auto."
    ):
        return transformers_class.from_pretrained(source.directory, **options), Loading()
    return load_with_info(transformers_class, source.directory, **options)


def loads_as_usual(transformers_class: Any) -> bool:
    """Whether a class inherits `from_pretrained` from all models, instead of its own or an Auto class's."""
    return _owner(transformers_class) is transformers.PreTrainedModel


def _owner(transformers_class: Any) -> Any:
    """The class that defines `from_pretrained` for this class."""
    return next(parent for parent in transformers_class.__mro__ if "from_pretrained" in vars(parent))


def load_with_info(transformers_class: Any, directory: str | None, **options: Any) -> tuple[Any, Loading]:
    """`from_pretrained`, and the names that do not fit."""
    model, info = transformers_class.from_pretrained(
        directory, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    mismatched = tuple(sorted(info["mismatched_keys"]))  # sorted, because it is a set
    missing, unexpected = frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"])
    return model, Loading(missing=missing, unexpected=unexpected, mismatched=mismatched)


def head_options(model_class: ModelClass) -> dict[str, Any]:
    """The argument of `from_pretrained` for the size of a head."""
    return {} if model_class.num_labels is None else {"num_labels": model_class.num_labels}


def refuse_misfits(model: Any, loading: Loading, label: str, model_class: ModelClass) -> None:
    """Refuse what transformers accepts: it replaces tensors of another size, and initializes missing ones.

    Raises:
        CannotJudge: a tensor that is no head for another number of labels has another size, the files have no tensor
            of the class, or an adapter is in the base's directory.
    """
    for name, stored, expected in loading.mismatched:
        extra = None if model_class.num_labels is None else expected[0] - model_class.num_labels
        # A detector's head has one row more, for "no object".
        if extra not in {0, 1} or tuple(stored[1:]) != tuple(expected[1:]):
            raise CannotJudge(
                "base_shape_clash",
                base=label,
                class_name=model_class.class_name,
                name=name,
                got=tuple(stored),
                expected=tuple(expected),
            )
    refuse_foreign_weights(model, loading.newly_initialized, label)


def refuse_foreign_weights(model: Any, missing: AbstractSet[str], label: str) -> None:
    """Refuse a model without tensors of its own, and one with an adapter, which transformers loads too.

    Raises:
        CannotJudge: the files have no tensor of the class, or an adapter is in the base's directory.
    """
    if missing and {name for name, _ in model.named_parameters()} <= missing:
        raise CannotJudge("base_of_another_class", base=label, class_name=type(model).__name__)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CannotJudge("adapter_next_to_base", base=label)


Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def place_of(tensor: torch.Tensor) -> Place:
    """The address and the layout of a tensor's values. Two tensors with the same place are the same tensor."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def measure_base(
    model: nn.Module,
    source: Source,
    loading: Loading,
    *,
    quantization: str = str(Quantization.NONE),
    known: Mapping[Place, TensorStats] = MappingProxyType({}),
    lazy: LazyTensors | None = None,
    feed: SharedReads | None = None,
) -> Base:
    """Measure every parameter and persistent buffer that has values.

    Args:
        model: the loaded model.
        source: where it comes from.
        loading: the names that did not fit.
        quantization: how the base is stored, or how its parameters are packed now.
        known: the figures that another class of the base has, by place.
        lazy: the tensors of the model without values. They are measured when they are filled.
        feed: where their values come from.

    Raises:
        CannotJudge: it was loaded as something else than the config asks for.
    """
    if not source.dequantized:
        refuse_other_packing(model, source, quantization)
    model.eval()
    model.requires_grad_(requires_grad=False)

    def measured(item: tuple[str, nn.Module, torch.Tensor]) -> tuple[TensorStats, ...]:
        name, module, tensor = item
        stats = known.get(place_of(tensor))
        if stats is None and lazy is not None and lazy.holds(tensor):
            return ()  # it has no values yet
        return measure_in(module, tensor, name) if stats is None else (replace(stats, name=name),)

    items = list(named_tensors(model))
    stats = list(spread(measured, items))  # for each item, the tensor and then its scales
    facts = BaseFacts(
        model=source.label,
        revision=source.revision,
        dtype=dtype_name(main_dtype(model)),
        quantization=quantization,
        dtypes=loaded_dtypes(tensor for _, _, tensor in items),
        parameters=sum(elements(tensor) for _, _, tensor in items),
        nonfinite=tuple(
            replace(part, is_buffer=_is_buffer(model, name))
            for (name, _, _), parts in zip(items, stats, strict=True)
            for part in parts
            if not part.finite
        ),
        loaded_as=type(model).__name__,
        replaced=loading.replaced,
    )
    return Base(
        model=model,
        facts=facts,
        tensors={name: tensor for name, _, tensor in items},
        stats={name: parts[0] for (name, _, _), parts in zip(items, stats, strict=True) if parts},
        source=source,
        newly_initialized=loading.newly_initialized,
        unexpected=loading.unexpected,
        lazy=lazy,
        feed=feed,
    )


def _is_buffer(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(path)._buffers


def caught(error: BaseException) -> Caught:
    """The record of a library's exception."""
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    return Caught(kinds=kinds, text=first_line(error), detail=str(error)[:2000])


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty, cut to a readable length for messages.

    If it ends with a colon, the next line follows it.
    """
    text = _OF_ONE_RUN.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return (" ".join(lines[:count]) or type(error).__name__)[:400]


# --- formats -------------------------------------------------------------------------------------------------------


def declared(config: Any) -> str | None:
    """The quantization that a configuration declares, in the report's words; None if it declares none."""
    given = getattr(config, "quantization_config", None)
    if not isinstance(given, dict):
        return None
    method = given.get("quant_method")
    if method == "bitsandbytes" or given.get("load_in_4bit") or given.get("load_in_8bit"):  # as transformers reads it
        return str(Quantization.BNB_4BIT if given.get("load_in_4bit") else Quantization.BNB_8BIT)
    return str(getattr(method, "value", method))[:40] if method else ""


def refuse_unknown_format(method: str | None, label: str) -> None:
    """Raise `CannotJudge` if this release of transformers cannot load a quantization that config.json declares."""
    if not method or method in AUTO_QUANTIZATION_CONFIG_MAPPING or method in set(QUANTIZED_AS.values()):
        return
    raise CannotJudge("quantization_unknown", base=label, method=method, transformers=transformers.__version__)


def loaded_quantization(model: Any, method: str | None) -> str:
    """`none` for a plain base; else the packing of its parameters, or the declared method that they were stored in."""
    if packed := packings(model):
        return ", ".join(sorted(packed))
    return method if method and method not in set(QUANTIZED_AS.values()) else str(Quantization.NONE)


def refuse_other_packing(model: Any, source: Source, quantization: str) -> None:
    """Raise `CannotJudge` if a base was loaded as something else than the config asks for."""
    asked, dtype = source.quantization, dtype_name(main_dtype(model))
    if asked is not Quantization.NONE:
        is_as_asked = quantization == asked
    elif source.dtype in ("auto", dtype):
        is_as_asked = True
    else:  # a class may keep some parameters in float32
        dtypes = {dtype_name(parameter.dtype) for parameter in model.parameters()}
        is_as_asked = quantization == Quantization.NONE and source.dtype in dtypes
    if not is_as_asked:
        raise CannotJudge(
            "loaded_otherwise",
            base=source.label,
            class_name=type(model).__name__,
            quantization=quantization,
            asked_quantization=asked,
            dtype=dtype,
            asked_dtype=source.dtype,
        )
