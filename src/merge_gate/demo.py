"""Writes the demo: a tiny base, good and broken adapters, and the config that gates them.

It writes into a directory that is new, empty, or an earlier demo, and never overwrites other files. torch is imported
on use. The files are written without transformers and PEFT, whose imports would take most of the demo's time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate._internal.whole_file import whole_file
from merge_gate.records.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from merge_gate.records.report import Report

    Tensors = dict[str, torch.Tensor]

MARKER = ".merge-gate-demo"
MARKER_TEXT = b"Made by `merge-gate demo`. If it runs again, it writes its files again. Changed ones become NAME.old.\n"
CONFIG_NAME = "merge-gate.yml"
CONFIG_TEXT = b"""\
# A release gate: one base, and the adapters to release.
version: 1
base:
  model: ./base
  dtype: float16
adapters:
  - ./adapters/good
  - ./adapters/nan                # one NaN in one lora_B: the whole model would return NaN
  - path: ./adapters/overflow     # finite, and so is the base; their sum is too large for float16
    base: {model: ./base, dtype: [bfloat16, float16]}
  - ./adapters/lost-keys          # saved from a compiled model: no key matches, and PEFT merges nothing and only warns
  - ./adapters/lfs-pointer        # a checkout without `git lfs pull`: 131 bytes instead of weights
  - ./adapters/no-effect          # never trained: lora_B is still zero
"""

EXPECTED: Mapping[tuple[str, str], tuple[Verdict, str | None]] = {
    ("good", "float16"): (Verdict.PASSED, None),
    ("nan", "float16"): (Verdict.FAILED, "adapter-nonfinite"),
    ("overflow", "bfloat16"): (Verdict.PASSED, None),
    ("overflow", "float16"): (Verdict.FAILED, "merged-nonfinite"),
    ("lost-keys", "float16"): (Verdict.FAILED, "keys-missing"),
    ("lfs-pointer", "float16"): (Verdict.FAILED, "file-lfs-pointer"),
    ("no-effect", "float16"): (Verdict.FAILED, "no-effect"),
}
"""The expected results: (adapter, dtype) → (verdict, cause)."""

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, RANK = 256, 64, 128, 2, 4, 4
TARGETS = ("q_proj", "v_proj")
OVERFLOWING = f"model.layers.{LAYERS - 1}.self_attn.v_proj.weight"
QUIETING = f"model.layers.{LAYERS - 1}.input_layernorm.weight"
OUTLIER = 30_000.0
"""Less than half of 65,504, the largest value that float16 holds."""
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\nsize 151123\n"
)


def misjudged(report: Report) -> list[str]:
    """The entries of the demo's report that are missing, unexpected, or not as in `EXPECTED`."""
    got = {(entry.name, entry.base.dtype): (entry.verdict, entry.cause) for entry in report.adapters}
    return sorted(f"{key[0]} ({key[1]})" for key in {*got, *EXPECTED} if got.get(key) != EXPECTED.get(key))


def make_demo(directory: str) -> str:
    """Write the demo into `directory`, and return the path of its config file.

    Raises `UsageError` if the directory holds other files than an earlier demo, or cannot be written.
    """
    root = Path(directory)
    try:
        _claim(root)
        for name, content in _demo_files().items():
            _write(root, name, content)
    except OSError as error:
        message = f"the demo cannot be written to {directory}: {error.strerror or error}"
        raise UsageError(message, hint="name a new directory in a place that you can write to") from error
    return str(root / CONFIG_NAME)


def _claim(root: Path) -> None:
    """Check that the directory is new, empty, or an earlier demo, and mark it for the next demo."""
    hint = "name a new or an empty directory"
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UsageError(f"{root} is a file or a link, expected a directory for the demo alone", hint=hint)
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise UsageError(f"{root} holds other files, expected a directory for the demo alone", hint=hint)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / MARKER).exists():
        _write(root, MARKER, MARKER_TEXT)


def _write(root: Path, name: str, content: bytes) -> None:
    """Write a file. A link below the root is refused: it could lead out of the demo."""
    target = root / name
    links = [path for path in (target, *target.parents) if path != root and root in path.parents and path.is_symlink()]
    if links:
        raise UsageError(f"{links[0]} is a link that the demo did not make", hint="remove it, or name a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target) and not _holds(target, content):
        target.rename(_unused(target))
    with whole_file(target) as file:
        file.write(content)


def _holds(target: Path, content: bytes) -> bool:
    return target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content


def _unused(target: Path) -> Path:
    """A new name for a file that was changed after the demo made it."""
    names = (target.with_name(f"{target.name}.old{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in names if not os.path.lexists(path))


def _demo_files() -> dict[str, bytes]:
    from safetensors.torch import save  # noqa: PLC0415 - imports torch

    files = {
        CONFIG_NAME: CONFIG_TEXT,
        "base/config.json": _as_json(BASE_CONFIG),
        "base/model.safetensors": save(_base_tensors(), {"format": "pt"}),
    }
    for name, tensors in _adapters().items():
        files[f"adapters/{name}/adapter_config.json"] = _as_json(ADAPTER_CONFIG)
        files[f"adapters/{name}/adapter_model.safetensors"] = save(tensors, {"format": "pt"})
    files["adapters/lfs-pointer/adapter_config.json"] = _as_json(ADAPTER_CONFIG)
    files["adapters/lfs-pointer/adapter_model.safetensors"] = LFS_POINTER
    return files


def _as_json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


BASE_CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ADAPTER_CONFIG: Mapping[str, object] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "./base",
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": list(TARGETS),
    "inference_mode": True,
}


def _base_tensors() -> Tensors:
    """A Llama of 0.1 M parameters. Its weights have the spread of a trained model, and one row of outliers.

    The norm before that row is so small that the model's activations are far from the limit of float16.
    """
    import torch  # noqa: PLC0415 - takes a second, which `merge-gate --help` does not need

    generator = torch.Generator().manual_seed(0)
    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    norms = ["model.norm.weight"]
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.{name}.weight": square for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        shapes |= {f"{layer}.mlp.{name}.weight": up for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = down
        norms += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    weights = {name: torch.randn(shape, generator=generator).mul(0.02).half() for name, shape in shapes.items()}
    weights[OVERFLOWING][0] = OUTLIER
    ones = {name: torch.ones(HIDDEN, dtype=torch.float16) for name in norms}
    return weights | ones | {QUIETING: ones[QUIETING] * 1e-3}


def _adapters() -> dict[str, Tensors]:
    """The adapters with weights, by name. Each one except the first is the good adapter with a single change."""
    import torch  # noqa: PLC0415 - see above

    good = _good_adapter()
    last_b = [name for name in good if "lora_B" in name][-1]
    nan, overflow = good[last_b].clone(), good[last_b].clone()
    nan[-1, -1] = torch.nan
    overflow[0] = 1e5  # times lora_A (0.1) and the scaling (2): as large as the outliers, and their sum exceeds 65,504
    return {
        "good": good,
        "nan": good | {last_b: nan},
        "overflow": good | {last_b: overflow},
        "lost-keys": {
            name.replace(ADAPTER_PREFIX, f"{ADAPTER_PREFIX}_orig_mod."): value for name, value in good.items()
        },
        "no-effect": {name: value * 0 if "lora_B" in name else value for name, value in good.items()},
    }


def _good_adapter() -> Tensors:
    import torch  # noqa: PLC0415 - see above

    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for target in TARGETS:
            prefix = f"{ADAPTER_PREFIX}model.layers.{layer}.self_attn.{target}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=generator) * 0.01
    return tensors
