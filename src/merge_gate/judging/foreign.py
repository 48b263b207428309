"""Formats of adapters that are not PEFT's: how they are known, and what to do about each.

In: names of files, keys of an adapter_config.json, names of tensors. Out: a hint, or None. Opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge_gate.records.terms import record
from merge_gate.tensor_names import ADAPTER_PREFIX


@record
class Format:
    """`files` and `tensors` are patterns for whole names; each of `keys` stands in no config of PEFT's."""

    hint: str
    files: str | None = None
    keys: tuple[str, ...] = ()
    tensors: str | None = None


FORMATS = (
    Format(
        files=r"pytorch_lora_weights\.(safetensors|bin)",
        tensors=(
            r"(unet|text_encoder(_\d)?)\..*|(transformer|diffusion_model)\."
            r"(\w*transformer_blocks|\w*blocks|input_blocks|layers)\..*"
        ),
        hint=(
            "this is a LoRA of an image or video model as diffusers saves it, and the gate merges adapters of "
            "transformers models only: check it in its pipeline, with `pipe.load_lora_weights(DIRECTORY)` and "
            "`pipe.fuse_lora(safe_fusing=True)`, which refuses NaN"
        ),
    ),
    Format(
        tensors=r"lora_(unet|te\d?|transformer|prior)_.*|.*\.lora_(down|up)\.weight|.*\.hada_w[12]_[ab]\.alpha",
        hint=(
            "these are the names of kohya's trainers and ComfyUI (lora_down, lora_up), which PEFT does not load: check "
            "it in diffusers, with `pipe.load_lora_weights(FILE)` and `pipe.fuse_lora(safe_fusing=True)`; PEFT's "
            "repository has a converter, examples/stable_diffusion/convert_sd_adapter_to_peft.py"
        ),
    ),
    Format(
        files=r"(\d+_)?adapters\.(safetensors|npz)",
        keys=("fine_tune_type", "lora_parameters"),
        tensors=r".*\.lora_[ab]",
        hint=(
            "this is MLX's format, with other names and layout than PEFT's: merge it with "
            "`mlx_lm.fuse --model BASE --adapter-path DIRECTORY --save-path MERGED` and release that, or train with "
            "PEFT"
        ),
    ),
    Format(
        files=r".*\.gguf",
        hint=(
            "GGUF is llama.cpp's format, converted for serving: gate the PEFT adapter that it was converted from, then "
            "convert that with `convert_lora_to_gguf.py --base BASE DIRECTORY`"
        ),
    ),
    Format(
        files=r"(pytorch_adapter\.bin|adapter\.safetensors|head_config\.json|pytorch_model_head\.bin)",
        keys=("config_id", "model_class"),
        tensors=r".*\.(adapters|loras|prefix_tunings|parallel_adapters)\.\w+\..*",
        hint=(
            "this is an adapter of the adapters library (AdapterHub), which PEFT does not load: merge it there, with "
            "`model.load_adapter(DIRECTORY)` and `model.merge_adapter(NAME)` (LoRA and IA3 only), or train with PEFT"
        ),
    ),
    Format(
        files=r"(Copy of .*|.* \(\d+\)|.* - Copy)(\.\w+)?",
        hint=(
            "a download or a file manager has renamed the files: give them back the names adapter_config.json and "
            "adapter_model.safetensors"
        ),
    ),
    Format(
        files=r"adapter_model(-\d+-of-\d+\..*|\.safetensors\.index\.json|\.bin\.index\.json)",
        hint="the weights are sharded, which PEFT does not load: save the adapter again with one weights file",
    ),
    Format(
        files=r"(model|pytorch_model)([-.].*)?\.(safetensors|bin|index\.json)",
        hint=(
            "this looks like a full model, not an adapter (a merged one, perhaps): list the directory that "
            "save_pretrained of the PEFT model wrote"
        ),
    ),
    Format(
        files=r".*\.safetensors",
        hint=(
            "a single .safetensors with a name of its own is how kohya's trainers and ComfyUI keep a LoRA of an image "
            "model: check that one in diffusers, with `pipe.load_lora_weights(FILE)` and "
            "`pipe.fuse_lora(safe_fusing=True)`; a PEFT adapter has the name adapter_model.safetensors, and "
            "adapter_config.json beside it"
        ),
    ),
)
"""The first row that fits counts."""


def by_files(names: Iterable[str]) -> str | None:
    """The hint for what lies in a directory instead of PEFT's two files."""
    present = tuple(names)
    return _first(one for one in FORMATS if one.files and any(re.fullmatch(one.files, name) for name in present))


def by_keys(keys: Iterable[str]) -> str | None:
    """The hint for a config without peft_type."""
    present = set(keys)
    return _first(one for one in FORMATS if present & set(one.keys))


def by_tensors(names: Iterable[str]) -> str | None:
    """The hint for a file whose tensors do not have PEFT's names."""
    present = tuple(names)
    if any(name.startswith(ADAPTER_PREFIX) for name in present):
        return None
    return _first(one for one in FORMATS if one.tensors and any(re.fullmatch(one.tensors, name) for name in present))


def _first(found: Iterable[Format]) -> str | None:
    return next((one.hint for one in found), None)
