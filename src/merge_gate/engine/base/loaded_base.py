"""Load a base once, measure it once, and make scratches of it. Nothing here, or after it, writes to the base.

In: a directory, its `ModelClass`, a dtype and a quantisation. Out: `Base`, and from it as many
scratches as there are adapters. Knows nothing of PEFT.

A scratch has its own modules and its own `Parameter` objects over the base's storage, ties kept: it costs
milliseconds and no memory. Whoever is about to write to one of its tensors gives it a private copy first
(adapter_evidence.py).
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from merge_gate.engine.base.missing_shards import refuse_strangers
from merge_gate.engine.base.stored_formats import (
    loaded_dtypes,
    loaded_quantization,
    main_dtype,
    refuse_other_packing,
    refuse_unknown_format,
)
from merge_gate.engine.tensors.buffers import Buffers
from merge_gate.engine.tensors.hollow import Hollow
from merge_gate.engine.tensors.measure import dtype_name, measure
from merge_gate.engine.tensors.quantized import (
    dequantized,
    dequantizing_options,
    elements,
    is_quantized,
    loading_options,
    quantizing,
    scales,
)
from merge_gate.engine.tensors.stream import Weights
from merge_gate.engine.tensors.threads import spread
from merge_gate.errors import Undecidable
from merge_gate.records.measured import BaseFacts, TensorStats
from merge_gate.records.refusals import BaseRaised, BaseShapeClash, Caught, RemoteCodeNeeded
from merge_gate.records.terms import Quantization

if TYPE_CHECKING:
    from merge_gate.engine.base.direct_reads import Reads

_REPORT_ABOVE = re.compile(r"\s*For details look at [^.!]*above report!?")
"""What transformers' errors say of a table in its log, which the reader of a message does not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """The class that a base is loaded as, and the size of its head: adapters of one class and size share a load.

    `instead_of` is the class that the adapter's task type asks for, where its names fit only another (model_class.py).
    """

    class_name: str
    num_labels: int | None = None
    instead_of: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a base is loaded from, and how: `options` are those of `from_pretrained` that every class of it shares."""

    directory: str
    label: str
    revision: str | None
    quantization: Quantization
    device: torch.device
    options: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Base:
    """A loaded base. `tensors` and `stats` are by name, a tied tensor under its first name only.

    `initialised` names tensors that its files do not have, or not in this size. `template` is the scratch that the last
    adapter left as it was, for the next one (template.py). `reads` is what its forward reads past its layers, once
    somebody has asked (unread_layers.py).
    The tensors are in host memory (quantised ones on `device`); `weights` brings them to `device` when they are needed.
    `aliases` are the other names of tied ones.
    Those of `hollow` have values only while they are `filled` (other_dtype.py).
    """

    model: nn.Module
    facts: BaseFacts
    tensors: dict[str, torch.Tensor]
    stats: dict[str, TensorStats]
    source: Source
    initialised: frozenset[str]
    unexpected: frozenset[str] = frozenset()
    template: Any = None
    reads: Reads | None = None
    hollow: Hollow | None = None
    weights: Weights = field(init=False)
    aliases: dict[str, str] = field(init=False)
    _buffers: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.weights = Weights(self.tensors, self.device)
        first = {id(tensor): name for name, tensor in self.tensors.items()}
        named = self.model.named_parameters(remove_duplicate=False)
        self.aliases = {name: first[id(one)] for name, one in named if name not in self.tensors and id(one) in first}

    def first_name(self, name: str) -> str:
        """The name under which a tensor is in `tensors` and `stats`: a tied one has more."""
        return self.aliases.get(name, name)

    @property
    def device(self) -> torch.device:
        return self.source.device

    def buffers(self) -> Buffers:
        """This thread's buffers for merges in blocks."""
        if not hasattr(self._buffers, "own"):
            self._buffers.own = Buffers()
        found: Buffers = self._buffers.own
        return found

    def filled(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """The tensors of these names have values inside of the `with` block."""
        if self.hollow is None:
            return nullcontext()
        return self.hollow.filled(self.tensors[name] for name in names if name in self.tensors)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the base as it is in memory: what one that has no values now is cast from."""
        return tensor if self.hollow is None else self.hollow.source(tensor)

    def was_misread(self) -> bool:
        """Whether somebody has read a tensor that had no values; it has some from now on."""
        if self.hollow is None or not self.hollow.fill_touched():
            return False
        self.template = None
        return True

    def scratch(self, *, private: bool = False) -> nn.Module:
        """A copy with its own modules over the base's storage; with `private`, over copies of the tensors."""
        memo: dict[int, Any] = {}
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = wrap(parameter, private=private)
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = buffer.clone() if private else buffer.detach()
        return copy.deepcopy(self.model, memo)


def wrap(parameter: torch.Tensor, *, private: bool = False) -> torch.Tensor:
    """A new parameter of the same class and attributes over the same storage (a copy of it with `private`)."""
    data = parameter.detach()
    if type(parameter) is nn.Parameter:
        return nn.Parameter(data.clone() if private else data, requires_grad=False)
    wrapped = torch.Tensor._make_subclass(type(parameter), data.clone() if private else data, False)
    wrapped.__dict__.update(parameter.__dict__)
    return wrapped


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """(name, owning module, tensor) of every parameter and persistent buffer; a tied tensor once, by its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        own = list(module._parameters.items()) + [(n, b) for n, b in module._buffers.items() if n not in hidden]
        for name, tensor in own:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield (f"{prefix}.{name}" if prefix else name), module, tensor


def measure_in(module: nn.Module, tensor: torch.Tensor, name: str) -> tuple[TensorStats, ...]:
    """Measure one tensor of a module in its final form: a quantised weight after dequantising, and its scales too."""
    if not is_quantized(tensor):
        return (measure(tensor, name),)
    plain = measure(dequantized(module, tensor), name)
    return (plain, *(measure(scale, f"{name}.{suffix}") for suffix, scale in scales(module, tensor)))


def load_base(
    directory: str,
    *,
    shape: ModelClass,
    label: str,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: Quantization = Quantization.NONE,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Base:
    """Load a base from a directory and measure every parameter and persistent buffer of it.

    Where the dtype asked for is the stored one, transformers memory-maps the weights: no anonymous memory is used.

    Raises:
        Undecidable: the base cannot be loaded, with the library's own reason.
    """
    options: dict[str, Any] = {
        "dtype": "auto" if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": True,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": None if allow_pickle else True,
    }
    options |= loading_options(quantization, dtype, device)
    source = Source(
        directory=directory,
        label=label,
        revision=revision,
        quantization=quantization,
        device=torch.device(device),
        options=options,
    )
    refuse_unknown_format(directory, label)
    model_class = getattr(transformers, shape.class_name)
    try:
        if quantization is Quantization.NONE:
            source = replace(source, options=options | dequantizing_options(_config(model_class, source)))
        with quantizing(quantization):
            model, loading = _from_pretrained(model_class, source, shape)
    except Exception as error:  # every library below has its own exceptions; all mean the same here
        if "trust_remote_code" in str(error) and not isinstance(error, (MemoryError, ImportError)):
            raise Undecidable(RemoteCodeNeeded(base=label)) from error
        raise Undecidable(BaseRaised(base=label, error=caught(error), class_name=shape.class_name)) from error
    refuse_mismatches(loading, label, shape)
    refuse_strangers(model, loading.initialised, label)
    refuse_other_packing(model, source, dtype)
    return measure_base(model, source, loading, known={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What transformers says of a load: names that the files lack, that the model lacks, and that have another size.

    `mismatched` are names, their shapes in the files, and the shapes that the model needs.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = ()

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.mismatched)

    @property
    def initialised(self) -> frozenset[str]:
        return self.missing.union(self.replaced)


def _config(model_class: Any, source: Source) -> Any:
    """The base's configuration as `from_pretrained` of a class reads it."""
    config_class = getattr(model_class, "config_class", None) or transformers.AutoConfig
    options = {name: source.options[name] for name in ("local_files_only", "trust_remote_code")}
    return config_class.from_pretrained(source.directory, **options)


def _from_pretrained(model_class: Any, source: Source, shape: ModelClass) -> tuple[Any, Loading]:
    """The model, and what of its checkpoint does not fit: `refuse_mismatches` says which of them may be.

    A class with a `from_pretrained` of its own takes no pair from the one below it, and refuses what does not fit.
    """
    options = {**source.options, **head(shape)}
    if not loads_as_usual(model_class) and not _owner(model_class).__module__.startswith("transformers.models.auto."):
        return model_class.from_pretrained(source.directory, **options), Loading()
    return load_informed(model_class, source.directory, **options)


def loads_as_usual(model_class: Any) -> bool:
    """Whether a class loads as all of transformers' models do: not by a `from_pretrained` of its own or of an Auto."""
    return _owner(model_class) is transformers.PreTrainedModel


def _owner(model_class: Any) -> Any:
    return next(one for one in model_class.__mro__ if "from_pretrained" in vars(one))


def load_informed(model_class: Any, directory: str | None, **options: Any) -> tuple[Any, Loading]:
    """`from_pretrained`, and what transformers says of it."""
    model, said = model_class.from_pretrained(
        directory, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    mismatched = tuple(sorted(said["mismatched_keys"]))  # a set
    missing, unexpected = frozenset(said["missing_keys"]), frozenset(said["unexpected_keys"])
    return model, Loading(missing=missing, unexpected=unexpected, mismatched=mismatched)


def head(shape: ModelClass) -> dict[str, Any]:
    """What `from_pretrained` is told of a head."""
    return {} if shape.num_labels is None else {"num_labels": shape.num_labels}


def refuse_mismatches(loading: Loading, label: str, shape: ModelClass) -> None:
    """A head may give way to another number of labels; a detector's has one row more, for what is none of them.

    Raises:
        Undecidable: another tensor has another size, so the base is broken.
    """
    for name, stored, expected in loading.mismatched:
        extra = None if shape.num_labels is None else expected[0] - shape.num_labels
        if extra not in {0, 1} or tuple(stored[1:]) != tuple(expected[1:]):
            got, needed = tuple(stored), tuple(expected)
            fact = BaseShapeClash(base=label, class_name=shape.class_name, name=name, got=got, expected=needed)
            raise Undecidable(fact)


Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def place_of(tensor: torch.Tensor) -> Place:
    """Where a tensor's values lie, and how: two tensors of one place are one."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def measure_base(
    model: nn.Module,
    source: Source,
    loading: Loading,
    known: Mapping[Place, TensorStats],
    hollow: Hollow | None = None,
) -> Base:
    """Measure every parameter and persistent buffer, but for those of which another load knows the figures."""
    model.eval()
    model.requires_grad_(requires_grad=False)

    def look(one: tuple[str, nn.Module, torch.Tensor]) -> tuple[TensorStats, ...]:
        name, module, tensor = one
        stats = known.get(place_of(tensor))
        return measure_in(module, tensor, name) if stats is None else (replace(stats, name=name),)

    found = list(named_tensors(model))
    stats = list(spread(look, found))
    facts = BaseFacts(
        model=source.label,
        revision=source.revision,
        dtype=dtype_name(main_dtype(model)),
        quantization=loaded_quantization(model, source.directory),
        dtypes=loaded_dtypes(tensor for _, _, tensor in found),
        parameters=sum(elements(tensor) for _, _, tensor in found),
        nonfinite=tuple(
            replace(one, is_buffer=name.rpartition(".")[2] in module._buffers)
            for (name, module, _), parts in zip(found, stats, strict=True)
            for one in parts
            if not one.finite
        ),
        loaded_as=type(model).__name__,
        replaced=loading.replaced,
    )
    return Base(
        model=model,
        facts=facts,
        tensors={name: tensor for name, _, tensor in found},
        stats={name: parts[0] for (name, _, _), parts in zip(found, stats, strict=True)},
        source=source,
        initialised=loading.initialised,
        unexpected=loading.unexpected,
        hollow=hollow,
    )


def caught(error: BaseException) -> Caught:
    """A library's exception as a fact."""
    kinds = tuple(one.__name__ for one in type(error).__mro__)
    return Caught(kinds=kinds, text=first_line(error), detail=str(error)[:2000])


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, cut to a readable length; for messages.

    With the next one, if it ends with a colon.
    """
    text = _REPORT_ABOVE.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return (" ".join(lines[:count]) or type(error).__name__)[:400]
