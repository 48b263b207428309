"""What a base's files lack, and transformers makes up, or have beside it: when such a base is not merged into.

In: a loaded model, the names that its files lack, and a base's directory, of which the index alone is read. Out:
nothing, or an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from merge_gate.errors import EngineError
from merge_gate.text import counted, listing

_NUMBERED = re.compile(r"(.*-)(\d{1,5})(-of-)(\d{1,5})(\.\w+)")
"""As transformers numbers them, with five digits; a stranger's file name may count to any number."""


def shards_left_out(directory: Path) -> list[str]:
    """Files that the numbers of others imply (`model-00002-of-00003.safetensors`) and that the index does not name.

    None where transformers reads no index: it prefers a single file.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return []
    named = set(json.loads(index.read_bytes())["weight_map"].values())  # transformers has read it
    found = [match for match in map(_NUMBERED.fullmatch, named) if match is not None]
    first = 0 if any(int(match[2]) == 0 for match in found) else 1  # some count from zero
    implied = {
        f"{match[1]}{number:0{len(match[2])}}{match[3]}{match[4]}{match[5]}"
        for match in found
        for number in range(first, first + int(match[4]))
    }
    return sorted(implied - named)


def refuse_strangers(model: Any, made_up: AbstractSet[str], label: str) -> None:
    """Transformers makes up whatever the files lack, and adds an adapter that lies beside them.

    Raises:
        EngineError: no tensor of the class is in the files, or an adapter lies in the base's directory.
    """
    if made_up and {name for name, _ in model.named_parameters()} <= made_up:
        raise EngineError(
            f"base {label} holds none of the tensors of {type(model).__name__}: transformers would make up all of them",
            hint="name the base that the adapter was trained on: this one has another class (text and images, where "
            "the adapter is for text alone), or other names in its files",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EngineError(
            f"base {label} has an adapter_config.json beside its weights: transformers loads that adapter with it",
            hint="take adapter_config.json out of the base's directory, or name the plain base",
        )


def refuse_lost_shards(model: Any, directory: str, missing: AbstractSet[str], label: str) -> None:
    """Transformers makes up what the index does not list, and fails only where a file that it lists is not there.

    Raises:
        EngineError: the index lists nothing of a numbered shard, and the model's body has tensors that are made up.
    """
    prefix = f"{model.base_model_prefix}." if hasattr(model, getattr(model, "base_model_prefix", None) or "") else ""
    made_up = sorted(name for name in missing if name.startswith(prefix))
    lost = shards_left_out(Path(directory)) if made_up else []
    if lost:
        raise EngineError(
            f"base {label} is incomplete: its index lists nothing of {listing(lost, 3)}, and transformers would make "
            f"up {counted(len(made_up), 'tensor')}: {listing(made_up, 3)}",
            hint="fetch the base again, with its index and all of its shards",
            check="base-incomplete",
            tensor=made_up[0],
        )


def refuse_unknown_format(directory: str, label: str) -> None:
    """Raise an EngineError if config.json declares a quantization that this release of transformers cannot load."""
    try:
        declared = json.loads((Path(directory) / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # the load says what is wrong with it
    if not isinstance(declared, dict) or declared.get("load_in_8bit") or declared.get("load_in_4bit"):
        return  # transformers takes it for bitsandbytes, whatever quant_method is
    method = declared.get("quant_method")
    if isinstance(method, str) and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise EngineError(
            f"base {label}: its config.json declares quantization by {method[:40]!r}, which transformers "
            f"{transformers.__version__} cannot load",
            hint="gate and merge on the base without quantization, on which the adapter was trained",
            check="base-format",
        )
