"""Which names are Hub ids, and which are mistyped directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_gate.names.hub_names import close_directory, could_be_hub_id, is_commit

OWNERS = (
    "meta-llama", "mistralai", "Qwen", "google", "microsoft", "HuggingFaceTB", "facebook", "openai-community", "acme",
    "TinyLlama", "EleutherAI", "google-bert", "sentence-transformers", "deepseek-ai", "unsloth", "nvidia", "tiiuae",
    "allenai", "ibm-granite", "CohereForAI", "stabilityai", "bigscience", "Salesforce", "FacebookAI", "HuggingFaceH4",
)  # fmt: skip
FOLDERS = (
    "src", "tests", "docs", "adapters", "models", "configs", "scripts", "data", "notebooks", "training", "merged",
    "outputs", "checkpoints", "examples", "README.md", "LICENSE", "Makefile", "pyproject.toml", "merge-gate.yml",
    "merge-gate-report", "Dockerfile", "requirements.txt", "lora", "eval", "tools", "build", "dist", "package.json",
    "cache", "release", "infra", "peft",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project, and the directory above it."""
    for name in ("adapters/healthy", "adapters/support", "models/base", "models/gpt2"):
        (tmp_path / "project" / name).mkdir(parents=True)
    for name in ("base", "gpt2"):
        (tmp_path / "project" / "models" / name / "config.json").touch()
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("adaptors/healthy", "adapters/healthy"),
        ("adapters/helthy", "adapters/healthy"),
        ("Adapters/Healthy", "adapters/healthy"),
        ("adapters/unheard-of", "adapters/"),
        ("adaptors/unheard-of", "adapters/"),
        ("model/base", "models/base"),
        ("modles", "models"),
        ("project-1/models", "models"),
        ("base", "models/base"),
        ("gpt2", "models/gpt2"),
        ("project/models", "models"),
        ("adpt/healthy", "adapters/healthy"),
        ("adpt/unheard-of", ""),
        ("mod/bases", "models/base"),
        ("gpt2-lora", ""),
        ("acme/base-1b", ""),
        ("acme/healthy", ""),
        ("gpt3", ""),
    ],
)
def test_the_directory_that_was_meant(place: Path, name: str, close: str) -> None:
    assert close_directory(name, place, is_base=True) == close
    assert could_be_hub_id(name, is_base=True)


def test_an_adapter_may_be_named_after_its_base(place: Path) -> None:
    (place / "llama-8b").mkdir()
    assert close_directory("acme/llama-8b", place, is_base=True) == "llama-8b"
    (place / "llama-8b" / "adapter_config.json").touch()
    assert close_directory("acme/llama-8b", place, is_base=True) == ""
    assert close_directory("project/llama-8b", place, is_base=False) == "llama-8b", "an adapter is looked for"


def test_a_directory_above(place: Path) -> None:
    """A config in a folder of its own, with paths relative to the repository."""
    (place / "ci" / "gate").mkdir(parents=True)
    assert close_directory("models/base", place / "ci" / "gate", is_base=True) == "../../models/base"


def test_a_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    assert close_directory("acme/lora", tmp_path / "absent", is_base=False) == ""


def test_owners_on_the_hub_are_close_to_no_usual_folder(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    assert [owner for owner in OWNERS if close_directory(f"{owner}/some-model-8b", tmp_path, is_base=True)] == []


def test_a_name_among_a_thousand(tmp_path: Path) -> None:
    """The hints of keys compare 200 words. This decides whether a name leaves the machine."""
    for number in range(1000):
        (tmp_path / f"a{number:04}").mkdir()
    (tmp_path / "zebra").mkdir()
    assert close_directory("zebar/x", tmp_path, is_base=False) == "zebra/"


@pytest.mark.parametrize("name", ["./a/b", "../a", "~/a", "/a/b", "a/b/c", "a/b/", "C:\\a", "a b", "a--b/c", ""])
def test_no_hub_id(name: str) -> None:
    assert not could_be_hub_id(name, is_base=True)


def test_a_commit_is_whole() -> None:
    assert is_commit("0e9e39f249a16976918f6564b8830bc894c89659")
    assert not any(map(is_commit, (None, "main", "0e9e39f", "0E9E39F249A16976918F6564B8830BC894C89659")))
