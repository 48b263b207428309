"""Tiny, real, seeded models and adapters on disk, built once per session.

In: a directory to build in. Out: directories as `save_pretrained` writes them. `BASES` names the bases, `VARIANTS` the
adapters; both are recipes, and `Shelf` builds each on first use. Knows nothing of merge_gate: what stands here is what
transformers and PEFT make of it, so that a test of the gate never agrees with the gate by construction.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tests.support.verify.file_changes import edited

Tensors = dict[str, torch.Tensor]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VOCABULARY = 64
LAYERS = 2


# --- tensors on disk -------------------------------------------------------------------------------------------------


def read_tensors(directory: Path, name: str = ADAPTER_WEIGHTS) -> Tensors:
    return load_file(directory / name)


def write_tensors(directory: Path, tensors: Tensors, name: str = ADAPTER_WEIGHTS) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / name, {"format": "pt"})


def rewrite(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """The weights of a directory become what `change` makes of them."""
    return lambda directory: write_tensors(directory, change(read_tensors(directory)))


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / ADAPTER_CONFIG).read_text())


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


# --- bases -----------------------------------------------------------------------------------------------------------


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DECODER = TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": False}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _randomised(name: str, config: str, **settings: Any) -> PreTrainedModel:
    """Biases start as zero and norms as one; small noise makes each tensor tell itself from every other."""
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def _llama(**changes: Any) -> PreTrainedModel:
    return _randomised("LlamaForCausalLM", "LlamaConfig", **DECODER | SPECIAL | changes)


def llama(**changes: Any) -> PreTrainedModel:
    """Grouped-query attention (4 heads, 2 key-value heads), biases on q, k, v and o, head and embedding apart."""
    return _llama(attention_bias=True, **changes)


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}
    return _randomised("GPT2LMHeadModel", "GPT2Config", **sizes, bos_token_id=1, eos_token_id=2)


def opt() -> PreTrainedModel:
    sizes = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    return _randomised("OPTForCausalLM", "OPTConfig", **sizes, ffn_dim=48, word_embed_proj_dim=32)


def mvp() -> PreTrainedModel:
    """Its embeddings of positions shift the index."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    places = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    return _randomised("MvpModel", "MvpConfig", **places, **heads, **sizes)


def _llama_loud() -> PreTrainedModel:
    """Its logits reach 27,000, although its weights are below 5,000."""
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5e4)
    return model


