"""Which names are Hub ids, and which are mistyped directories."""

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
    lay(tmp_path / "project", "adapters/healthy", "adapters/support", "models/base/", "models/gpt2/")
    return tmp_path / "project"


def lay(place: Path, *names: str) -> None:
    """Adapters, models (`name/`), and empty directories (`name//`)."""
    for name in names:
        (place / name).mkdir(parents=True, exist_ok=True)
        if not name.endswith("//"):
            (place / name / ("config.json" if name.endswith("/") else "adapter_config.json")).touch()


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("model/base", "models/base"),
        ("modles", "models"),
        ("project-1/models", "models"),
        ("base", "models/base"),
        ("gpt2", "models/gpt2"),
        ("project/models", "models"),
        ("models/unheard-of", "models/"),
        ("adapters/unheard-of", "adapters/"),
        ("mod/bases", "models/base"),
        ("gpt2-lora", ""),
        ("acme/base-1b", ""),
        ("acme/healthy", ""),
        ("gpt3", ""),
        pytest.param("output/base", "models/base", marks=pytest.mark.attempt("Y54a", "base output/base", "refused")),
        pytest.param("ckpt/GPT2", "models/gpt2", marks=pytest.mark.attempt("Y54b", "base ckpt/GPT2", "refused")),
    ],
)
def test_the_model_that_was_meant(place: Path, name: str, close: str) -> None:
    assert close_directory(name, place, is_base=True) == close
    assert could_be_hub_id(name, is_base=True)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("adaptors/healthy", "adapters/healthy"),
        ("adapters/helthy", "adapters/healthy"),
        ("Adapters/Healthy", "adapters/healthy"),
        ("adapters/unheard-of", "adapters/"),
        ("adaptors/unheard-of", "adapters/"),
        ("Adapters/unheard-of", "adapters/"),
        ("adpt/healthy", "adapters/healthy"),
        ("adpt/unheard-of", ""),
        ("acme/base", ""),
        *(
            pytest.param(name, close, marks=pytest.mark.attempt(f"Y55{row}", f"adapter {name}", "refused"))
            for row, name, close in (
                ("a", "lora/healthy", "adapters/healthy"),
                ("b", "ckpt/healthy", "adapters/healthy"),
                ("c", "wrong/healthy", "adapters/healthy"),
                ("d", "wrong/Support", "adapters/support"),
                ("e", "ckpt/run-1", "checkpoints/run-1"),
            )
        ),
    ],
)
def test_the_adapter_that_was_meant(place: Path, name: str, close: str) -> None:
    lay(place, "checkpoints/run-1")
    assert close_directory(name, place, is_base=False) == close


@pytest.mark.parametrize(
    ("name", "here"),
    [
        pytest.param(name, here, marks=pytest.mark.attempt(f"Y56{row}", f"base {name}, here {here}", "fetched"))
        for row, (name, here) in enumerate(
            (
                ("Qwen/Qwen2.5-7B", "qwen//"),
                ("Qwen/Qwen2.5-7B", "qwen/support"),
                ("Qwen/Qwen2.5-7B", "qwen/other-model/"),
                ("Qwen/Qwen2.5-7B", "qwen2//"),
                ("Qwen/Qwen2.5-7B", "qwen2/support"),
                ("Qwen/Qwen2.5-7B", "qwen2.5-7b/support"),
                ("mistralai/Mistral-7B-v0.3", "mistral//"),
                ("mistralai/Mistral-7B-v0.3", "mistral/support"),
                ("mistralai/Mistral-7B-v0.3", "mistral/mistral-7b"),
                ("sentence-transformers/all-MiniLM-L6-v2", "transformers//"),
                ("sentence-transformers/all-MiniLM-L6-v2", "transformers/support"),
                ("google/gemma-2-2b", "google//"),
                ("google/gemma-2-2b", "google/data//"),
                ("unsloth/Llama-3.2-1B", "unsloth//"),
                ("unsloth/Llama-3.2-1B", "unsloth/data//"),
                ("facebook/opt-125m", "opt-125m//"),
                ("facebook/opt-125m", "opt-125m"),
                ("facebook/opt-125m", "opt-125m/support"),
                ("gpt2", "gpt//"),
                ("gpt2", "gpt-2/support"),
            )
        )
    ],
)
def test_an_id_of_the_hub(tmp_path: Path, name: str, here: str) -> None:
    lay(tmp_path, here)
    assert close_directory(name, tmp_path, is_base=True) == ""


def test_an_adapter_may_be_named_after_its_base(place: Path) -> None:
    lay(place, "llama-8b/")
    assert close_directory("acme/llama-8b", place, is_base=True) == "llama-8b"
    lay(place, "llama-9b")
    assert close_directory("acme/llama-9b", place, is_base=True) == ""
    assert close_directory("project/llama-9b", place, is_base=False) == "llama-9b", "an adapter is looked for"


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
    lay(tmp_path, "zebra/stripes")
    assert close_directory("zebar/x", tmp_path, is_base=False) == "zebra/"


@pytest.mark.parametrize("name", ["./a/b", "../a", "~/a", "/a/b", "a/b/c", "a/b/", "C:\\a", "a b", "a--b/c", ""])
def test_no_hub_id(name: str) -> None:
    assert not could_be_hub_id(name, is_base=True)


def test_a_commit_is_whole() -> None:
    assert is_commit("0e9e39f249a16976918f6564b8830bc894c89659")
    assert not any(map(is_commit, (None, "main", "0e9e39f", "0E9E39F249A16976918F6564B8830BC894C89659")))
