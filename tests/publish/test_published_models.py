"""A whole run that publishes real merges: PEFT's bits, in directories that transformers loads without a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.command import merge_gate
from tests.support.engine.plain_merge import peft_merge
from tests.support.models import VARIANTS, Shelf

CAUSAL = [
    "rslora",
    "dora-all-linear",
    "bias-all",
    "modules-to-save",
    "token-rows",
    "resized-vocabulary",
    "sharded-base",
    "bfloat16-base",
    "tied-tokens",
    "conv1d",
    "fused-experts",
]
MTP = "mtp.layers.0.weight"


@pytest.fixture(scope="module")
def published(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models that one run has published, one of them also cast, on a base with an MTP head."""
    place = tmp_path_factory.mktemp("published")
    base = place / "base"
    base.mkdir()
    for path in shelf.base("llama-sharded").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    index = json.loads((base / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    save_file(load_file(base / last) | {MTP: torch.ones(8, 8)}, base / last, metadata={"format": "pt"})
    index["weight_map"][MTP] = last
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapters: list[dict[str, Any]] = [
        {"name": name, "path": str(shelf.adapter(name)), "base": str(base_of(name, shelf, place))} for name in CAUSAL
    ]
    config = {"version": 1, "adapters": adapters, "publish": "merged"}
    (place / "gate.yml").write_text(json.dumps(config))
    cast = {"directory": "merged", "dtype": "bfloat16", "max-shard-size": "20KB"}
    of_cast = adapters[CAUSAL.index("sharded-base")]
    of_cast = of_cast | {"base": {"model": of_cast["base"], "dtype": "bfloat16"}}
    (place / "cast.yml").write_text(json.dumps(config | {"adapters": [of_cast], "publish": cast}))
    for name in ("gate.yml", "cast.yml"):
        answer = merge_gate("run", name, "--device", "cpu", "-o", f"report-{name}", cwd=place)
        assert answer.code == 0, answer.said
    return place


def base_of(name: str, shelf: Shelf, place: Path) -> Path:
    return place / "base" if VARIANTS[name].base == "llama-sharded" else shelf.base(VARIANTS[name].base)


def loaded(directory: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """The model, if transformers has nothing to say about the directory."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if MTP not in record.getMessage()]
    assert told == [], directory.name
    return model.eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_published_bits_are_pefts(
    name: str, published: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = peft_merge(base_of(name, shelf, published), shelf.adapter(name), "auto")
    model = loaded(published / "merged" / name, caplog)
    tensors = model.state_dict()
    assert tensors.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(tensors[key].view(torch.uint8), bits(expected[key]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_it_generates_the_tokens_of_pefts_merge(
    published: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    name = "sharded-base"
    _, expected = peft_merge(base_of(name, shelf, published), shelf.adapter(name), "auto")
    model = loaded(published / "merged" / name, caplog)
    prompt = torch.arange(1, 9).reshape(1, -1)
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    own = model.generate(prompt, attention_mask=torch.ones_like(prompt), **words)
    model.load_state_dict(expected)
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **words), own)


def test_a_tensor_that_transformers_does_not_load_is_kept(published: Path) -> None:
    base, model = (tensors_of(published / part) for part in ("base", "merged/sharded-base"))
    assert model.keys() == base.keys()
    assert torch.equal(model[MTP], base[MTP])


def test_a_cast_changes_every_floating_tensor(published: Path, shelf: Shelf) -> None:
    name = "sharded-base"
    _, expected = peft_merge(base_of(name, shelf, published), shelf.adapter(name), "bfloat16")
    directory = published / "merged" / f"{name}-bfloat16"
    tensors = tensors_of(directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert MTP in tensors
    assert not [key for key in expected if not torch.equal(tensors[key], expected[key])]
    assert json.loads((directory / "config.json").read_text()).get("dtype") == "bfloat16"
    assert len([*directory.glob("*.safetensors")]) > 1


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
