"""The directory that adapter_config.json names as its base, compared with the base of the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merge_gate.cli.dispatch import main
from tests.support.command import entries, strict_json
from tests.support.models import (
    DECODER,
    SPECIAL,
    Shelf,
    read_config,
    read_tensors,
    write_config,
    write_tensors,
)

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def laid(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` is the base of the adapter `a`; `qwen2` has the same shapes."""
    place = tmp_path_factory.mktemp("named-bases")
    shutil.copytree(shelf.base("llama"), place / "llama")
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER | SPECIAL)).save_pretrained(place / "qwen2")
    shutil.copytree(shelf.adapter("plain"), place / "a")
    (place / "a" / "README.md").unlink()
    return place


@pytest.fixture
def place(laid: Path, tmp_path: Path) -> Path:
    shutil.copytree(laid, tmp_path / "here")
    return tmp_path / "here"


def config(place: Path, **changes: Any) -> None:
    """Change config.json of a base."""
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def judged(
    place: Path, base: str, named: str, *words: str, command: str = "check"
) -> tuple[int, list[tuple[str, str]]]:
    """The exit code, and the findings of base-mismatch: severity and message."""
    write_config(place / "a", read_config(place / "a") | {"base_model_name_or_path": named})
    with chdir(place):
        code = main([command, "a", "--base", base, "--report", "json=out.json", *words])
    (entry,) = strict_json(place / "out.json")["adapters"]
    found = [each for each in entry["findings"] if each["check"] == "base-mismatch"]
    return code, [(each["severity"], each["message"]) for each in found]


# --- what the directory is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "code", "severity"), [((), 0, "warning"), (("--policy", "release"), 1, "error")])
def test_another_model_type(words: tuple[str, ...], code: int, severity: str, place: Path, wording, capsys) -> None:
    """`run` and `check` say it, and the policy decides."""
    got, [(said, message)] = judged(place, "qwen2", f"{place}/llama", *words, command="run")
    assert (got, said) == (code, severity), capsys.readouterr().out
    wording(message)
    assert capsys.readouterr().out.count("base-mismatch") >= 1


def test_a_generic_mount_that_holds_something_else(place: Path) -> None:
    """The directory was mounted again since: a warning, also if its name is the base's."""
    shutil.move(place / "llama", place / "model")
    shutil.copytree(place / "qwen2", place / "other" / "model")
    for base in ("qwen2", "other/model"):
        code, [(severity, message)] = judged(place, base, f"{place}/model")
        assert (code, severity) == (0, "warning")
        assert "'llama'" in message
    code, found = judged(place, "qwen2", f"{place}/model", "--expect", f"base={place}/model")
    assert (code, found) == (0, [])


def copied(place: Path, name: str = "copy") -> Path:
    shutil.copytree(place / "llama", place / name)
    return place / name


def with_tensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = read_tensors(directory, MODEL)
    change(tensors)
    write_tensors(directory, tensors, MODEL)


def longer(directory: Path) -> None:
    with_tensor(directory, lambda own: own.update({"lm_head.weight": torch.zeros(72, 32)}))


def in_16_bits(directory: Path) -> None:
    with_tensor(directory, lambda own: own.update({name: tensor.bfloat16() for name, tensor in own.items()}))


def classifier(directory: Path) -> None:
    with_tensor(directory, lambda own: (own.pop("lm_head.weight"), own.update({"score.weight": torch.zeros(2, 32)})))
    config(directory, architectures=["LlamaForSequenceClassification"])


def quantized(directory: Path) -> None:
    packed = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(512, 1, dtype=torch.uint8)}
    with_tensor(directory, lambda own: own.update(packed))
    config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def part_of_another(directory: Path) -> None:
    own = json.loads((directory / "config.json").read_text())
    config(directory, model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config=own)
    with_tensor(directory, lambda own: [own.update({f"language_model.{name}": own.pop(name)}) for name in [*own]])


def linked(directory: Path) -> None:
    (directory / MODEL).unlink()
    os.link(directory.parent / "llama" / MODEL, directory / MODEL)


def nothing(_: Path) -> None:
    """A copy, byte by byte."""


LIKENESS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "another shape": (longer, "warning"),
    "another size": (in_16_bits, "warning"),
    "a classifier": (classifier, "note"),
    "a copy in 4 bits": (quantized, "note"),
    "the text part of a vision model": (part_of_another, "note"),
    "the same files": (linked, None),
    "a copy": (nothing, "note"),
}