def qwen3_5() -> PreTrainedModel:
    """A text model inside of a larger one. `AutoModelForCausalLM` loads the text model alone, by other names."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    keys = {"num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 4}
    layers = {"num_hidden_layers": LAYERS, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return _randomised(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        text_config={"vocab_size": VOCABULARY} | layers | keys | SPECIAL | sizes | heads,
        vision_config=vision | sizes,
        **dict(zip(tokens, range(60, 64), strict=True)),
    )


def _with(build: Callable[[], PreTrainedModel], name: str, index: tuple[int, ...], value: float) -> PreTrainedModel:
    model = build()
    with torch.no_grad():
        model.state_dict()[name][index] = value
    return model


@dataclass(frozen=True)
class BaseRecipe:
    build: Callable[[], PreTrainedModel]
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    after: Callable[[Path], object] | None = None


def _lose_from_index(part: str) -> Callable[[Path], None]:
    """Takes the shards that hold a tensor out of the index; the files stay."""

    def apply(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        lost = {shard for name, shard in index["weight_map"].items() if part in name}
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard not in lost}
        path.write_text(json.dumps(index))

    return apply


Q_PROJ = "model.layers.0.self_attn.q_proj"
EXL2 = {"quant_method": "exl2", "bits": 4.0}
BASES: dict[str, BaseRecipe] = {
    "llama": BaseRecipe(llama),
    "llama-float16": BaseRecipe(llama, torch.float16),
    "llama-loud": BaseRecipe(_llama_loud, torch.float16),
    "llama-bfloat16": BaseRecipe(llama, torch.bfloat16),
    "llama-sharded": BaseRecipe(llama, max_shard_size="20KB"),
    "llama-tied": BaseRecipe(lambda: _llama(tie_word_embeddings=True)),
    "llama-wide": BaseRecipe(lambda: llama(hidden_size=64, intermediate_size=96)),
    # weights of several times as many elements as the gate samples
    "llama-tall": BaseRecipe(lambda: llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)),
    "llama-nan-in-target": BaseRecipe(lambda: _with(llama, f"{Q_PROJ}.weight", (3, 5), torch.nan)),
    "llama-nan-far": BaseRecipe(lambda: _with(llama, "model.norm.weight", (31,), torch.nan)),
    "llama-neginf-far": BaseRecipe(lambda: _with(llama, "lm_head.weight", (63, 31), -torch.inf)),
    "llama-incomplete": BaseRecipe(llama, max_shard_size="20KB", after=_lose_from_index("layers.1.mlp.up_proj")),
    "llama-inconsistent": BaseRecipe(llama, after=edited("config.json", intermediate_size=56)),
    "llama-exl2": BaseRecipe(llama, after=edited("config.json", quantization_config=EXL2)),
    "gpt2": BaseRecipe(gpt2),
    "bert": BaseRecipe(lambda: _randomised("BertModel", "BertConfig", **TEXT)),
    "bert-classifier": BaseRecipe(
        lambda: _randomised("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=3)
    ),
    "opt": BaseRecipe(opt),
    "mixtral": BaseRecipe(lambda: _randomised("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4)),
    "qwen3-5": BaseRecipe(qwen3_5),
    "mvp": BaseRecipe(mvp),
}


def make_base(key: str, directory: Path) -> None:
    recipe = BASES[key]
    torch.manual_seed(0)
    model = recipe.build().to(recipe.dtype)
    model.save_pretrained(directory, max_shard_size=recipe.max_shard_size)
    if recipe.after is not None:
        recipe.after(directory)


# --- adapters --------------------------------------------------------------------------------------------------------


def _noise(model: torch.nn.Module, seed: int, scale: float = 0.05) -> None:
    """Adds seeded noise to all that would be trained: no lora_B is zero, no saved copy equals the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))


def load_for_training(base: Path, task_type: str | None, **settings: Any) -> PreTrainedModel:
    """The model that a trainer would have put the adapter on."""
    loaders = {
        "CAUSAL_LM": AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }
    return loaders.get(task_type or "", AutoModel).from_pretrained(base, **settings)


def make_adapter(base_dir: Path, out_dir: Path, *, seed: int = 1, **lora_kwargs: Any) -> None:
    """A LoRA adapter of the base, as PEFT saves it; nothing is trained, all its parameters are seeded noise."""
    save_adapter(base_dir, out_dir, _lora_config(lora_kwargs), seed=seed)


def _lora_config(changes: Mapping[str, Any]) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | dict(changes))


@contextmanager
def among_transformers(model_class: type[PreTrainedModel]) -> Iterator[str]:
    """A class of one's own, found by its name in transformers as those of a later release would be.

    There may be two modules of that name: transformers puts another one in its own place while it is imported
    (transformers/processing_utils.py), and who imported it before holds the first.
    """
    held = [vars(module).get("transformers") for module in list(sys.modules.values())]
    named = {id(one): one for one in (sys.modules["transformers"], *held) if isinstance(one, ModuleType)}
    for module in named.values():
        setattr(module, model_class.__name__, model_class)
    try:
        yield model_class.__name__
    finally:
        for module in named.values():
            delattr(module, model_class.__name__)


