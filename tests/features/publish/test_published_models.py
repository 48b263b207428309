"""Whole runs that publish real merges: PEFT's bits, in directories that transformers loads without a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import methods
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


# --- bases that bitsandbytes has stored ------------------------------------------------------------------------------

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
PACKINGS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nested": NF4 | {"bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "conv1d": NF4,
}
ADAPTERS_OF_PACKED = {"nf4": "every-projection", "nested": "rslora", "int8": "dora", "conv1d": "conv1d"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(scope="module")
def packed(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with stored bases, and their models in bfloat16. A second run asks for stored dtypes."""
    place = tmp_path_factory.mktemp("packed")
    adapters = []
    for name, options in PACKINGS.items():
        adapter = ADAPTERS_OF_PACKED[name]
        with methods.quiet():
            load_packed(shelf.base(VARIANTS[adapter].base), BitsAndBytesConfig(**options)).save_pretrained(place / name)
        base = {"model": str(place / name), "dtype": "bfloat16"}
        adapters.append({"name": name, "path": str(shelf.adapter(adapter)), "base": base})
    config: dict[str, Any] = {"version": 1, "adapters": adapters}
    for dtype, code in (("bfloat16", 0), ("preserve", 3)):
        (place / "gate.yml").write_text(json.dumps(config | {"publish": {"directory": "merged", "dtype": dtype}}))
        answer = merge_gate("run", "gate.yml", "--device", "cpu", "--cache", "cache", "-o", dtype, cwd=place)
        assert answer.code == code, answer.said
    return place


def load_packed(directory: Path, packing: BitsAndBytesConfig | None = None) -> Any:
    more = {} if packing is None else {"quantization_config": packing}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKINGS)
def test_a_stored_packed_base_is_published_plain(
    name: str, packed: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = ADAPTERS_OF_PACKED[name]
    with methods.quiet():
        plain = load_packed(packed / name).dequantize(torch.bfloat16)
        if name == "conv1d":  # transformers leaves it with transposed weights
            values, plain = plain.state_dict(), load_packed(shelf.base(VARIANTS[adapter].base))
            for key, tensor in plain.state_dict().items():
                tensor.copy_(values[key].T if key.endswith(TRANSPOSED) else values[key])
        merged = PeftModel.from_pretrained(plain, shelf.adapter(adapter)).merge_and_unload(safe_merge=True)
    expected = merged.state_dict()
    directory = packed / "merged" / f"{name}-bfloat16"
    model = loaded(directory, caplog)
    tensors = model.state_dict()
    assert tensors.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(bits(tensors[key]), bits(expected[key]))]
    assert {tensor.dtype for tensor in tensors_of(directory).values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())


@pytest.mark.slow
def test_a_packed_base_is_never_packed_again(packed: Path) -> None:
    adapters = json.loads((packed / "preserve" / "report.json").read_text())["adapters"]
    assert {(adapter["verdict"], adapter["cause"]) for adapter in adapters} == {("error", "not-published")}
    assert all("publish.dtype" in adapter["findings"][0]["hint"] for adapter in adapters)
    assert {path.name for path in (packed / "merged").iterdir()} == {f"{name}-bfloat16" for name in PACKINGS}


@pytest.mark.slow
def test_the_merge_that_is_judged_is_the_published_one(packed: Path) -> None:
    report = json.loads((packed / "bfloat16" / "report.json").read_text())
    assert {adapter["base"]["quantization"] for adapter in report["adapters"]} == {"bnb-4bit", "bnb-8bit"}
    assert {base["dtype"] for base in report["bases"]} == {"bfloat16"}
    assert not any(adapter["cached"] for adapter in report["adapters"])
