"""Makes tests/features/verify/exports: an adapter, merged by exporters other than PEFT, each in its own environment.

    python tests/tools/make_exports.py inputs     in the project's environment: the base and the adapter
    python tests/tools/make_exports.py mergekit   in an environment with mergekit
    python tests/tools/make_exports.py mlx        in an environment with mlx-lm and mlx[cpu]

Each part writes one directory, and its versions and date into exports.json. Only `inputs` needs this project's torch.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXPORTS = Path(__file__).resolve().parents[1] / "features" / "verify" / "exports"
BASE, ADAPTER = EXPORTS / "base", EXPORTS / "adapter"
TOKENS = {f"t{number}": number for number in range(60)} | {"<s>": 60, "</s>": 61, "<end>": 62, "<unk>": 63}


def inputs() -> dict[str, str]:
    """A Llama with 2 layers in bfloat16, and a LoRA on all linear layers with factors in float32."""
    import torch  # noqa: PLC0415 - the other parts need none
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(28)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=60,
        eos_token_id=61,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(BASE)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<unk>"},
    }
    (BASE / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (BASE / "tokenizer_config.json").write_text(json.dumps(settings))
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16),
        LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(ADAPTER)
    edited = json.loads((ADAPTER / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (ADAPTER / "adapter_config.json").write_text(json.dumps(edited, indent=1))
    (ADAPTER / "README.md").unlink(missing_ok=True)
    return _versions("torch", "transformers", "peft")


def mergekit() -> dict[str, str]:
    """mergekit's own name for a base with an adapter is `BASE+ADAPTER`."""
    recipe = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{BASE}+{ADAPTER}"}]}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "recipe.yml")
        file.write_text(json.dumps(recipe))  # JSON is YAML
        program = Path(sys.executable).with_name("mergekit-yaml")
        out = ["--lora-merge-cache", str(Path(place, "cache")), "--no-write-model-card"]
        subprocess.run([program, file, EXPORTS / "mergekit", *out], check=True)
    return _versions("mergekit", "torch", "transformers", "peft")


def mlx() -> dict[str, str]:
    """mlx-lm has its own layout of adapters: both factors are transposed, and the scaling is a number."""
    import mlx.core as mx  # type: ignore[import-not-found] # noqa: PLC0415 - not of this project

    factors = mx.load(str(ADAPTER / "adapter_model.safetensors"))
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    renamed = {}
    for name, value in factors.items():
        path, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        renamed[f"{path}.{factor.lower()}"] = value.T
    keys = sorted({name.rpartition(".")[0].split(".", 3)[3] for name in renamed})
    settings = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0, "keys": keys}
    own = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    with tempfile.TemporaryDirectory() as place:
        mx.save_safetensors(str(Path(place, "adapters.safetensors")), renamed)
        Path(place, "adapter_config.json").write_text(json.dumps(own))
        words = ["--model", BASE, "--adapter-path", place, "--save-path", EXPORTS / "mlx"]
        subprocess.run([sys.executable, "-m", "mlx_lm", "fuse", *words], check=True)
    return _versions("mlx-lm", "mlx", "transformers")


def _versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def main(part: str) -> None:
    """Make one part, and note how."""
    EXPORTS.mkdir(parents=True, exist_ok=True)
    versions = {"inputs": inputs, "mergekit": mergekit, "mlx": mlx}[part]()
    notes = EXPORTS / "exports.json"
    known: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    known[part] = {"date": dt.datetime.now(dt.UTC).date().isoformat(), "versions": versions}
    notes.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
