"""Every architecture of the installed transformers, as small as its configuration lets it be.

In: a model type. Out: `build`, which saves a tiny random model of it, and `save_lora`, which puts LoRA on its linear
layers. May not know merge_gate: what stands here is what the gate is held against.

A small configuration is found, not listed: every number of the default configuration and of those inside it is made
smaller by its name (`_shrunk`), in ways that grow milder until a model can be built. Nothing runs the models, so the
numbers need to fit a constructor only.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from tests.support.methods import quiet

LARGEST_PARAMETERS = 48_000_000
AUTO_CLASSES = {
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": None,
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": None,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "SEQ_2_SEQ_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": None,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CAUSAL_LM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": None,
    "MODEL_MAPPING_NAMES": None,
}
"""Mappings of model types to classes, the usual class of a fine-tuned model first, with PEFT's task type for it."""

TINY = {"heads": 4, "kv_heads": 4, "head": 8, "width": 32, "inner": 48, "vocabulary": 128, "layers": 2, "experts": 4}


class CannotBuildError(Exception):
    """No small model of this type can be built here; the text says what was tried last."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model type, the class that was built for it, and PEFT's task type."""

    model_type: str
    model_class: type[Any]
    task_type: str | None
    parameters: int


# --- small configurations ------------------------------------------------------------------------------------------

KINDS = {
    "layers": r"(^|_)(n|num)_(\w*_)?(layers?|blocks?|stages?)$|^(n_layers?|depths?|num_layers)$|_layers$|_depths$",
    "kv_heads": r"(key_value|kv)_heads$|^(n_head_kv|num_kv_heads)$",
    "heads": r"(_heads|_head|^heads)$",
    "head": r"(head_dim|head_size|d_kv|head_channels)\w*$",
    "experts": r"(experts|expert_num)$",
    "chosen": r"(experts_per_tok|top_?k|topk\w*|experts_per_token|n_group|num_groups?)$",
    "vocabulary": r"vocab\w*$|codebook_size$",
    "inner": r"(intermediate|ffn|inner|mlp|feed_?forward)\w*(_size|_dim|_channels)?$|^(d_ff|n_inner)$",
    "width": r"(hidden|embed\w*|model|projection|width)(_sizes?|_dims?|s|_channels)?$|n_embd$|(^|_)(dims?|widths?)$",
}
"""Kind of a number, by the name of its key."""


def _kind(key: Any) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, str(key))), None)


def _tiny(key: str, value: int) -> int:
    """All numbers of a kind become one number, however they differed."""
    kind = _kind(key)
    if kind in {"chosen", "kv_heads"}:
        return min(value, 2)
    if kind is None:
        return _id(key, value, TINY["vocabulary"])
    return min(value, TINY[kind])


def _filled(key: str, value: int | None) -> int | None:
    """Some defaults leave out a number without which no model can be built."""
    kind = _kind(key)
    return TINY[kind] if value is None and kind in FILLED else value if value is None else _tiny(key, value)


FILLED = {"head", "kv_heads", "heads", "width", "inner", "experts"}


def _divided(key: str, value: int) -> int:
    """Sizes keep their ratios."""
    kind = _kind(key)
    if kind in {"layers", "experts", "chosen", "vocabulary"}:
        return _tiny(key, value)
    if kind in {"inner", "width"} and value >= 64 and value % 16 == 0:
        return value // 8
    if kind in {"heads", "kv_heads"} and value % 4 == 0:
        return value // 4
    if kind == "head" and value % 8 == 0:
        return value // 2
    return _id(key, value, TINY["vocabulary"])


def _shallow(key: str, value: int) -> int:
    """Sizes stay; there are fewer layers, experts and words."""
    kind = _kind(key)
    return _tiny(key, value) if kind in {"layers", "experts", "chosen", "vocabulary"} else _id(key, value, 128)


def _id(key: str, value: int, vocabulary: int) -> int:
    """Ids of special tokens must lie inside the vocabulary."""
    return value % vocabulary if re.search(r"(token_id|_id|_index|token_ids)$", key) and value > 0 else value


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHRINKERS: tuple[Callable[[str, Any], Any], ...] = (_tiny, _filled, _divided, _shallow)


