"""Recognizes adapter formats other than PEFT's, and says what to do with each.

In: names of files, keys of an adapter_config.json, names of tensors. Out: a hint, or None. It opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.records.terms import record


@record
class Format:
    """`files` and `tensors` are patterns for whole names. No config that PEFT writes has one of `keys`."""

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
            "diffusers saved this LoRA of an image or video model, and the gate merges adapters of transformers models "
            "only: run `pipe.load_lora_weights(DIRECTORY)` and `pipe.fuse_lora(safe_fusing=True)`, which refuses NaN"
        ),
    ),
    Format(
        tensors=r"(lora_(unet|te\d?|transformer|prior)|lycoris)_.*|.*\.lora_(down|up)\.weight|.*\.hada_w[12]_[ab]\.alpha",
        hint=(
            "kohya's trainers and ComfyUI write these names (lora_down, lora_up), which PEFT does not load: run "
            "`pipe.load_lora_weights(FILE)` and `pipe.fuse_lora(safe_fusing=True)` in diffusers. For Stable "
            "Diffusion 1 and 2, PEFT's repository has a converter: "
            "examples/stable_diffusion/convert_sd_adapter_to_peft.py"
        ),
    ),
    Format(
        files=r"(\d+_)?adapters\.(safetensors|npz)",
        keys=("fine_tune_type", "lora_parameters"),
        tensors=r".*\.lora_[ab]",
        hint=(
            "this is MLX's format, which has other names and another layout than PEFT's: merge it with "
            "`mlx_lm.fuse --model BASE --adapter-path DIRECTORY --save-path MERGED`, whose result this gate does not "
            "check, or train with PEFT"
        ),
    ),
    Format(
        files=r".*\.gguf",
        hint=(
            "GGUF is llama.cpp's format for serving: check the PEFT adapter that the file was made from, then convert "
            "the adapter with `convert_lora_to_gguf.py --base BASE DIRECTORY`"
        ),
    ),
    Format(
        files=r"(pytorch_adapter\.bin|adapter\.safetensors|head_config\.json|pytorch_model_head\.bin)",
        keys=("config_id", "model_class"),
        tensors=r".*\.(adapters|loras|prefix_tunings|parallel_adapters)\.\w+\..*",
        hint=(
            "the adapters library (AdapterHub) saved this adapter, which PEFT does not load: train with PEFT, or merge "
            "with `adapters.init(model)`, `name = model.load_adapter(DIRECTORY)` and `model.merge_adapter(name)`. "
            "That library merges LoRA and IA3 only, and skips other methods silently"
        ),
    ),
    Format(
        files=r"(Copy of .*|.* \(\d+\)|.* - Copy)(\.\w+)?|(?i:adapter_config\.json|adapter_model\.(safetensors|bin))",
        hint=(
            "a download or a file manager has renamed the files: give them the names adapter_config.json and "
            "adapter_model.safetensors, in lower case"
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
            "Bridge (AutoBridge.export_adapter_ckpt), and name the directory that it wrote"
        ),
    ),
    Format(
        files=r"(global_step\d+|zero_to_fp32\.py|.*_(model|optim)_states\.pt|pytorch_model_fsdp.*|__\d+_\d+\.distcp)",
        hint=(
            "this is a sharded training state of DeepSpeed or FSDP, not an adapter: let the trainer save an adapter "
            "(DeepSpeed: stage3_gather_16bit_weights_on_model_save; FSDP: fsdp_state_dict_type FULL_STATE_DICT), "
            "or load the state into the trained model and call its save_pretrained"
        ),
    ),
    Format(
        files=r"(model|pytorch_model)([-.].*)?\.(safetensors|bin|index\.json)",
        hint=(
            "this looks like a full model, or like the adapter's weights under another name: name the directory that "
            "save_pretrained of the PEFT model wrote"
        ),
    ),
)
"""The first format that fits is used."""

SINGLE_FILE = (
    "a single .safetensors file may be a LoRA of an image model from kohya's trainers or ComfyUI. Check it in "
    "diffusers, with `pipe.load_lora_weights(FILE)` and `pipe.fuse_lora(safe_fusing=True)`. A PEFT adapter has two "
    "files, adapter_model.safetensors and adapter_config.json"
)
RENAMED = (
    "PEFT loads only weights that are named adapter_model.safetensors (adapter_model.bin, if torch.save wrote them): "
    "if a file here has this adapter's weights, rename it to that"
)
_TRAINING_STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def by_files(names: Iterable[str], *, has_config: bool = False) -> str | None:
    """The hint for names of files that are not PEFT's two; `has_config`: adapter_config.json is present."""
    present = tuple(names)
    hint = _first_hint(
        known for known in FORMATS if known.files and any(re.fullmatch(known.files, name) for name in present)
    )
    if hint is None and has_config and any(name.endswith(_WEIGHTS) and name not in _TRAINING_STATE for name in present):
        return RENAMED
    if hint is None and any(name.endswith(".safetensors") for name in present):
        return SINGLE_FILE
    return hint


def by_keys(keys: Iterable[str]) -> str | None:
    """The hint for a config without peft_type."""
    present = set(keys)
    return _first_hint(known for known in FORMATS if present & set(known.keys))


def by_tensors(names: Iterable[str]) -> str | None:
    """The hint for a file whose tensors do not have PEFT's names."""
    present = tuple(names)
    if any(name.startswith(ADAPTER_PREFIX) for name in present):
        return None
    return _first_hint(
        known for known in FORMATS if known.tensors and any(re.fullmatch(known.tensors, name) for name in present)
    )


def _first_hint(formats: Iterable[Format]) -> str | None:
    return next((known.hint for known in formats), None)
