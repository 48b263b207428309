"""Load a base once, measure it once, and make scratches of it. Nothing here, or after it, writes to the base.

In: a directory, a dtype, a quantisation and what the adapter says of its task. Out: `Base`, and from it as many
scratches as there are adapters. Knows nothing of PEFT.

A scratch has its own modules and its own `Parameter` objects over the base's storage, ties kept: it costs
milliseconds and no memory. Whoever is about to write to one of its tensors gives it a private copy first (merge.py).
"""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from merge_gate.engine.lowrank import Scratch, extent
from merge_gate.engine.measure import dtype_name, measure
from merge_gate.engine.quantized import dequantized, is_quantized, scales
from merge_gate.engine.stream import Weights
from merge_gate.engine.threads import spread
from merge_gate.errors import EngineError
from merge_gate.records import AdapterFiles, BaseFacts, Quantization, TensorStats

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the Auto class that its `AutoPeftModel…` classes pair with them (peft/auto.py)."""

ADAPTER_PREFIX = "base_model.model."
"""What PEFT puts before the base's names in an adapter's file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What has to be fixed before the base's class can build the model: two adapters of one shape share a load."""

    class_name: str
    num_labels: int | None = None


@dataclass(slots=True, kw_only=True)
class Base:
    """A loaded base. `tensors` and `stats` are by name, a tied tensor under its first name only.

    The tensors are in host memory (quantised ones on `device`); `weights` brings them to `device` when they are needed.
    """

    model: nn.Module
    facts: BaseFacts
    tensors: dict[str, torch.Tensor]
    stats: dict[str, TensorStats]
    device: torch.device
    quantized: bool = False
    extra: dict[str, tuple[TensorStats, ...]] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    weights: Weights = field(init=False)
    _buffers: threading.local = field(default_factory=threading.local)
    _norms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = Weights(self.tensors, self.device)

    def buffers(self) -> Scratch:
        """This thread's buffers for the fast way."""
        if not hasattr(self._buffers, "scratch"):
            self._buffers.scratch = Scratch()
        found: Scratch = self._buffers.scratch
        return found

    def norm(self, name: str) -> float:
        """Frobenius norm of a plain tensor of the base, measured when it is first asked for."""
        if name not in self._norms:
            total = extent(self.tensors[name], scratch=self.buffers(), sum_sq=True).sum_sq
            self._norms[name] = math.sqrt(total or 0.0)
        return self._norms[name]

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


def owners(model: nn.Module) -> dict[int, tuple[tuple[str, nn.Module], ...]]:
    """Id of a parameter → every (module name, module) that holds it: more than one for tied weights."""
    held: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                held.setdefault(id(tensor), []).append((prefix, module))
    return {key: tuple(value) for key, value in held.items()}


def measure_in(module: nn.Module, tensor: torch.Tensor, name: str) -> tuple[TensorStats, ...]:
    """Measure one tensor of a module in its final form: a quantised weight after dequantising, and its scales too."""
    if not is_quantized(tensor):
        return (measure(tensor, name),)
    plain = measure(dequantized(module, tensor), name)
    return (plain, *(measure(scale, f"{name}.{suffix}") for suffix, scale in scales(module, tensor)))


