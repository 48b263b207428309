"""The README's workflow on a runner that is smaller than the base: it is streamed, and the report is as documented.

The base has the shape of an 8 B model with fewer layers. Its weights are three times the runner's disk.
"""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.e2e.limits import can_limit_memory, memory_limit, small_disk
from tests.support.hub import LoopbackHub
from tests.support.schemas import report_schema

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not can_limit_memory(), reason="no cgroup with a memory limit can be made here"),
]

MEMORY_BYTES, DISK_BYTES = 2 << 30, 100 << 20
SIZES = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 7, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32_000, "tie_word_embeddings": False,
}  # fmt: skip
BASE, TOKEN = "acme/llama-8b", "hf_loopback"
CONFIG = """\
version: 1
base: {model: acme/llama-8b, dtype: bfloat16}
adapters:
  - ./adapters/good
  - ./adapters/nan
"""


def shapes() -> dict[str, torch.Size]:
    """The tensors of the base."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def base_files() -> dict[str, bytes]:
    """The base in two shards; its values repeat."""
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"} | SIZES
    listed = list(shapes().items())
    pool = (torch.randn(max(math.prod(shape) for _, shape in listed)) * 0.02).bfloat16()
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
    for name, shape in shapes().items():
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
    return directory


def test_a_base_that_does_not_fit_on_the_runner_is_judged(play: Any, repository: Path, tmp_path: Path) -> None:
    files = base_files()
    weight_bytes = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    assert weight_bytes > 2 * DISK_BYTES
    with (
        LoopbackHub() as hub,
        small_disk(tmp_path / "runner", DISK_BYTES) as disk,
        memory_limit(MEMORY_BYTES) as within,
    ):
        commit = hub.add_repo(BASE, files, private=True, token=TOKEN)
        environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "TMPDIR": str(disk), "DOCKER_HOST": "unix:///nowhere"}
        run = play(repository, "quickstart.yml", disk, event="pull_request", before=within, environ=environ)
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
    assert coverage["parameters_checked"] == sum(map(math.prod, shapes().values())) == coverage["parameters_total"]
    (base,) = report["bases"]
    assert (base["revision"], base["dtype"]) == (commit, "bfloat16")
    assert base["sha256"]
    assert "they are streamed" in run.text
    assert sum(stored) < 1 << 20, "headers, and no weights"
    (name,) = run.artifacts
    assert run.artifacts[name]["summary.md"].decode() in run.commands("summary")[0]["content"]
    assert {one.token for one in hub.requests if one.path.startswith("/cdn/")} == {None}
