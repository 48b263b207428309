"""Baseline (b), the careful user's script: load the base once, merge each adapter into a deep copy of it.

In: a base directory and adapter directories. Out: exit code 1 if a merged parameter is not finite.
"""

from __future__ import annotations

import copy
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapters: list[str]) -> int:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for adapter in adapters:
        merged = PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload(safe_merge=True)
        if not all(torch.isfinite(parameter).all() for parameter in merged.parameters()):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
