"""Whole runs that publish real merges: PEFT's bits, in directories that transformers loads without a warning.

PEFT unties an embedding and a head, and classifiers bring a head: what it saves is published, and `verify` accepts it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.command import merge_gate
from tests.support.engine.plain_merge import peft_merge
from tests.support.engine.published import configured, dequantized_merge, different, stored
from tests.support.models import VARIANTS, Shelf, load_for_training, read_tensors, save_adapter
from tests.support.verify.verification import Verifier

CAUSAL = [
    "rslora", "dora-all-linear", "bias-all", "modules-to-save", "token-rows", "resized-vocabulary", "sharded-base",
    "bfloat16-base", "tied-tokens", "conv1d", "fused-experts",
]  # fmt: skip


@pytest.fixture(scope="module")
def published(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that one run has published, and one that another run has cast."""
    place = tmp_path_factory.mktemp("published")
    adapters: list[dict[str, Any]] = [
        {"name": name, "path": str(shelf.adapter(name)), "base": str(shelf.base(VARIANTS[name].base))}
        for name in CAUSAL
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
    assert [record.getMessage() for record in caplog.records] == [], directory.name
    return model.eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_published_bits_are_pefts(
    name: str, published: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = peft_merge(shelf.base(VARIANTS[name].base), shelf.adapter(name), "auto")
    assert different(loaded(published / "merged" / name, caplog).state_dict(), expected) == []


def test_a_cast_changes_every_floating_tensor(published: Path, shelf: Shelf) -> None:
    name = "sharded-base"
    _, expected = peft_merge(shelf.base(VARIANTS[name].base), shelf.adapter(name), "bfloat16")
    directory = published / "merged" / f"{name}-bfloat16"
    tensors = stored(directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not [key for key in expected if not torch.equal(tensors[key], expected[key])]
    assert json.loads((directory / "config.json").read_text()).get("dtype") == "bfloat16"
    assert len([*directory.glob("*.safetensors")]) > 1


# --- tensors that the base's files lack ------------------------------------------------------------------------------

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "head": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "both": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more-rows": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "classifier": ("llama-bfloat16", {"task_type": "SEQ_CLS"}),
}
LABELS = 3
ROWS = 70


@pytest.fixture(scope="module")
def added(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapters/`, what the gate publishes of them in `merged/`, and what PEFT saves of them in `saved/`."""
    place = tmp_path_factory.mktemp("added")
    adapters = []
    for name, (key, lora) in ADAPTERS.items():
        base, adapter, task = shelf.base(key), place / "adapters" / name, lora.get("task_type", "CAUSAL_LM")
        settings: dict[str, Any] = {"num_labels": LABELS} if task == "SEQ_CLS" else {}
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": task} | lora)
        rows = ROWS if name == "more-rows" else None
        save_adapter(base, adapter, config, rows=rows, **settings)
        with methods.quiet():
            own: Any = load_for_training(base, task, **settings)
            own.resize_token_embeddings(rows, mean_resizing=False)
            model: Any = PeftModel.from_pretrained(own, adapter)
            model.merge_and_unload(safe_merge=True).save_pretrained(place / "saved" / name)
        adapters.append({"name": name, "path": str(adapter), "base": str(base)})
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": adapters, "publish": "merged"}))
    answer = merge_gate("run", "gate.yml", "--device", "cpu", cwd=place)
    assert answer.code == 0, answer.said
    return place


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_published_is_what_peft_saves(name: str, added: Path) -> None:
    """The files of a classifier's base have a head, too, which a classifier does not load."""
    published, saved = (read_tensors(added / part / name, "model.safetensors") for part in ("merged", "saved"))
    assert published.keys() - saved.keys() == ({"lm_head.weight"} if name == "classifier" else set())
    assert all(torch.equal(published[key], one) for key, one in saved.items())
    own, expected = (json.loads((added / part / name / "config.json").read_text()) for part in ("merged", "saved"))
    assert own == expected
    assert own["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ADAPTERS)
def test_both_are_the_merge(name: str, added: Path, shelf: Shelf) -> None:
    """What the class of an adapter's task lacks is no loss."""
    verifier = Verifier()
    for part in ("merged", "saved"):
        report = verifier.report(added / part / name, shelf.base(ADAPTERS[name][0]), added / "adapters" / name)
        assert report.verdict is Verdict.PASSED, (part, report.findings)
        assert "exact" in {finding.check for finding in report.findings}


@pytest.mark.parametrize(("name", "other"), [("embedding", "head"), ("head", "embedding"), ("both", "head")])
def test_another_untied_merge_fails(name: str, other: str, added: Path, shelf: Shelf) -> None:
    report = Verifier().report(added / "saved" / other, shelf.base("llama-tied"), added / "adapters" / name)
    assert report.verdict is Verdict.FAILED


def test_two_tensors_that_config_json_ties_are_an_error(added: Path, shelf: Shelf, tmp_path: Path) -> None:
    """A program that follows config.json loads one of them for both."""
    merged = Path(shutil.copytree(added / "saved" / "both", tmp_path / "merged"))
    configured(merged, tie_word_embeddings=True)
    report = Verifier().report(merged, shelf.base("llama-tied"), added / "adapters" / "both")
    assert (report.verdict, report.cause) == (Verdict.FAILED, "tied")


def test_notes_name_rows_of_an_adapter_and_an_unused_head(added: Path) -> None:
    report = json.loads((added / "merge-gate-report" / "report.json").read_text())
    hints = {one["name"]: [note["hint"] for note in one["findings"]] for one in report["adapters"]}
    (hint,) = hints.pop("more-rows")
    assert f"resize the base to {ROWS} rows" in hint
    assert not any(hints.values())
    notes = [one["message"] for base in report["bases"] for one in base["findings"]]
    assert any("lm_head.weight" in note and "LlamaForSequenceClassification" in note for note in notes)


# --- bases that bitsandbytes has stored ------------------------------------------------------------------------------

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
PACKINGS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nested": NF4 | {"bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "conv1d": NF4,
}
ADAPTERS_OF_PACKED = {"nf4": "every-projection", "nested": "rslora", "int8": "dora", "conv1d": "conv1d"}


@pytest.fixture(scope="module")
def packed(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with stored bases, and their models in bfloat16."""
    place = tmp_path_factory.mktemp("packed")
    adapters = []
    for name, options in PACKINGS.items():
        adapter = ADAPTERS_OF_PACKED[name]
        with methods.quiet():
            load_packed(shelf.base(VARIANTS[adapter].base), BitsAndBytesConfig(**options)).save_pretrained(place / name)
        base = {"model": str(place / name), "dtype": "bfloat16"}
        adapters.append({"name": name, "path": str(shelf.adapter(adapter)), "base": base})
    publish = {"directory": "merged", "dtype": "bfloat16"}
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": adapters, "publish": publish}))
    answer = merge_gate("run", "gate.yml", "--device", "cpu", cwd=place)
    assert answer.code == 0, answer.said
    return place


def load_packed(directory: Path, packing: BitsAndBytesConfig | None = None) -> Any:
    more = {} if packing is None else {"quantization_config": packing}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKINGS)
def test_a_stored_packed_base_is_published_plain(
    name: str, packed: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, directory = ADAPTERS_OF_PACKED[name], packed / "merged" / f"{name}-bfloat16"
    with methods.quiet():
        plain = load_packed(shelf.base(VARIANTS[adapter].base))
        expected = dequantized_merge(load_packed(packed / name), plain, shelf.adapter(adapter))
    assert different(loaded(directory, caplog).state_dict(), expected) == []
    assert {tensor.dtype for tensor in stored(directory).values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
