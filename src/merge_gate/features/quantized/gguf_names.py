"""Compares the header of a GGUF file with the base's model: its architecture, its settings, and its tensors by name.

In: a `GgufHeader`, and the base's model without values. Out: transformers' names, and what differs. Reads no weights.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import modeling_gguf_pytorch_utils as of_transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from merge_gate._internal.errors import EngineError
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.quantized.gguf_file import GgufHeader, GgufTensor
from merge_gate.features.quantized.measurement import Setting

_LISTED = 4
_MODEL_TYPES = {
    "llama": {"llama", "mistral", "mixtral"}, "mamba": {"mamba", "falcon_mamba"}, "deci": {"deci", "nemotron-nas"},
    "t5": {"t5", "mt5", "umt5"}, "t5encoder": {"t5", "mt5", "umt5"},
}  # fmt: skip
"""The model types that llama.cpp converts to an architecture of another name."""

_NOT_READ = {"general", "tokenizer", "falcon"}
"""Keys of transformers that are no architectures, and one whose rows of q, k, and v it leaves in llama.cpp's order."""

_MORE_KEYS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_UNUSED_KEYS = {"context_length", "vocab_size", "feed_forward_length", "decoder_start_token_id", "expert_gating_func"}
"""Keys that change nothing, that the shapes show, or whose values the config has under other names."""

_ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor")
"""llama.cpp scales linearly if a file has one of the first two without a type."""

_SAME = 1e-5
_PLAIN_ROPE = {"default", "llama3"}
_SAME_ROPE, _MOST_FACTORS = 1e-3, 4_096
_FREQUENCIES = 10_000.0
"""llama.cpp's rope.freq_base for a file without it."""

_PARTS_OF_EXPERTS = ("gate", "up")
_FUSED = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?experts\.gate_up_proj")
_SINGLE_EXPERT = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.\d+\.weight")
_ROPE = {
    "rope_freqs.weight": "",
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
"""Factors of rotary embeddings, which the converter computes from the config, and their keys there."""


class GgufNames(NamedTuple):
    """The tensors of each of the model's names, in transformers' order, and those that the model does not have.

    `names` are transformers' names by those of the file, and `rope` the factors of the frequencies.
    """

    processor: Any
    names: Mapping[str, str]
    tensors: Mapping[str, tuple[GgufTensor, ...]]
    added: tuple[str, ...]
    rope: Mapping[str, GgufTensor]


def named(header: GgufHeader, model: Any) -> GgufNames:
    """Name the tensors of a file.

    Raises:
        EngineError: the file is no whole model of the base's architecture, or transformers cannot name its tensors.
    """
    config = model.config.get_text_config(decoder=True)
    architecture = _architecture(header, config)
    processor = of_transformers.TENSOR_PROCESSORS.get(architecture, of_transformers.TensorProcessor)(config.to_dict())
    try:
        own = _TextModel(model, config)
        names = of_transformers.get_gguf_hf_weights_map(own, processor, architecture, config.num_hidden_layers)
    except (NotImplementedError, AttributeError) as error:
        raise EngineError(
            f"transformers cannot name the tensors of the GGUF file: {str(error)[:200]}",
            hint="verify the merged model before it is converted",
        ) from error
    for name in own.tensors.keys() - names.values():
        if match := _FUSED.fullmatch(name):
            names |= {f"blk.{match[1]}.ffn_{part}_exps": name for part in _PARTS_OF_EXPERTS}
    names = {stored: own.names.get(name, name) for stored, name in names.items()}
    tensors: dict[str, list[GgufTensor]] = defaultdict(list)
    added = dict(header.tensors)
    rope = {name: added.pop(name) for name in _ROPE if name in added and math.prod(added[name].shape) <= _MOST_FACTORS}
    for tensor in header.tensors.values():
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            tensors[name].append(added.pop(tensor.name))
    tensors_of_model = {own.names.get(name, name): tensor for name, tensor in own.tensors.items()}
    has_name = {id(tensors_of_model[name]) for name in names.values()}
    nameless = [name for name, tensor in tensors_of_model.items() if id(tensor) not in has_name]
    if added and (nameless or any(map(_SINGLE_EXPERT.fullmatch, added))):
        what = f", and no names for {_listed(nameless)} of the base" if nameless else ", which store one expert each"
        raise EngineError(
            f"the GGUF file has {_listed([*added])}: transformers knows no such tensors{what}",
            hint="convert the merge with a current llama.cpp, or verify the merged model before it is converted",
        )
    return GgufNames(processor, names, {name: _joined(name, parts) for name, parts in tensors.items()}, (*added,), rope)


class _TextModel:
    """The text model in a model, without the parts for images and sounds, whose layers would have the same names.

    `tensors` are by the names in a model of text alone, and `names` has those of the whole model, if they differ.
    """

    def __init__(self, model: Any, config: Any) -> None:
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self.tensors, self.names = {name: own[name] for name in model.state_dict() if name in own}, dict[str, str]()
        self.named_children = model.named_children
        if config.model_type != model.config.model_type:
            decoder, head = model.get_decoder(), model.get_output_embeddings()
            parts = {f"{name}.": "model." for name, module in model.named_modules() if module is decoder}
            parts |= {f"{name}.": "lm_head." for name, module in model.named_modules() if module is head}
            self.names = {f"{new}{name.removeprefix(old)}": name for name in own for old, new in parts.items()
                          if name.startswith(old)}  # fmt: skip
            self.tensors = {text: own[name] for text, name in self.names.items()}
            self.named_children = dict[str, Any]().items

    def state_dict(self) -> Mapping[str, Any]:
        return self.tensors


def _listed(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'tensor')} ({listing([quoted(name, 120) for name in names], _LISTED)})"