@pytest.mark.parametrize("kind", LIKENESS)
def test_the_same_model_type(kind: str, place: Path, wording) -> None:
    change, severity = LIKENESS[kind]
    change(copied(place))
    code, found = judged(place, "llama", f"{place}/copy")
    assert (code, [said for said, _ in found]) == (0, [severity] if severity else [])
    wording("\n".join(message for _, message in found))


def out_of_its_tree(place: Path) -> str:
    """The weights are behind a link, as in a cache; it may lead anywhere."""
    shutil.move(place / "llama" / MODEL, place / "elsewhere.safetensors")
    (place / "llama" / MODEL).symlink_to(place / "elsewhere.safetensors")
    return f"{place}/llama"


def a_pipe(place: Path) -> str:
    (place / "llama" / "config.json").unlink()
    os.mkfifo(place / "llama" / "config.json")
    return f"{place}/llama"


def another_size_of_factors(place: Path) -> str:
    """A directory that only has the name: the adapter does not fit it."""
    small = transformers.LlamaConfig(**DECODER | SPECIAL | {"hidden_size": 16, "num_attention_heads": 2})
    shutil.rmtree(place / "llama")
    transformers.LlamaForCausalLM(small).save_pretrained(place / "llama")
    return f"{place}/llama"


def deep(place: Path) -> str:
    (place / "llama" / "config.json").write_text("[" * 100_000)
    return f"{place}/llama"


NOTES: dict[str, Callable[[Path], str]] = {
    "missing": lambda place: f"{place}/gone",
    "relative": lambda _: "../llama",
    "on another system": lambda _: "C:\\models\\mistral",
    "a link out of its tree": out_of_its_tree,
    "a pipe": a_pipe,
    "another model": another_size_of_factors,
    "nested without end": deep,
    "a file": lambda place: f"{place}/llama/config.json",
    "a name that no system has": lambda _: "/" + "x" * 300,
}


@pytest.mark.parametrize("kind", NOTES)
def test_any_other_path_is_a_note(kind: str, place: Path) -> None:
    code, [(severity, message)] = judged(place, "qwen2", NOTES[kind](place))
    assert (code, severity) == (0, "note")
    assert "a path on the machine that trained the adapter" in message


# --- names of the Hub, and files next to the adapter -----------------------------------------------------------------


CACHE = "/root/.cache/huggingface/hub/models--acme--{}/snapshots/0e9e39f249a1"


@pytest.mark.parametrize(("named", "severities"), [
    ("acme/qwen2", []), ("acme/llama", ["warning"]), (CACHE.format("qwen2"), []), (CACHE.format("llama"), ["warning"]),
    (CACHE.format("qwen2-bnb-4bit"), ["note"]),
])  # fmt: skip
def test_a_path_in_a_cache_is_the_hub_s_name(named: str, severities: list[str], place: Path) -> None:
    code, found = judged(place, "qwen2", named)
    assert (code, [severity for severity, _ in found]) == (0, severities)


def card_of(place: Path, base: str) -> None:
    """As TRL and LLaMA-Factory write it."""
    text = f"---\nlibrary_name: peft\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\n# Model Card\n"
    (place / "a" / "README.md").write_text(text)


@pytest.mark.parametrize(("base", "file", "severity"), [
    ("llama", "config.json", "note"), ("qwen2", "config.json", "warning"),
    ("llama", "README.md", "note"), ("qwen2", "README.md", "warning"), ("qwen2", "", "note"),
])  # fmt: skip
def test_files_next_to_the_adapter(base: str, file: str, severity: str, place: Path) -> None:
    """Axolotl puts the base's config.json there. A card that names the base counts if that is here."""
    if file == "config.json":
        shutil.copy(place / "llama" / file, place / "a" / file)
    card_of(place, f"{place}/llama" if file == "README.md" else "acme/llama")
    code, [(said, message)] = judged(place, base, "../outputs/gone")
    assert (code, said) == (0, severity)
    assert severity == "note" or f"({file} of the adapter names one)" in message


def test_a_verdict_is_not_reused_if_the_directory_changes(place: Path) -> None:
    out = ("-o", "out", "--cache", "cache")
    assert judged(place, "llama", f"{copied(place)}", *out, command="run")[1][0][0] == "note"
    config(place / "copy", model_type="qwen2")
    assert judged(place, "llama", f"{place}/copy", *out, command="run")[1][0][0] == "warning"
    assert [entry["verdict"] for entry in entries(place / "out")] == ["passed"]
