"""A tiny Qwen2.5-VL, whose files name 56 of 57 tensors otherwise than the model: transformers renames them on load.

In: a directory to build in. Out: a base, an adapter, PEFT's merge, and the same merge under the model's own names. It
does not know merge_gate.
"""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

if TYPE_CHECKING:
    from pathlib import Path

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "fullatt_block_indexes": [1],
    "window_size": 8,
}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def make_base(out: Path) -> None:
    torch.manual_seed(7)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, **TOKENS, tie_word_embeddings=False)
    Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(out)


def _loaded(base: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype="auto")


def make_adapter(base: Path, out: Path) -> None:
    """On the attention of text and vision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            _loaded(base), LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "qkv"])
        )
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(out)


def make_merge(base: Path, adapter: Path, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(_loaded(base), adapter).merge_and_unload(safe_merge=True).save_pretrained(out)


def rename(merged: Path, out: Path) -> None:
    """The merge with the names that the model has in memory: what a script saves that dumps the state dict."""
    shutil.copytree(merged, out, dirs_exist_ok=True)
    state = {name: one.clone() for name, one in _loaded(merged).state_dict().items()}
    save_file(state, out / "model.safetensors", {"format": "pt"})


def naive_matches(base: Path) -> int:
    """How many stored names are names of the model."""
    return len(load_file(base / "model.safetensors").keys() & _loaded(base).state_dict().keys())