def _shrunk(tree: dict[str, Any], shrink: Callable[[str, int], int]) -> dict[str, Any]:
    """The tree with smaller numbers; lists with an item per layer are cut to the layers that are left."""
    layers = {value for key, value in tree.items() if type(value) is int and value > 2 and _kind(key) == "layers"}
    kept = _layers_to_keep(tree, layers)
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key in NAMES_OF_NO_SIZE or not isinstance(key, str):
            found[key] = value
        elif key == "per_layer_config" and isinstance(value, dict):
            found[key] = {layer: _shrunk(one, shrink) for layer, one in value.items() if int(layer) < kept}
        elif key in {"out_features", "out_indices"}:
            found[key] = None  # names stages that are gone; none means the last
        elif isinstance(value, dict):
            found[key] = _shrunk(value, shrink)
        elif isinstance(value, list):
            found[key] = [_one(key, item, shrink) for item in (value[:kept] if len(value) in layers else value)]
        elif type(value) is int and value in layers and _kind(key) == "layers":
            found[key] = kept
        else:
            found[key] = _one(key, value, shrink)
    return found


NAMES_OF_NO_SIZE = {"id2label", "label2id", "rope_scaling", "rope_parameters", "transformers_version"}


def _one(key: str, value: Any, shrink: Callable[[str, int], int]) -> Any:
    if isinstance(value, dict):
        return _shrunk(value, shrink)
    return shrink(key, value) if type(value) is int or (value is None and shrink is _filled) else value


def _layers_to_keep(tree: dict[str, Any], layers: set[int], most: int = 6) -> int:
    """As many layers as show each kind of layer once: hybrids have a few before the first of another kind."""
    kept = TINY["layers"]
    for value in tree.values():
        if isinstance(value, list) and len(value) in layers and all(isinstance(item, str | int) for item in value):
            first = [value.index(item) + 1 for item in set(value)]
            kept = max([kept, *(place for place in first if place <= most)])
    return kept


def small_configs(model_type: str) -> Iterator[transformers.PretrainedConfig]:
    """Configurations of the type, the smallest first; the last is the default. One that its class refuses is left out.

    Raises:
        CannotBuildError: the class refuses all of them.
    """
    kind = transformers.CONFIG_MAPPING[model_type]
    refused: Exception | None = None
    made = 0
    for shrink in (*SHRINKERS, None):
        with quiet():
            try:
                tree = kind().to_dict()
                config = kind.from_dict(_with(_shrunk(tree, shrink) if shrink else tree, SPECIAL.get(model_type, {})))
            except Exception as error:  # noqa: BLE001 - each class has its own way to refuse
                refused = refused or error
                continue
        made += 1
        yield config
    if refused is not None and not made:
        raise CannotBuildError(f"{type(refused).__name__}: {refused}")


