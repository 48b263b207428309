"""The table of what is measured against the script: one row per kind of work, and every method of PEFT.

In: nothing. Out: `ROWS` and `METHODS`, which run.py measures and tables.py prints; `save_method` writes an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inputs import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `beside` are further runs of the gate that `wanted` compares with."""

    title: str
    job: Job
    wanted: str
    beside: Mapping[str, Job] = field(default_factory=dict)


ROWS: dict[str, Row] = {
    "lora-8": Row(title="8 LoRA", job=Job(count=8), wanted="8 times faster"),
    "dora-2": Row(title="2 DoRA", job=Job(count=2, kind="dora"), wanted="3 times faster"),
    "dora-8": Row(title="8 DoRA", job=Job(count=8, kind="dora"), wanted="5 times faster"),
    "nf4-2": Row(title="2 LoRA on bnb-4bit (nf4)", job=Job(count=2, quantization="bnb-4bit"), wanted="twice as fast"),
    "nf4-8": Row(title="8 LoRA on bnb-4bit (nf4)", job=Job(count=8, quantization="bnb-4bit"), wanted="4 times faster"),
    "int8-2": Row(title="2 LoRA on bnb-8bit", job=Job(count=2, quantization="bnb-8bit"), wanted="twice as fast"),
    "int8-8": Row(title="8 LoRA on bnb-8bit", job=Job(count=8, quantization="bnb-8bit"), wanted="4 times faster"),
    "ties-2": Row(title="`ties` of 2 LoRA", job=Job(count=2, combine="ties"), wanted="faster"),
    "dtypes": Row(
        title="1 LoRA, bfloat16 and float16",
        job=Job(dtypes=("bfloat16", "float16")),
        wanted="the second dtype costs at most 1.5 adapters",
        beside={"one": Job(), "eight": Job(count=8)},
    ),
    "head": Row(
        title="1 LoRA and a trained `lm_head`",
        job=Job(kind="head"),
        wanted="at most twice plain LoRA",
        beside={"one": Job()},
    ),
}

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16}),
    "rslora": ("LoraConfig", {"r": 16, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "pissa": ("LoraConfig", {"r": 16, "init_lora_weights": "pissa"}),
    "adalora": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 10}),
    "adamss": ("AdamssConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "deft": ("DeftConfig", {}),
    "delora": ("DeloraConfig", {"r": 16}),
    "fourierft": ("FourierFTConfig", {}),
    "frod": ("FrodConfig", {"progressbar": False}),
    "glora": ("GloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 16}),
    "hira": ("HiraConfig", {"r": 16}),
    "hra": ("HRAConfig", {"r": 16}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln-tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "loha": ("LoHaConfig", {"r": 16}),
    "lokr": ("LoKrConfig", {"r": 16}),
    "miss": ("MissConfig", {"r": 16}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "osf": ("OSFConfig", {"effective_rank": 16}),
    "peanut": ("PeanutConfig", {"r": 16}),
    "psoft": ("PsoftConfig", {"r": 16}),
    "pvera": ("PveraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "road": ("RoadConfig", {"group_size": 32}),
    "shira": ("ShiraConfig", {"r": 16, "random_seed": 3}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "trainable-tokens": ("TrainableTokensConfig", {"token_indices": [1, 5], "target_modules": ["embed_tokens"]}),
    "unilora": ("UniLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"vector_length": 64}),
    "vera": ("VeraConfig", {}),
    "waveft": ("WaveFTConfig", {}),
}
"""Every method whose merge goes into weights: PEFT's config class, and what its defaults lack. BEFT needs biases, which
the base does not have."""


def save_method(method: str, base: Path, directory: Path) -> Path:
    """An adapter of the method on all linear layers, made and saved by PEFT, every tensor moved off its first value."""
    if not (directory / "adapter_config.json").exists():
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds, once per adapter ever made

        from tests.support import methods  # noqa: PLC0415

        kind, settings = METHODS[method]
        case = methods.make_case(method, "", kind, **{"target_modules": LAYERS, **settings})
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        methods.save_adapter(case, model, directory, base_directory=base)
    return directory
