"""What lies in a directory instead of PEFT's two files, going by names, and what to do about it.

In: names of files. Out: a hint, or None where the names say nothing. Opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FOREIGN = (
    (
        r"pytorch_lora_weights\.(safetensors|bin)",
        (
            "this is a LoRA as diffusers saves it, for an image model's parts; the gate merges adapters of "
            "transformers models only: load it with load_lora_weights of its pipeline and check it there"
        ),
    ),
    (
        r"adapters\.(safetensors|npz)",
        (
            "these are MLX's adapter weights, with other names and layout than PEFT's: fuse them with mlx_lm.fuse and "
            "release that, or train with PEFT"
        ),
    ),
    (
        r".*\.gguf",
        (
            "GGUF is llama.cpp's format, converted for serving: gate the PEFT adapter that it was converted from "
            "(convert_lora_to_gguf.py reads that one)"
        ),
    ),
    (
        r"(pytorch_adapter\.bin|adapter\.safetensors|head_config\.json)",
        (
            "this is an adapter of the adapters library (AdapterHub), which PEFT does not load: merge it there "
            "(merge_adapter), or train with PEFT"
        ),
    ),
    (
        r"(Copy of .*|.* \(\d+\)|.* - Copy)(\.\w+)?",
        (
            "a download or a file manager has renamed the files: give them back the names adapter_config.json and "
            "adapter_model.safetensors"
        ),
    ),
    (
        r"adapter_model(-\d+-of-\d+\..*|\.safetensors\.index\.json|\.bin\.index\.json)",
        "the weights are sharded, which PEFT does not load: save the adapter again with one weights file",
    ),
    (
        r"(model|pytorch_model)([-.].*)?\.(safetensors|bin|index\.json)",
        (
            "this looks like a full model, not an adapter (a merged one, perhaps): list the directory that "
            "save_pretrained of the PEFT model wrote"
        ),
    ),
    (
        r".*\.safetensors",
        (
            "a single .safetensors with a name of its own is how kohya's trainers and ComfyUI keep a LoRA; PEFT needs "
            "adapter_config.json beside adapter_model.safetensors: save it with save_pretrained"
        ),
    ),
)
"""Names, the first that fits counts, and the hint."""


def advice(names: Iterable[str]) -> str | None:
    """The hint for the first row that one of the names fits."""
    present = tuple(names)
    return next((hint for pattern, hint in _FOREIGN if any(re.fullmatch(pattern, name) for name in present)), None)
