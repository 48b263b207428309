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
    return found_by(place, [command, "a", "--base", base, *words])


def released(place: Path, base: str, named: str) -> tuple[int, list[tuple[str, str]]]:
    """The same with `policy: release`, and with the check as an error."""
    write_config(place / "a", read_config(place / "a") | {"base_model_name_or_path": named})
    text = f"version: 1\nadapters: [{{path: a}}]\nbase: {{model: ./{base}}}\n"
    (place / "release.yml").write_text(text + "policy: release\n")
    (place / "error.yml").write_text(text + "checks: {base-mismatch: error}\n")
    policy, setting = (found_by(place, ["check", name]) for name in ("release.yml", "error.yml"))
    assert policy == setting
    return policy


def found_by(place: Path, argv: list[str]) -> tuple[int, list[tuple[str, str]]]:
    with chdir(place):
        code = main([*argv, "--report", "json=out.json"])
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


def test_other_files_of_one_type_stay_a_warning_for_a_release(place: Path) -> None:
    longer(copied(place))
    code, [(severity, message)] = released(place, "llama", f"{place}/copy")
    assert (code, severity) == (0, "warning")
    assert "has shape [72, 32] there and [" in message


def out_of_its_tree(place: Path) -> str:
    """The weights are behind a link, as in a cache; it may lead anywhere."""
    shutil.move(place / "llama" / MODEL, place / "elsewhere.safetensors")
    (place / "llama" / MODEL).symlink_to(place / "elsewhere.safetensors")
    return f"{place}/llama"


def weights_of_another_directory(place: Path) -> str:
    """An index may name any file."""
    shutil.move(place / "llama" / MODEL, place / MODEL)
    names = dict.fromkeys(read_tensors(place, MODEL), f"../{MODEL}")
    index = {"metadata": {}, "weight_map": names}
    (place / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{place}/llama"


def a_device(place: Path) -> str:
    (place / "llama" / "config.json").unlink()
    (place / "llama" / "config.json").symlink_to("/dev/zero")
    return f"{place}/llama"


def a_device_as_weights(place: Path) -> str:
    (place / "llama" / MODEL).unlink()
    (place / "llama" / MODEL).symlink_to("/dev/zero")
    return f"{place}/llama"


def a_large_config(place: Path) -> str:
    """A hole of 8 GB: no more is read than a configuration may have."""
    with (place / "llama" / "config.json").open("ab") as file:
        file.truncate(8 << 30)
    return f"{place}/llama"


def a_loop(place: Path) -> str:
    (place / "loop").symlink_to(place / "loop")
    return f"{place}/loop"


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
    "weights of another directory": weights_of_another_directory,
    "a device": a_device,
    "a device as weights": a_device_as_weights,
    "a large configuration": a_large_config,
    "a loop of links": a_loop,
    "descriptors of this process": lambda _: "/proc/self/fd",
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


CACHE = "/mnt/hf-cache/hub/models--acme--{}/snapshots/0e9e39f249a1"


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


def test_what_files_next_to_the_adapter_say_stays_a_warning_for_a_release(place: Path) -> None:
    shutil.copy(place / "llama" / "config.json", place / "a")
    code, [(severity, _)] = released(place, "qwen2", "../outputs/gone")
    assert (code, severity) == (0, "warning")


PEFT_CARD = """---
base_model: {named}
library_name: peft
tags:
- base_model:adapter:{named}
- lora
---
# Model Card for Model ID
"""
TRL_CARD = """---
base_model: {named}
library_name: peft
model_name: out
tags:
- base_model:adapter:{named}
- generated_from_trainer
- sft
- trl
licence: license
---
# Model Card for out
"""
AXOLOTL_CARD = """---
library_name: peft
license: apache-2.0
base_model: {named}
tags:
- axolotl
- base_model:adapter:{named}
model-index:
- name: outputs/out
  results: []
---
```yaml
base_model: {named}
```
"""
FACTORY_CARD = """---
library_name: peft
license: other
base_model: {named}
tags:
- base_model:adapter:{named}
- llama-factory
- lora
model-index:
- name: sft
  results: []
---
"""
UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    }
}
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft": (PEFT_CARD, {}),
    "trl": (TRL_CARD, {}),
    "axolotl": (AXOLOTL_CARD, {}),
    "llama-factory": (FACTORY_CARD, {}),
    "unsloth": (PEFT_CARD, UNSLOTH),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_each_trainer_writes(writer: str, place: Path) -> None:
    """Right adapters have at most a note, whatever the trainer named; a mount that holds another model is a warning."""
    card, keys = WRITERS[writer]
    write_config(place / "a", read_config(place / "a") | keys)
    shutil.copytree(place / "qwen2", place / "model")
    if writer == "axolotl":
        shutil.copy(place / "llama" / "config.json", place / "a")
    copied(place)
    for named, severities in {
        "acme/llama": [],
        CACHE.format("llama"): [],
        f"{place}/llama": [],
        f"{place}/copy": ["note"],
        f"{place}/gone": ["note"],
        "../outputs/base": ["note"],
        "/workspace/llama": [],
        f"{place}/model": ["warning"],
    }.items():
        (place / "a" / "README.md").write_text(card.format(named=named))
        code, found = judged(place, "llama", named)
        assert (code, [severity for severity, _ in found]) == (0, severities), named
        code, found = released(place, "llama", named)
        expected = ["error" if severity == "warning" else severity for severity in severities]
        assert (code, [severity for severity, _ in found]) == ("error" in expected, expected), named


def test_a_verdict_is_not_reused_if_the_directory_changes(place: Path) -> None:
    out = ("-o", "out", "--cache", "cache")
    assert judged(place, "llama", f"{copied(place)}", *out, command="run")[1][0][0] == "note"
    config(place / "copy", model_type="qwen2")
    assert judged(place, "llama", f"{place}/copy", *out, command="run")[1][0][0] == "warning"
    assert [entry["verdict"] for entry in entries(place / "out")] == ["passed"]


def test_digests_of_earlier_runs_show_that_a_copy_is_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were bases of runs with this cache. A write into the copy brings the note back."""
    monkeypatch.setattr("merge_gate.features.cache.remembered.SETTLED_NS", 0)
    copy = copied(place)
    classifier(copied(place, "other"))
    out = ("-o", "out", "--cache", "cache")
    for base in ("copy", "llama", "other"):
        assert judged(place, base, "acme/" + base, *out, command="run") == (0, [])

    def severities(named: Path, *words: str) -> list[str]:
        return [severity for severity, _ in judged(place, "llama", str(named), *out, *words, command="run")[1]]

    assert severities(copy, "--refresh") == ["note"]
    assert severities(copy) == []
    assert severities(place / "other") == ["note"]
    (copy / MODEL).touch()
    assert severities(copy) == ["note"]
