"""What the engine places on a card, seen from inside of a process that has one; test_simulation.py reads it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate.engine.adapter.inject import parameters_of
from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.base.loaded_base import Base, Source, load_base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.merge.private_copies import private_copies, targets_of
from merge_gate.engine.merge.proof import same_random_numbers
from merge_gate.engine.tensors.placement import random_states
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.records.terms import Quantization
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.gating import Bench


def on_card(bench: Bench, name: str, quantization: Quantization = Quantization.NONE) -> tuple[Base, AdapterFiles]:
    """A base in bfloat16 for the card, and an adapter in float32."""
    case = methods.find(name)
    directory = bench.base_directory(case.base, "bfloat16")
    files = preflight(str(bench.adapter(case)), allow_pickle=False)
    model_class = model_class_for(str(directory), files, stored_tensors(directory))
    source = Source(
        directory=str(directory), label=case.base, dtype="bfloat16", device="cuda:0", quantization=quantization
    )
    return load_base(source, model_class), files


def factors(bench: Bench, name: str) -> dict[str, list[str]]:
    """Devices and dtypes of all factors: while a layer is merged, and afterwards."""
    base, files = on_card(bench, name)
    loaded = load_adapter(base, files, read_weights(files))
    layers = [one for one in loaded.model.modules() if isinstance(one, BaseTunerLayer)]
    nested = {id(inner) for layer in layers for inner in layer.modules() if inner is not layer}

    def of(layer: Any) -> set[str]:
        tuners = (one for one in layer.modules() if isinstance(one, BaseTunerLayer))
        return {f"{factor.device} {factor.dtype}" for one in tuners for _, _, factor in parameters_of(one)}

    during, after = set[str](), set[str]()
    for layer in (one for one in layers if id(one) not in nested):
        with private_copies(layer, targets_of(layer, loaded.base_names), base):
            during |= of(layer)
        after |= of(layer)
    return {"during": sorted(during), "after": sorted(after)}


def quantized(bench: Bench) -> int:
    """How many layers of an 8-bit base were compared with the unmerged ones."""
    base, files = on_card(bench, "lora-linear", Quantization.BNB_8BIT)
    return merge_adapter(base, files, no_forward=NOT_RUN).forward.layers_compared


def full(bench: Bench) -> list[bool]:
    """If memory lacks while the card keeps weights: whether it keeps any, merges the adapter, and keeps none then."""
    base, files = on_card(bench, "lora-linear")
    merge_adapter(base, files, no_forward=NOT_RUN)
    kept, own = bool(base.weights._kept), Linear.merge

    def merge(layer: Any, *given: Any, **named: Any) -> None:
        if base.weights.keeps:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        own(layer, *given, **named)

    Linear.merge = merge
    merged = merge_adapter(base, files, no_forward=NOT_RUN)
    Linear.merge = own
    return [kept, merged.refusal is None, not base.weights.drop()]


def drawn() -> list[bool]:
    """Whether a draw on the card shows in the states, and whether it is taken back."""
    before = random_states()
    with same_random_numbers():
        torch.rand(3, device="cuda:0")
        shows = not all(map(torch.equal, before, random_states()))
    return [shows, all(map(torch.equal, before, random_states()))]


if __name__ == "__main__":
    made = Bench(Path(sys.argv[1]))
    with torch.no_grad(), methods.quiet():
        seen = {
            "linear": factors(made, "lora-linear"),
            "attention": factors(made, "lora-mha"),
            "experts": factors(made, "lora-experts"),
            "indices": factors(made, "supertuning-linear"),
            "quantized": quantized(made),
            "full": full(made),
            "drawn": drawn(),
        }
    sys.stdout.write(json.dumps(seen))
