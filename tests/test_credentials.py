"""No user, password, or query of a URL, and no long text, is repeated: not in a message, a report, or a log."""

from __future__ import annotations

import contextlib
import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_gate.cli.dispatch import main
from tests.support.models import Shelf, read_config, write_config

URLS = (
    "https://user:SECRET@host.invalid/x?token=SECRET",
    "https://user:pa' SECRET@host.invalid/x",
    f"https://user:{'SECRET' * 60}@host.invalid/x",
    "user:pa SECRET@host.invalid/x",
)
INPUTS = {"merge-gate.yml", "adapter_config.json"}

COMMANDS: tuple[str, ...] = (
    "check a --base {}", "check {}", "run {}", "run {}.yml", "run a --base {}", "check a --base llama --expect base={}",
    "check a --report {}=x", "check a --set no-effect={}", "check a --expect {}", "run a --base {} --plan",
    *(f"run a --base llama --plan {option} {{}}"
      for option in ("--access", "--cache", "--device", "--dtype", "--expect", "--forward", "--gpus", "--image",
                     "--max-shard-size", "--only", "--policy", "--publish", "--quantization", "--revision", "--set",
                     "--shard")),
    "run a --base llama --ray {}", "run a --base llama --image {}",
    "verify {}", "verify llama --base {} --adapter a", "verify llama --base llama --adapter {}",
    "export {} --base llama --output out", "export a --base {} --output out",
    "report show {}", "report diff {} {}", "report combine {} --output out", "report baseline {}", "explain {}",
    "schema {}", "init {}", "{}", "run --{}",
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {"base": {"model": "{}"}},
    "key of a base": {"base": {"{}": 1}},
    "dtype": {"base": {"model": "llama", "dtype": "{}"}},
    "digest": {"base": {"model": "llama", "sha256": "{}"}},
    "adapter": {"adapters": ["{}"]},
    "glob": {"adapters": ["{}/*"]},
    "name": {"adapters": [{"path": "a", "name": "{}"}]},
    "revision": {"adapters": [{"path": "a", "revision": "{}"}]},
    "expectation": {"adapters": [{"path": "a", "expect": {"base": "{}", "peft_type": "{}"}}]},
    "member": {"adapters": ["a", {"name": "b", "combine": {"adapters": ["{}", "a"]}}]},
    "check": {"checks": {"{}": "error"}},
    "severity": {"checks": {"no-effect": "{}"}},
    "policy": {"policy": "{}"},
    "key": {"{}": 1},
}
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"base_model_name_or_path": "{}"}, {"revision": "{}", "base_model_name_or_path": "acme/b"}, {"peft_type": "{}"},
    {"task_type": "{}"}, {"target_modules": ["{}"]}, {"target_modules": "{}("}, {"{}": 1}, {"bias": "{}"},
    {"init_lora_weights": "{}"}, {"rank_pattern": {"{}": "{}"}}, {"peft_version": "{}"}, {"r": "{}"},
    {"megatron_config": "{}"}, {"auto_mapping": {"base_model_class": "{}", "parent_library": "{}"}},
)  # fmt: skip


@pytest.fixture
def place(shelf: Shelf, tmp_path: Path) -> Path:
    shutil.copytree(shelf.adapter("plain"), tmp_path / "a")
    (tmp_path / "llama").symlink_to(shelf.base("llama"))
    return tmp_path


def filled(value: Any, url: str) -> Any:
    return json.loads(json.dumps(value).replace("{}", json.dumps(url)[1:-1]))


def repeats_nothing(place: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with chdir(place), contextlib.suppress(SystemExit):  # of argparse
        main(argv)
    captured = capsys.readouterr()
    written = [path for path in place.rglob("*") if path.is_file() and path.suffix in {".json", ".yml", ".md", ".html"}]
    texts = (path.read_text() for path in written if path.name not in INPUTS or path.parent.name == "new")
    for text in (captured.out, captured.err, *texts):
        assert "SECRET" not in text
    return captured.out + captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_of_the_command_line(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in URLS:
        said = repeats_nothing(place, [word.replace("{}", url) for word in command.split()], capsys)
        assert "Traceback" not in said
        assert "this is a bug" not in said


@pytest.mark.parametrize("kind", CONFIGS)
def test_of_a_configuration(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in URLS:
        config = {"version": 1, "base": {"model": "llama"}, "adapters": ["a"]} | filled(CONFIGS[kind], url)
        (place / "merge-gate.yml").write_text(yaml.safe_dump(config))
        repeats_nothing(place, ["check"], capsys)


@pytest.mark.parametrize("changes", ADAPTERS, ids=lambda changes: next(iter(changes)))
def test_of_an_adapter(changes: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = read_config(place / "a")
    for url in URLS:
        write_config(place / "a", own | filled(changes, url))
        repeats_nothing(place, ["check", "a", "--report", "json=o.json", "--report", "html=o.html"], capsys)
        repeats_nothing(place, ["check", "a", "--base", "llama", "--report", "markdown=o.md"], capsys)
        (place / "new").mkdir(exist_ok=True)
        with chdir(place / "new"):
            repeats_nothing(place / "new", ["init", ".."], capsys)


@pytest.mark.parametrize(
    "name", ["HF_ENDPOINT", "HTTPS_PROXY", "MERGE_GATE_BASE", "MERGE_GATE_DTYPE", "MERGE_GATE_DTPYE"]
)
def test_of_the_environment(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in URLS:
        monkeypatch.setenv(name, url)
        repeats_nothing(place, ["run", "a", "--plan", *(["--base", "acme/x"] if name[0] == "H" else [])], capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_token_is_masked(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET1")
    repeats_nothing(place, [word.replace("{}", "acme/hf_SECRET1") for word in command.split()], capsys)
    (place / "merge-gate.yml").write_text("version: 1\nbase: {model: llama}\nadapters: [{path: a, name: hf_SECRET1}]\n")
    repeats_nothing(place, ["check", "--report", "json=o.json", "--report", "html=o.html"], capsys)


LONG = {"x": "x" * 301, "x y ": "x y " * 75}
"""A text without blanks, and one with them, which no line breaks, and what no output repeats of it."""


def shows_no_long_text(text: str) -> bool:
    return not any(most in " ".join(text.split()) or most in text.replace("\n", "") for most in LONG.values())


@pytest.mark.parametrize("word", LONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_long_text_is_cut(command: str, word: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = repeats_nothing(place, [part.replace("{}", word * 25_000) for part in command.split()], capsys)
    assert shows_no_long_text(said)
    assert len(said) < 10_000


@pytest.mark.parametrize("word", LONG)
@pytest.mark.parametrize("kind", CONFIGS)
def test_long_text_of_a_configuration_is_cut(
    kind: str, word: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"version": 1, "base": {"model": "llama"}, "adapters": ["a"]} | filled(CONFIGS[kind], word * 2_000)
    (place / "merge-gate.yml").write_text(yaml.safe_dump(config))
    assert shows_no_long_text(repeats_nothing(place, ["check", "--report", "json=o.json"], capsys))


@pytest.mark.parametrize("changes", ADAPTERS, ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize("word", ["x", "x y"])
def test_long_text_of_an_adapter_is_cut(
    word: str, changes: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(place / "a", read_config(place / "a") | filled(changes, word * 5_000))
    repeats_nothing(place, ["check", "a", "--base", "llama", "--report", "json=o.json"], capsys)
    (entry,) = json.loads((place / "o.json").read_text())["adapters"]
    for finding in entry["findings"]:
        assert word * (301 // len(word) + 1) not in finding["message"] + finding["hint"]
