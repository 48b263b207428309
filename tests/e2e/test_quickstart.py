"""The README's workflow on a runner that is smaller than the base: it is streamed, and the report is as documented.

The base has the shape of an 8 B model with fewer layers. Its weights are three times the runner's disk.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
from safetensors.torch import save, save_file

from tests.support.e2e.act import make_repository, run_act
from tests.support.e2e.limits import can_limit_memory, memory_limit, small_disk
from tests.support.hub import LoopbackHub
from tests.support.schemas import report_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not can_limit_memory(), reason="no cgroup with a memory limit can be made here"),
]

MEMORY_BYTES, DISK_BYTES = 2 << 30, 100 << 20
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS, KEY_HEADS = 1024, 3584, 7, 32_000, 32, 8
BASE, TOKEN = "acme/llama-8b", "hf_loopback"
CONFIG = """\
version: 1
base: {model: acme/llama-8b, dtype: bfloat16}
adapters:
  - ./adapters/good
  - ./adapters/nan
"""


def shapes() -> Iterator[tuple[str, tuple[int, int] | tuple[int]]]:
    """The tensors of the base."""
    keys = HIDDEN // HEADS * KEY_HEADS
    linear = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in linear.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def base_files() -> dict[str, bytes]:
    """The base in two shards; its values repeat."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    pool = (torch.randn(max(map(math.prod, dict(shapes()).values())), generator=torch.Generator()) * 0.02).bfloat16()
    listed = list(shapes())
    cut = len(listed) // 2
    files: dict[str, bytes] = {"config.json": json.dumps(settings).encode()}
    index: dict[str, str] = {}
    for number, part in enumerate((listed[:cut], listed[cut:]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        files[name] = save({tensor: pool[: math.prod(shape)].reshape(shape).clone() for tensor, shape in part})
        index |= dict.fromkeys((tensor for tensor, _ in part), name)
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


def make_adapter(directory: Path, *, is_broken: bool) -> None:
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "r": 8, "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    numbers = torch.Generator().manual_seed(int(is_broken))
    tensors = {}
    for name, shape in shapes():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(8, shape[-1], generator=numbers) * 0.05
            tensors[f"{place}.lora_B.weight"] = torch.randn(shape[0], 8, generator=numbers) * 0.05
    if is_broken:
        tensors[max(tensors)][0, 0] = math.nan
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "repository"
    for name in ("good", "nan"):
        make_adapter(directory / "adapters" / name, is_broken=name == "nan")
    (directory / "merge-gate.yml").write_text(CONFIG, encoding="utf-8")
    return make_repository(directory, "quickstart.yml")


def test_a_base_that_does_not_fit_on_the_runner_is_judged(
    tool: Any, repository: Path, released: Path, installed: Path, tmp_path: Path
) -> None:
    files = base_files()
    weight_bytes = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    assert weight_bytes > 2 * DISK_BYTES
    with (
        LoopbackHub() as hub,
        small_disk(tmp_path / "runner", DISK_BYTES) as disk,
        memory_limit(MEMORY_BYTES) as within,
    ):
        commit = hub.add_repo(BASE, files, private=True, token=TOKEN)
        run = run_act(
            tool("act"), repository, "quickstart.yml", disk, python=installed, consumer_of=released,
            event="pull_request", before=within,
            environ={
                "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "TMPDIR": str(disk), "DOCKER_HOST": "unix:///nowhere",
            },
        )  # fmt: skip
        stored = [path.stat().st_blocks * 512 for path in disk.rglob("*.safetensors") if "adapter" not in path.name]
    assert run.code == 1, run.text
    assert (run.outputs("seen")["RESULT"], run.outputs("seen")["FAILED"]) == ("fail", '["nan"]')
    report = run.report()
    jsonschema.validate(report, report_schema())
    assert {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]} == {
        "good": ("passed", None),
        "nan": ("failed", "adapter-nonfinite"),
    }
    coverage = report["adapters"][0]["coverage"]
    assert (
        coverage["parameters_checked"] == coverage["parameters_total"] == sum(math.prod(shape) for _, shape in shapes())
    )
    (base,) = report["bases"]
    assert (base["revision"], base["dtype"]) == (commit, "bfloat16")
    assert base["sha256"]
    assert "they are streamed" in run.text
    assert sum(stored) < 1 << 20, "headers, and no weights"
    (name,) = run.artifacts
    assert run.artifacts[name]["summary.md"].decode() in run.commands("summary")[0]["content"]
    assert {one.token for one in hub.requests if one.path.startswith("/cdn/")} == {None}