def save_adapter(
    base_dir: Path,
    out_dir: Path,
    config: PeftConfig,
    *,
    seed: int = 1,
    rows: int | None = None,
    save_embedding_layers: bool = False,
    **load_settings: Any,
) -> None:
    with warnings.catch_warnings():  # PEFT warns of tied layers and of saved embeddings; both are meant here
        warnings.simplefilter("ignore")
        model = load_for_training(base_dir, config.task_type, **load_settings)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        _noise(peft_model, seed)
        if save_embedding_layers:  # one that equals the base's could be dropped unseen
            with torch.no_grad():
                peft_model.get_input_embeddings().weight.add_(0.01)
        peft_model.save_pretrained(out_dir, save_embedding_layers=save_embedding_layers or rows is not None)


@dataclass(frozen=True)
class Variant:
    """A healthy adapter: its base, LoRA's settings, how it is saved, and what happens to its files afterwards."""

    lora: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama"
    save: Mapping[str, Any] = field(default_factory=dict)
    after: Callable[[Path], None] | None = None
    build: Callable[[Path, Path], None] | None = None

    def make(self, base_dir: Path, out_dir: Path) -> None:
        if self.build is not None:
            self.build(base_dir, out_dir)
        else:
            save_adapter(base_dir, out_dir, _lora_config(self.lora), **self.save)
        if self.after is not None:
            self.after(out_dir)


def cast_file(dtype: torch.dtype) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def to_pickle(directory: Path) -> None:
    torch.save(read_tensors(directory), directory / "adapter_model.bin")
    (directory / ADAPTER_WEIGHTS).unlink()


def _lopsided(tensors: Tensors) -> Tensors:
    """A * 3e6 and B / 3e6: the same delta, by factors that float16 cannot hold."""
    return {name: value * (3e6 if "lora_A" in name else 1 / 3e6) for name, value in tensors.items()}


def name_in_keys(tensors: Tensors) -> Tensors:
    """torch.save(model.state_dict()): the adapter's name in the names."""
    return {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}


def _old_config(directory: Path) -> None:
    """As an early PEFT wrote it: the few keys of version 0.3, with the value it used for `init_lora_weights`."""
    keys = ("base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias")
    config = read_config(directory)
    old = {key: config[key] for key in keys} | {"target_modules": sorted(config["target_modules"])}
    write_config(directory, old | {"inference_mode": True, "init_lora_weights": True, "modules_to_save": None})