def _with(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with changes, at any depth."""
    return tree | {
        key: _with(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": MAMBA,
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "glm5_next_text": {"num_key_value_heads": 4},
    "granitemoehybrid": MAMBA,
    "informer": {"prediction_length": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "time_series_transformer": {"prediction_length": 4},
}
"""What a type needs besides."""


# --- models --------------------------------------------------------------------------------------------------------


def model_types() -> list[str]:
    return sorted(transformers.CONFIG_MAPPING.keys())


def model_classes(model_type: str) -> Iterator[tuple[type[Any], str | None]]:
    """Classes of the type, the usual one of a fine-tuned model first; the first that can be built counts."""
    mappings = [name for name in dir(modeling_auto) if re.match("MODEL_.*MAPPING_NAMES$", name)]
    others = [name for name in mappings if name not in AUTO_CLASSES]
    seen = set()
    for mapping in [*AUTO_CLASSES, *others]:
        named = dict(getattr(modeling_auto, mapping)).get(model_type)
        for name in (named,) if isinstance(named, str) else tuple(named or ()):
            if name not in seen and hasattr(transformers, name):
                seen.add(name)
                yield getattr(transformers, name), AUTO_CLASSES.get(mapping)
    for model_class in _classes_beside(transformers.CONFIG_MAPPING[model_type]):
        if model_class.__name__ not in seen:
            yield model_class, None


def _classes_beside(config_class: type[Any]) -> Iterator[type[Any]]:
    """Parts of larger models are in no mapping; transformers exports some of them."""
    try:
        module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return
    for name, found in vars(module).items():
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and found.config_class is config_class
            and not name.endswith("PreTrainedModel")
            and getattr(transformers, name, None) is found
        ):
            yield found


def models(model_type: str, dtype: torch.dtype) -> Iterator[tuple[Architecture, nn.Module]]:
    """Small random models of the type: of its usual class first, and of each class the smallest first.

    Raises:
        CannotBuildError: none of its classes can be built from any small configuration.
    """
    first: Exception | None = None
    made = 0
    for model_class, task_type in model_classes(model_type):
        for config in small_configs(model_type):
            try:
                with quiet():
                    model = _model(model_class, config, dtype)
            except Exception as error:  # noqa: BLE001 - constructors fail in any way
                first = first or error
                continue
            made += 1
            parameters = sum(parameter.numel() for parameter in model.parameters())
            yield (
                Architecture(
                    model_type=model_type, model_class=model_class, task_type=task_type, parameters=parameters
                ),
                model,
            )
    if not made:
        raise CannotBuildError(
            f"{type(first).__name__}: {first}" if first else "transformers maps this configuration to no model class"
        )


def build(model_type: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """Save a small random model of the type.

    Raises:
        CannotBuildError: none of its classes can be built from any small configuration, and saved.
    """
    first: Exception | None = None
    for architecture, model in models(model_type, dtype):
        try:
            with quiet():
                model.save_pretrained(directory)
        except Exception as error:  # noqa: BLE001 - some cannot be saved
            first = first or error
            continue
        return architecture
    raise CannotBuildError(f"{type(first).__name__}: {first}")


def _model(model_class: type[Any], config: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in model_class(config).parameters()]
    parameters = sum(sizes)
    if not all(sizes):
        raise CannotBuildError("a parameter without elements at the smallest")
    if parameters > LARGEST_PARAMETERS:
        raise CannotBuildError(f"{parameters / 1e6:.0f} M parameters at the smallest")
    torch.manual_seed(0)
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some start as zeros, some as whatever the memory held
            parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.to(dtype)


# --- adapters ------------------------------------------------------------------------------------------------------


def load(architecture: Architecture, directory: Path) -> nn.Module:
    """The saved model as a user loads it. Seeded: what a checkpoint lacks is drawn anew on each load."""
    torch.manual_seed(0)
    with quiet():
        model: nn.Module = architecture.model_class.from_pretrained(directory, dtype="auto").eval()
    return model


def save_lora(architecture: Architecture, base: Path, directory: Path) -> dict[str, torch.Tensor]:
    """LoRA on all linear layers, saved by PEFT. Returns what was trained, by the names of PEFT's model."""
    with quiet():
        model = with_lora(architecture, load(architecture, base))
        model.save_pretrained(directory)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def with_lora(architecture: Architecture, model: nn.Module) -> Any:
    """PEFT's model with a random LoRA on all linear layers."""
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=_targets(model),
        exclude_modules=["out_proj", "conv1d"] if _has_mamba(model) else None,
        task_type=architecture.task_type,
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def _has_mamba(model: nn.Module) -> bool:
    """PEFT refuses these two layers of it, whose weights a fused kernel reads by itself."""
    return any(word in model.config.model_type for word in ("mamba", "falcon_h1", "nemotron_h"))


def _targets(model: nn.Module) -> str | list[str]:
    """`all-linear`, where PEFT can say what that is; the names of convolutions where nothing is linear."""
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    convolutions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
    ]
    try:
        model.get_output_embeddings()
    except NotImplementedError:
        return linear or convolutions
    return "all-linear" if linear else convolutions
