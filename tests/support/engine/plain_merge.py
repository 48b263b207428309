"""What plain PEFT makes of an adapter: the merged tensors, and what the merged model computes."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.support import methods
from tests.support.models import VARIANTS, load_for_training, read_config

Tensors = dict[str, torch.Tensor]


def peft_merge(base: Path, adapter: Path, dtype: str, *, safe_merge: bool = True) -> tuple[Tensors, Tensors]:
    """The base's and the merged model's tensors, from a fresh load of both."""
    name = adapter.name
    settings: dict[str, Any] = {"num_labels": 6} if name == "six-labels" else {}
    if dtype != "auto":
        settings["dtype"] = getattr(torch, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_for_training(base, read_config(adapter).get("task_type"), **settings)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if name.startswith("resized"):  # the new rows are random: by chance they could be those of the adapter
            model.resize_token_embeddings(VARIANTS[name].save["rows"], mean_resizing=False)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe_merge)
    return before, merged.state_dict()


def merge_error(model: Any, inputs: Mapping[str, torch.Tensor]) -> float:
    """How far the outputs of the merged model are from those of base and adapter, as a share of these."""
    unmerged = methods.compute(model.eval(), inputs)
    with methods.quiet():
        merged = methods.compute(model.merge_and_unload(safe_merge=True).eval(), inputs)
    return float((merged - unmerged).norm() / unmerged.norm())