def load_base(
    directory: str,
    *,
    shape: Shape,
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
        EngineError: the base cannot be loaded, in a sentence with the library's own reason.
    """
    model_class = _class_named(shape.class_name)
    target = torch.device(device)
    options: dict[str, Any] = {
        "dtype": "auto" if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": True,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": None if allow_pickle else True,
    }
    if shape.num_labels is not None:
        options["num_labels"] = shape.num_labels
    if quantization is not Quantization.NONE:
        options["quantization_config"] = _bnb_config(quantization, dtype)
        options["device_map"] = {"": str(target)}
    try:
        model = model_class.from_pretrained(directory, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"base {label}: out of memory while loading it",
            hint="use a machine with more memory, or a smaller dtype",
        ) from error
    except ImportError as error:
        raise EngineError(
            f"base {label} needs a package that is not installed: {first_line(error)}",
            hint="install the package that the message names in the environment that runs the gate",
        ) from error
    except Exception as error:  # every library below has its own exceptions; all mean the same here
        raise EngineError(
            f"base {label} cannot be loaded as {shape.class_name}: {type(error).__name__}: {first_line(error)}",
            hint="check that the directory holds a complete model that transformers can load",
        ) from error
    model.eval()
    model.requires_grad_(requires_grad=False)
    return _measured(model, label=label, revision=revision, quantization=quantization, device=target)


def _measured(
    model: nn.Module, *, label: str, revision: str | None, quantization: Quantization, device: torch.device
) -> Base:
    tensors: dict[str, torch.Tensor] = {}
    stats: dict[str, TensorStats] = {}
    extra: dict[str, tuple[TensorStats, ...]] = {}
    found = list(named_tensors(model))
    for (name, _, tensor), measured in zip(
        found, spread(lambda one: measure_in(one[1], one[2], one[0]), found), strict=True
    ):
        tensors[name] = tensor
        stats[name], *rest = measured
        if rest:
            extra[name] = tuple(rest)
    everything = [*stats.values(), *(one for more in extra.values() for one in more)]
    facts = BaseFacts(
        model=label,
        revision=revision,
        dtype=dtype_name(getattr(model, "dtype", torch.float32)),
        quantization=quantization,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        nonfinite=tuple(one for one in everything if not one.finite),
    )
    quantized = any(is_quantized(tensor) for tensor in tensors.values())
    return Base(model=model, facts=facts, tensors=tensors, stats=stats, device=device, quantized=quantized, extra=extra)


def shape_for(directory: str, files: AdapterFiles, *, trust_remote_code: bool = False) -> Shape:
    """Choose the class a PEFT user would load the base with, and the size of a head that only the file knows.

    1. The adapter's task type names the Auto class. 2. Else its `auto_mapping` names a class of transformers. 3. Else
    the base's own architecture. A class that does not know the base's configuration gives way to the architecture.

    Raises:
        EngineError: the base's config.json cannot be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError and more, by the kind of damage
        raise EngineError(
            f"the base's config.json cannot be read: {type(error).__name__}: {first_line(error)}",
            hint="the base must be a directory saved by save_pretrained, of a model type that transformers knows",
        ) from error
    class_name = _class_for(config, files, trust_remote_code=trust_remote_code)
    return Shape(class_name=class_name, num_labels=_num_labels(config, class_name, files))


def _class_for(config: Any, files: AdapterFiles, *, trust_remote_code: bool) -> str:
    architecture = next((name for name in config.architectures or () if hasattr(transformers, name)), "AutoModel")
    wanted = TASK_CLASSES.get(files.task_type or "")
    if wanted is not None:
        known = type(config) in _class_named(wanted)._model_mapping
        remote = trust_remote_code and wanted in (getattr(config, "auto_map", None) or {})
        return wanted if known or remote else architecture
    mapping = json.loads(files.config_json or "{}").get("auto_mapping") or {}
    mapped = mapping.get("base_model_class")
    if isinstance(mapped, str) and _is_model_class(mapped):
        return mapped
    if architecture == "AutoModel" and trust_remote_code:
        remote_map = getattr(config, "auto_map", None) or {}
        return next((name for name in remote_map if name.startswith("AutoModel")), architecture)
    return architecture


def _is_model_class(name: str) -> bool:
    found = getattr(transformers, name, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _class_named(name: str) -> Any:
    return getattr(transformers, name)


def _num_labels(config: Any, class_name: str, files: AdapterFiles) -> int | None:
    """Rows of a classification head as the adapter's file has it, where they differ from the base's own count."""
    if "Classification" not in class_name:
        return None
    saved = {
        header.name.removeprefix(ADAPTER_PREFIX): header.shape for header in files.tensors if len(header.shape) >= 1
    }
    with torch.device("meta"):
        try:
            skeleton = (
                _class_named(class_name).from_config(config)
                if class_name.startswith("Auto")
                else _class_named(class_name)(config)
            )
        except Exception:
            return None
    for name, parameter in skeleton.named_parameters():
        rows = saved.get(name, ())[:1]
        if rows and parameter.shape[0] == config.num_labels != rows[0] and parameter.shape[1:] == saved[name][1:]:
            return int(rows[0])
    return None


def _bnb_config(quantization: Quantization, dtype: str) -> Any:
    if quantization is Quantization.BNB_8BIT:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, cut to a readable length; for messages."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:400]