def _per_expert(base_dir: Path, out_dir: Path) -> None:
    """As transformers 4 named Mixtral's experts, one module per expert; transformers 5 fuses them on load."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for expert in range(4):
            for name, (rows, columns) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.05
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
    out_dir.mkdir(parents=True)
    write_tensors(out_dir, tensors)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_dir), "r": 4}
    write_config(out_dir, config | {"lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["w1", "w2", "w3"]})


def _prompt_tuning(base_dir: Path, out_dir: Path) -> None:
    save_adapter(base_dir, out_dir, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SEQ_CLS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
_LAYER_1_REGEX = r"model\.layers\.1\.(self_attn\.[qv]_proj|mlp\.down_proj)"

VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "all-linear": Variant({"target_modules": "all-linear"}),
    "every-projection": Variant({"target_modules": ALL_LINEAR}),
    "regex": Variant({"target_modules": _LAYER_1_REGEX}),
    "excluded": Variant({"target_modules": ALL_LINEAR, "exclude_modules": ["down_proj", "k_proj"]}),
    "layers-to-transform": Variant({"layers_to_transform": [1], "layers_pattern": "layers"}),
    "rslora": Variant({"use_rslora": True}),
    "patterns": Variant({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "gaussian": Variant({"init_lora_weights": "gaussian"}),
    "dora": Variant({"use_dora": True}),
    "dora-all-linear": Variant({"use_dora": True, "target_modules": ALL_LINEAR}),
    "pissa": Variant({"init_lora_weights": "pissa"}),
    "pissa-niter": Variant({"init_lora_weights": "pissa_niter_4"}),
    "olora": Variant({"init_lora_weights": "olora"}),
    "lora-bias": Variant({"lora_bias": True}),
    "bias-all": Variant({"bias": "all"}),
    "bias-lora-only": Variant({"bias": "lora_only"}),
    "modules-to-save": Variant({"modules_to_save": ["o_proj", "lm_head"]}),
    "token-rows": Variant({"trainable_token_indices": {"embed_tokens": [3, 7, 63]}}),
    "embedding": Variant({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-dora": Variant({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "saved-embedding": Variant(
        {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}, save={"save_embedding_layers": True}
    ),
    "resized-vocabulary": Variant(save={"rows": 70}),
    "resized-tied": Variant(base="llama-tied", save={"rows": 70}),
    "resized-target": Variant(
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}, save={"rows": 70}
    ),
    "resized-tokens": Variant({"trainable_token_indices": {"embed_tokens": [3, 65, 69]}}, save={"rows": 70}),
    "resized-tied-tokens": Variant({"trainable_token_indices": [3, 65, 69]}, base="llama-tied", save={"rows": 70}),
    "both-biases": Variant({"lora_bias": True, "bias": "lora_only"}),
    "dropout": Variant({"lora_dropout": 0.1}),
    "bfloat16-file": Variant(after=cast_file(torch.bfloat16)),
    "float16-file": Variant(after=cast_file(torch.float16)),
    "lopsided": Variant(after=rewrite(_lopsided)),
    "name-in-keys": Variant(after=rewrite(name_in_keys)),
    "old-config": Variant(after=_old_config),
    "pickled": Variant(after=to_pickle),
    "sharded-base": Variant(base="llama-sharded"),
    "float16-base": Variant(base="llama-float16"),
    "bfloat16-base": Variant(base="llama-bfloat16"),
    "loud-base": Variant({"modules_to_save": ["lm_head"]}, base="llama-loud"),
    "tied-base": Variant(base="llama-tied"),
    "tied-tokens": Variant({"trainable_token_indices": {"embed_tokens": [3, 7, 63]}}, base="llama-tied"),
    "tied-tokens-head": Variant({"trainable_token_indices": {"lm_head": [3, 7, 63]}}, base="llama-tied"),
    "saved-tied-embedding": Variant({"modules_to_save": ["embed_tokens"]}, base="llama-tied"),
    "tied-head": Variant({"target_modules": ["q_proj", "lm_head"]}, base="llama-tied"),
    "tied-embedding": Variant({"target_modules": ["q_proj", "embed_tokens"]}, base="llama-tied"),
    "wide": Variant(base="llama-wide"),
    "tall": Variant({"target_modules": ALL_LINEAR}, base="llama-tall"),
    "conv1d": Variant({"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, base="gpt2"),
    "conv1d-dora": Variant({"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, base="gpt2"),
    "conv1d-saved": Variant(
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f", "c_fc"]}, base="gpt2"
    ),
    "feature-extraction": Variant(
        {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "value"]}, base="bert"
    ),
    "six-labels": Variant(_SEQ_CLS, base="bert", save={"num_labels": 6}),
    "classifier": Variant(_SEQ_CLS | {"bias": "all"}, base="bert-classifier"),
    "opt": Variant({"bias": "lora_only"}, base="opt"),
    "positions": Variant({"target_modules": ["embed_positions"], "task_type": None}, base="mvp"),
    "next-to-positions": Variant({"task_type": None}, base="mvp"),
    "per-expert": Variant(base="mixtral", build=_per_expert),
    "fused-experts": Variant(
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        base="mixtral",
    ),
    "text-class": Variant(base="qwen3-5"),
    "prompt-tuning": Variant(build=_prompt_tuning),
}


# --- built once per session ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelf:
    """Builds a base or an adapter the first time it is asked for. What it hands out is shared: copy before editing."""

    root: Path

    def base(self, key: str) -> Path:
        directory = self.root / "bases" / key
        if not directory.exists():
            make_base(key, directory)
        return directory

    def adapter(self, key: str) -> Path:
        directory = self.root / "adapters" / key
        if not directory.exists():
            variant = VARIANTS[key]
            variant.make(self.base(variant.base), directory)
        return directory
