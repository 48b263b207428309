"""Published models against PEFT's own merges on the same device, in a process of its own.

In: a configuration, the directory of its published models, and a device. Out: JSON with the tensors of each adapter
whose bits are not PEFT's. A tensor of an adapter with indices may also have the bits of PEFT's merge on the CPU.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from tests.support import methods
from tests.support.card.compare import tensors_in


def main(config: str, published: str, device: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    differing = {}
    for entry in json.loads(Path(config).read_text())["adapters"]:
        model = Path(published, entry["name"])
        if "path" in entry and model.is_dir():
            differing[entry["name"]] = [*_differing(entry, tensors_in(model), device)]
    json.dump(differing, sys.stdout)


def _differing(entry: dict[str, Any], published: dict[str, Tensor], device: str) -> list[str]:
    merged, has_indices = _merged(entry, device)
    names = [name for name in published.keys() | merged.keys() if not _is_same(published, merged, name)]
    if names and has_indices:
        on_cpu, _ = _merged(entry, "cpu")
        names = [name for name in names if not _is_same(published, on_cpu, name)]
    return sorted(names)


def _is_same(published: dict[str, Tensor], merged: dict[str, Tensor], name: str) -> bool:
    return name in published and name in merged and methods.same_tensor(published[name], merged[name])


def _merged(entry: dict[str, Any], device: str) -> tuple[dict[str, Tensor], bool]:
    """What a user saves after a merge by PEFT, and whether the adapter has indices."""
    base = Path(entry["base"]["model"])
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    with methods.quiet():
        model = getattr(transformers, architecture).from_pretrained(base, dtype="auto").eval().to(device)
        adapted = PeftModel.from_pretrained(model, entry["path"], torch_device=device)
        layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        has_indices = any(_holds_indices(layer) for layer in layers)
        with tempfile.TemporaryDirectory() as directory:
            adapted.merge_and_unload(safe_merge=True).save_pretrained(directory)
            return tensors_in(Path(directory)), has_indices


def _holds_indices(layer: torch.nn.Module) -> bool:
    held = (value for module in layer.modules() for value in vars(module).values() if isinstance(value, dict))
    tensors = (tensor for values in held for tensor in values.values() if isinstance(tensor, Tensor))
    return any(tensor.dtype in {torch.int32, torch.int64} for tensor in tensors)


if __name__ == "__main__":
    main(*sys.argv[1:])
