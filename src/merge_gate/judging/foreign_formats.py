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
        tensors=r"(lora_(unet|te\d?|transformer|prior)|lycoris)_.*|.*\.lora_(down|up)\.weight|.*\.hada_w[12]_[ab]\.alpha",
        hint=(
            "these are the names of kohya's trainers and ComfyUI (lora_down, lora_up), which PEFT does not load: check "
            "it in diffusers, with `pipe.load_lora_weights(FILE)` and `pipe.fuse_lora(safe_fusing=True)`; for Stable "
            "Diffusion 1 and 2 PEFT's repository has a converter, "
            "examples/stable_diffusion/convert_sd_adapter_to_peft.py"
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
            "`adapters.init(model)`, `name = model.load_adapter(DIRECTORY)` and `model.merge_adapter(name)` (LoRA and "
            "IA3 only: others stay as they are, without a word), or train with PEFT"
        ),
    ),
    Format(
        files=r"(Copy of .*|.* \(\d+\)|.* - Copy)(\.\w+)?|(?i:adapter_config\.json|adapter_model\.(safetensors|bin))",
        hint=(
            "a download or a file manager has renamed the files: give them back the names adapter_config.json and "
            "adapter_model.safetensors, in small letters"
        ),
    ),
    Format(
        files=r"adapter_model(-\d+-of-\d+\..*|\.safetensors\.index\.json|\.bin\.index\.json)",
        hint="the weights are sharded, which PEFT does not load: save the adapter again with one weights file",
    ),
    Format(
        files=r"(.*\.nemo|iter_\d+|mp_rank_\d+(_\d+)?|latest_checkpointed_iteration\.txt|model_optim_rng\.pt)",
        hint=(
            "this is a checkpoint of Megatron or NeMo, which PEFT does not load: export the adapter with Megatron "
            "Bridge (AutoBridge.export_adapter_ckpt), and list what that wrote"
        ),
    ),
    Format(
        files=r"(global_step\d+|zero_to_fp32\.py|.*_(model|optim)_states\.pt|pytorch_model_fsdp.*|__\d+_\d+\.distcp)",
        hint=(
            "this is the state of a training under DeepSpeed or FSDP, in parts, and no adapter: let the trainer save "
            "one (DeepSpeed: stage3_gather_16bit_weights_on_model_save; FSDP: fsdp_state_dict_type FULL_STATE_DICT), "
            "or load the state into the trained model and call its save_pretrained"
        ),
    ),
    Format(
        files=r"(model|pytorch_model)([-.].*)?\.(safetensors|bin|index\.json)",
        hint=(
            "this looks like a full model (a merged one, perhaps), or like the adapter's weights under another name: "
            "list the directory that save_pretrained of the PEFT model wrote"
        ),
    ),
)
"""The first row that fits counts."""

LONE = (
    "a single .safetensors with a name of its own is how kohya's trainers and ComfyUI keep a LoRA of an image model: "
    "check that one in diffusers, with `pipe.load_lora_weights(FILE)` and `pipe.fuse_lora(safe_fusing=True)`; a PEFT "
    "adapter has the name adapter_model.safetensors, and adapter_config.json beside it"
)
RENAMED = (
    "PEFT loads weights by the name adapter_model.safetensors (adapter_model.bin, if torch.save wrote them): if a file "
    "here is this adapter's, give it that name; if adapter_config.json is of another adapter, this is another program's"
)
_BESIDE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def by_files(names: Iterable[str], *, has_config: bool = False) -> str | None:
    """The hint for what lies in a directory instead of PEFT's two files; `has_config`: one of them is there."""
    present = tuple(names)
    known = _first(one for one in FORMATS if one.files and any(re.fullmatch(one.files, name) for name in present))
    if known is None and has_config and any(name.endswith(_WEIGHTS) and name not in _BESIDE for name in present):
        return RENAMED
    if known is None and any(name.endswith(".safetensors") for name in present):
        return LONE
    return known


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
