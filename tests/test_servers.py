"""What benchmarks/servers.py holds servers against, and its words for their answers. Adapters and logits are real."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import servers


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("servers")
    for name in ("plain", "rslora16", "nan", "text-class", "wrong-size"):
        servers.make_adapter(name, directory)
    return directory


def peft(work: Path, name: str) -> np.ndarray:
    return np.load(work / "peft" / f"{name}.npy")


def test_pefts_own_logits_are_exact_and_the_base_is_not(work: Path) -> None:
    base, plain = peft(work, "base-llama"), peft(work, "plain")
    assert servers.compared(plain, base, plain) == {"error": 0, "moved": 1}
    assert servers.compared(plain + 1, base, plain)["error"] < servers.EXACT, "a constant changes no probability"
    assert servers.compared(base, base, plain) == {"error": 1, "moved": 0}
    assert servers.compared(peft(work, "rslora16"), base, plain)["error"] > servers.EXACT
    assert servers.compared(plain * np.nan, base, plain) == {"nan": plain.size}


def test_a_broken_adapter_is_compared_with_the_intact_one(work: Path) -> None:
    np.testing.assert_array_equal(peft(work, "nan"), peft(work, "plain"))
    assert not (work / "peft" / "wrong-size.npy").exists(), "PEFT has no logits for a base that does not fit"
    assert set(servers.compared(peft(work, "plain"), peft(work, "base-llama"), None)) == {"moved"}


def test_an_adapter_of_the_text_class_lacks_the_wrappers_name(work: Path) -> None:
    adapter = servers.read_tensors(work / "adapters" / "text-class")
    base = servers.read_tensors(work / "bases" / "qwen3.5", "model.safetensors")
    assert not [name for name in adapter if "language_model" in name]
    assert [name for name in base if name.startswith("model.language_model.layers.0.")]


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ({"refused": "DoRA"}, "refused"),
        ({"error": 9e-6, "moved": 1.0}, "exact"),
        ({"error": 0.584, "moved": 0.8}, "**wrong, 0.58**"),
        ({"error": 1.0, "moved": 8e-7}, "**the base**"),
        ({"moved": 0.07}, "**accepted**"),
        ({"nan": 3}, "**NaN**"),
        ({"nan": 3, "base_nan": 2}, "**NaN**, and then **NaN** of the base"),
    ],
)
def test_an_answer_has_a_word(answer: dict[str, float], word: str) -> None:
    facts = {"vLLM": {"original": answer}}
    assert servers.cell(facts, "vLLM") == word
    assert servers.cell(facts, "vLLM", "export") == "not run"
    assert servers.cell(facts, "llama.cpp") == "not run"
    assert servers.cell({"export": "no plain LoRA"} | facts, "vLLM", "export") == "none"