def _joined(name: str, parts: Sequence[GgufTensor]) -> tuple[GgufTensor, ...]:
    """The tensors of a name: one, or two of fused experts, which are joined in this order."""
    by_name = {tensor.name.removesuffix(".weight").rpartition(".")[2]: tensor for tensor in parts}
    is_fused = not by_name.keys().isdisjoint(wanted := [f"ffn_{part}_exps" for part in _PARTS_OF_EXPERTS])
    is_whole = sorted(by_name) == wanted and len({tensor.shape for tensor in parts}) == 1 and len(parts[0].shape) > 1
    if len(parts) > 1 + is_fused or (is_fused and not is_whole):
        stored = listing([f"{quoted(tensor.name, 120)} {list(tensor.shape)}" for tensor in parts], _LISTED)
        expected = "two tensors of one shape, for gate and up" if is_fused else "one tensor"
        raise EngineError(
            f"the GGUF file is broken: {quoted(name, 120)} is stored as {stored}, expected {expected}",
            hint="convert the merge again",
        )
    return tuple(by_name[part] for part in wanted) if is_fused else tuple(parts)


def _architecture(header: GgufHeader, config: Any) -> str:
    """The architecture, if transformers knows it, and the base has it."""
    architecture, count = header.keys.get("general.architecture"), header.keys.get("split.count")
    if header.keys.get("general.type") == "adapter":
        raise EngineError("the GGUF file is an adapter", hint="name the GGUF file of a merged model")
    if count:
        raise EngineError(
            f"the GGUF file is part of {quoted(str(count), 20)} files", hint="join them with `llama-gguf-split --merge`"
        )
    known = {*of_transformers.GGUF_SUPPORTED_ARCHITECTURES, *of_transformers.TENSOR_PROCESSORS}
    if not isinstance(architecture, str) or architecture not in known - _NOT_READ:
        raise EngineError(
            f"transformers does not know the architecture {quoted(str(architecture), 60)} of the GGUF file, so its "
            "tensors cannot be compared with those of the base",
            hint="verify the merged model before it is converted",
        )
    types = _MODEL_TYPES.get(architecture, {architecture})
    if _squeezed(config.model_type) not in map(_squeezed, types):
        raise EngineError(
            f"the GGUF file has the architecture {quoted(architecture, 60)}, expected that of the base, whose "
            f"model_type is {quoted(config.model_type, 60)}",
            hint="name the base that the release was made from with --base",
        )
    return architecture


def _squeezed(name: str) -> str:
    return re.sub("[_-]", "", name.removesuffix("_text"))


def differing_settings(header: GgufHeader, config: Any) -> Iterator[Setting]:
    """The keys that change what is computed, if their values are not those of the base's config."""
    architecture, tables = header.keys["general.architecture"], of_transformers.GGUF_CONFIG_MAPPING
    own, rope = tables.get(architecture) or tables.get(config.model_type) or {}, _rope(config)
    expected = {key: getattr(config, name, None) for key, name in {**_MORE_KEYS, **own}.items() if name}
    kind = rope.get("rope_type", "default")
    expected["rope.freq_base"] = rope.get("rope_theta")
    defaults = {"rope.freq_base": _FREQUENCIES, "rope.scaling.type": "none"}
    if kind in {"linear", "yarn"}:
        expected |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.get("factor")}
        defaults["rope.scaling.factor"] = 1.0
        expected["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    elif kind in _PLAIN_ROPE:
        expected |= {"rope.scaling.type": "none"} | dict.fromkeys(_ROPE_FACTORS, 1.0)
    for key, value in expected.items():
        actual = header.keys.get(f"{architecture}.{key}", defaults.get(key))
        is_compared = key not in _UNUSED_KEYS and actual is not None and isinstance(value, (str, int, float))
        if is_compared and not _is_same(actual, value):
            yield Setting(name=f"{architecture}.{key}", actual=str(actual)[:60], expected=str(value)[:60])


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return bool(first == second)
    return math.isclose(first, second, rel_tol=_SAME)


def _rope(config: Any) -> Mapping[str, Any]:
    """The settings of rotary embeddings. Gemma has those of some layers apart."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)  # type: ignore[no-any-return] # the config is untyped


def rope_factors(config: Any) -> dict[str, torch.Tensor] | None:
    """The tensors that llama.cpp's converter adds for this config; None if that is not known, as for Gemma 4."""
    rope = _rope(config)
    if rope.get("rope_type", "default") not in {*_PLAIN_ROPE, "linear", "yarn", "dynamic", "longrope"}:
        return None
    factors = {name: torch.tensor(rope[key]) for name, key in _ROPE.items() if key and isinstance(rope.get(key), list)}
    if rope.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        powers = torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
        factors["rope_freqs.weight"] = rope["rope_theta"] ** -powers / scaled
    return factors


def differing_factors(name: str, expected: torch.Tensor | None, actual: torch.Tensor | None) -> Setting | None:
    """The factors of a file, if they are not those of the base's config. None are as good as 1 everywhere."""
    if actual is None or expected is None:
        is_same = all(factors is None or bool((factors == 1).all()) for factors in (actual, expected))
    else:
        is_same = actual.shape == expected.shape and torch.allclose(actual, expected.float(), rtol=_SAME_ROPE, atol=0)
    first, second = (
        "absent" if factors is None else f"{factors.numel()} factors up to {factors.max():g}"
        for factors in (actual, expected)
    )
    return None if is_same else Setting(name=name, actual=first, expected=second)
