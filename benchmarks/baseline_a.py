"""Baseline (a), what users write: load, merge and check anew for every adapter.

In: a base directory, adapter directories, and what else the work asks for: a quantisation, dtypes, a way to combine
the adapters into one. Out: exit code 1 if a merged parameter is not finite.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

QUANTIZATIONS = {
    "bnb-8bit": {"load_in_8bit": True},
    "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


DEVICE = os.environ.get("MERGE_GATE_DEVICE", "cpu")


def load(base: str, dtype: str, quantization: str):
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(DEVICE)
    config = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map={"": DEVICE})


def adapt(model, adapters: list[str], combine: str | None) -> PeftModel:
    """The one adapter, or all of them combined with equal weights."""
    peft_model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0", torch_device=DEVICE)
    if combine is not None:
        names = [str(number) for number in range(len(adapters))]
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            peft_model.load_adapter(adapter, adapter_name=name, torch_device=DEVICE)
        weights = [1 / len(names)] * len(names)
        peft_model.add_weighted_adapter(names, weights, "combined", combination_type=combine, density=0.5)
        peft_model.set_adapter("combined")
    return peft_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--combine", metavar="METHOD")
    arguments = parser.parse_args()
    works = [arguments.adapters] if arguments.combine else [[adapter] for adapter in arguments.adapters]
    for adapters in works:
        for dtype in arguments.dtype:
            model = load(arguments.base, dtype, arguments.quantization)
            merged = adapt(model, adapters, arguments.combine).merge_and_unload(safe_merge=True)
            if not all(torch.isfinite(parameter).all() for parameter in merged.parameters()):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
