"""Adapters whose merges have more than their base, such as new tokens or a classifier's head; and their merges.

In: the name of a scene. Out: directories of base and adapter, and the tensors of PEFT's merge in float32.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support.models import Tensors
from tests.support.quantized.checkpoints import saved
from tests.support.quantized.gguf_files import write_llama
from tests.support.quantized.releases import LINEAR
from tests.support.quantized.writers import FORMATS, written_in

ROWS, NEW, SIZE, SHARE = 128, 4, 128, 0.05
EMBEDDING, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"

_CAUSAL, _CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
_LORA: Mapping[str, Any] = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
SCENES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tokens": (_CAUSAL, {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "classifier": (_CLASSIFIER, {}, {"task_type": "SEQ_CLS"}),
    "untied": (_CAUSAL, {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "vision": ("", {}, {"target_modules": ["q_proj", "v_proj", "linear_1", "linear_2"], "task_type": None}),
}
"""The class, settings of the base's config, and settings of the adapter. New tokens are new rows."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A base, an adapter, and their merge."""

    base: Path
    adapter: Path
    merged: Tensors
    config: Any
    class_name: str

    def gguf(self, path: Path, tensors: Tensors, embedding: Type = Type.Q8_0) -> Path:
        """A release in Q8_0, with embedding and head in another type. Of a model of images and text, the text model."""
        text = {
            name.replace("model.language_model.", "model."): values
            for name, values in tensors.items()
            if self.class_name or "language_model" in name or name == HEAD
        }
        write_llama(path / "model.gguf", text, self.config.get_text_config(), Type.Q8_0, embedding)
        return path / "model.gguf"

    def directory(self, path: Path, tensors: Tensors, name: str) -> Path:
        config = {**json.loads((self.base / "config.json").read_bytes()), "quantization_config": FORMATS[name][1]}
        config |= {"vocab_size": len(tensors[EMBEDDING]), "architectures": [self.class_name]}
        if name == "MLX":  # mlx_lm.convert quantizes embedding and head, too
            config["quantization"] = config.pop("quantization_config")
            tensors = written_in(name, tensors, ("_proj.weight", EMBEDDING, HEAD))
        else:
            tensors = written_in(name, tensors)
        saved(path / "release", tensors, config)
        return path / "release"


def made(root: Path, name: str) -> Scene:
    """The scene of this name."""
    class_name, settings, of_adapter = SCENES[name]
    random, base, adapter = torch.Generator().manual_seed(3), root / "base", root / "adapter"
    sizes = {"vocab_size": ROWS, "hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    config = LlamaConfig(**{**sizes, **heads, **settings})
    if class_name:
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                  image_size=16, patch_size=8, projection_dim=32)  # fmt: skip
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=config, image_token_index=ROWS - 1)
        )
    for tensor in model.parameters():
        tensor.data = torch.randn(tensor.shape, generator=random) * 0.05 + (tensor.dim() == 1)
    model.bfloat16().save_pretrained(base)

    def loaded(rows: int | None) -> Any:
        own = getattr(transformers, class_name) if class_name else LlavaForConditionalGeneration
        more = {"num_labels": 3} if class_name == _CLASSIFIER else {}
        again = own.from_pretrained(base, dtype=torch.float32, **more)
        if rows:
            again.resize_token_embeddings(rows, mean_resizing=False)
        return again

    rows = ROWS + NEW if name == "tokens" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(loaded(rows), LoraConfig(**{**_LORA, **of_adapter}))
        for path, module in peft_model.named_modules():
            if hasattr(module, "lora_B"):
                first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
                second.data = torch.randn(second.shape, generator=random)
                weight = module.get_base_layer().weight
                second.data *= SHARE * weight.norm() / (module.scaling["default"] * (second @ first)).norm()
            elif "modules_to_save.default" in path and hasattr(module, "weight"):
                module.weight.data = 0.05 * torch.randn(module.weight.shape, generator=random)
        peft_model.save_pretrained(adapter, save_embedding_layers=bool(rows))
        merged = PeftModel.from_pretrained(loaded(rows), adapter).merge_and_unload()
    tensors = {key: value.clone() for key, value in merged.state_dict().items()}
    return Scene(base, adapter, tensors, merged.config, class_name)
