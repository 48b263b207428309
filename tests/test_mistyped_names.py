"""A mistyped directory never reaches the Hub: no request, no token, exit code 2, and the name that was meant.

The Hub is a loopback server that records what it is asked. On it, strangers own repositories with the mistyped names.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from merge_gate.cli.dispatch import main
from tests.support.hub import LoopbackHub

TOKEN = "hf_secret"
DAMAGED = b"damaged"
NO_TENSORS = b"\x02\0\0\0\0\0\0\0{}"
FACTORS = save(
    {
        f"base_model.model.model.layers.0.q.lora_{factor}.weight": np.ones(shape, dtype="float32")
        for factor, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
)
STRANGERS = ("adaptors/healthy", "model/base", "acme/healthy-lora", "acme/llama")


def lay_adapter(directory: Path, base: str = "./models/base", revision: str | None = None) -> None:
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": base}
    config |= {"revision": revision} if revision else {}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(DAMAGED if base == "./models/base" else FACTORS)


@pytest.fixture
def hub(tmp_path: Path, variables, cwd, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The current directory is a project with `adapters/`, `models/`, and a config in `ci/`."""
    lay_adapter(tmp_path / "adapters" / "healthy")
    for name in ("base", "merged"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        (tmp_path / "models" / name / "model.safetensors").write_bytes(NO_TENSORS)
    (tmp_path / "ci").mkdir()
    variables["HF_TOKEN"] = TOKEN
    with LoopbackHub() as server:
        server.serve_this_process(monkeypatch, tmp_path / ".cache")
        server.tokens.add(TOKEN)
        for name in STRANGERS:
            files = {path.name: path.read_bytes() for path in (tmp_path / "adapters" / "healthy").iterdir()}
            server.add_repo(name, files, refs=("main", "v1"))
        yield server


def given(*words: str, meant: str, tried: str) -> object:
    return pytest.param(
        words, meant, id=tried, marks=pytest.mark.attempt(f"D1-{tried}", " ".join(words), "exit 2, no request")
    )


HEALTHY = ("--base", "models/base")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        given("run", "adaptors/healthy", *HEALTHY, meant="adapters/healthy", tried="a"),
        given("run", "adapter/healthy", *HEALTHY, meant="adapters/healthy", tried="b"),
        given("run", "Adapters/healthy", *HEALTHY, meant="adapters/healthy", tried="c"),
        given("run", "adpaters/healthy", *HEALTHY, meant="adapters/healthy", tried="d"),
        given("run", "adapters/helthy", *HEALTHY, meant="adapters/healthy", tried="e"),
        given("run", "adapters_/healthy", *HEALTHY, meant="adapters/healthy", tried="f"),
        given("run", "adaptors/unheard-of", *HEALTHY, meant="healthy", tried="g"),
        given("run", "project/adapters", *HEALTHY, meant="adapters", tried="h"),
        given("check", "adaptors/healthy", meant="adapters/healthy", tried="i"),
        given("run", "adaptors/healthy", *HEALTHY, "--plan", meant="adapters/healthy", tried="j"),
        given("run", "adapters/healthy", "--base", "model/base", meant="models/base", tried="k"),
        given("run", "adapters/healthy", "--base", "Models/Base", meant="models/base", tried="l"),
        given("run", "adapters/healthy", "--base", "modles/base", meant="models/base", tried="m"),
        given("run", "adapters/healthy", "--base", "models/bsae", meant="models/base", tried="n"),
        given("run", "adapters/healthy", "--base", "modles", meant="models", tried="o"),
        given("run", "adapters/healthy", "--base", "base", meant="models/base", tried="p"),
        given("run", "adapters/healthy", "--base", "modle/base", "--plan", meant="models/base", tried="q"),
        given("check", "adapters/healthy", "--base", "model/base", meant="models/base", tried="r"),
        given("run", "lora/healthy", *HEALTHY, meant="adapters/healthy", tried="Y54c"),
        given("run", "wrong/healthy", *HEALTHY, meant="adapters/healthy", tried="Y54d"),
        given("run", "adapters/healthy", "--base", "output/base", meant="models/base", tried="Y54e"),
        given("verify", "model/merged", meant="models/merged", tried="s"),
        given("verify", "adaptors/healthy", *HEALTHY, "--adapter", "adapters/healthy", meant="adapters/", tried="s2"),
        given("verify", "model/merged", *HEALTHY, "--adapter", "adapters/healthy", meant="models/merged", tried="t"),
        given("verify", "models/mergd", *HEALTHY, "--adapter", "adapters/healthy", meant="models/merged", tried="u"),
        given(
            "verify", "models/merged", "--base", "model/base", "--adapter", "adapters/healthy",
            meant="models/base", tried="v",
        ),
        given(
            "verify", "models/merged", *HEALTHY, "--adapter", "adapter/healthy", meant="adapters/healthy", tried="w"
        ),
        given(
            "verify", "models/merged", *HEALTHY, "--adapter", "adapters/healthy", "--candidate", "adaptrs/healthy",
            meant="adapters/healthy", tried="x",
        ),
    ],
)  # fmt: skip
def test_a_mistyped_name_of_the_command_line(hub, capfd, words, meant) -> None:
    assert main([*words]) == 2
    assert hub.requests == []
    assert meant in capfd.readouterr().err


@pytest.mark.parametrize(
    ("base", "adapter", "meant"),
    [
        pytest.param(base, adapter, meant, id=key, marks=pytest.mark.attempt(key, f"{base} {adapter}", "exit 2"))
        for key, base, adapter, meant in (
            ("D1-y1", "models/base", "adaptors/healthy", "adapters/healthy"),
            ("D1-y2", "model/base", "adapters/healthy", "models/base"),
            ("D1-y3", "{model: MODELS/base}", "adapters/healthy", "models/base"),
            ("D1-y4", "models/base", "{path: adapters/healthy, base: model/base}", "models/base"),
            ("D1-y5", "models/base", "{path: adaptrs/healthy, name: x}", "adapters/healthy"),
        )
    ],
)
def test_a_mistyped_name_in_a_file(hub, capfd, base, adapter, meant) -> None:
    Path("gate.yml").write_text(f"version: 1\nbase: {base}\nadapters:\n  - {adapter}\n")
    for command in (("run",), ("run", "--plan"), ("check",)):
        assert main([*command, "gate.yml"]) == 2
        error = capfd.readouterr().err
        assert meant in error
        assert "gate.yml:" in error, "the line is named"
    assert hub.requests == []


@pytest.mark.attempt("D1-z1", "models/base in ci/gate.yml, relative to the repository", "exit 2, no request")
def test_a_config_in_a_folder_of_its_own(hub: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    Path("ci/gate.yml").write_text("version: 1\nbase: models/base\nadapters: [adapters/healthy]\n")
    assert main(["run", "ci/gate.yml"]) == 2
    error = capfd.readouterr().err
    assert '"../models/base"' in error
    assert '"../adapters/healthy"' in error
    assert hub.requests == []


@pytest.mark.parametrize(
    "named",
    [
        pytest.param(name, marks=pytest.mark.attempt(key, f"adapter_config.json names {name}", "error, no request"))
        for key, name in (("D1-z2", "model/base"), ("D1-z3", "models/base-1b"), ("D1-z4", "Base"), ("D1-z5", "ci/base"))
    ],
)
@pytest.mark.parametrize(
    "revision",
    [
        None,
        pytest.param("main", marks=pytest.mark.attempt("Y57", 'adapter_config.json "revision": "main"', "no request")),
    ],
)
def test_a_base_of_the_trainers_machine(hub, capfd, named, revision) -> None:
    """adapter_config.json may name a path of another machine. The adapter is not judged."""
    lay_adapter(Path("adapters/foreign"), base=named, revision=revision)
    for command, code in ((("run",), 3), (("run", "--plan"), 3), (("check",), 3)):
        assert main([*command, "adapters/foreign"]) == code
        assert hub.requests == []
    assert main(["run", "adapters/foreign", "-o", "out"]) == 3
    (adapter,) = json.loads(Path("out/report.json").read_text())["adapters"]
    (finding,) = (finding for finding in adapter["findings"] if finding["check"] == "not-judged")
    assert "base_model_name_or_path" in finding["message"]
    assert "--base" in finding["hint"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("acme/healthy-lora", *HEALTHY), "acme/healthy-lora"),
        (("hub:adaptors/healthy", *HEALTHY), "adaptors/healthy"),
        (("adaptors/healthy", "--revision", "v1", *HEALTHY), "adaptors/healthy"),
        (("hub:acme/healthy-lora", "--base", "hub:model/base"), "acme/healthy-lora"),
    ],
)
def test_what_is_on_the_hub_is_fetched(hub: LoopbackHub, words: tuple[str, ...], asked: str) -> None:
    """The strangers' adapter is damaged, which shows that it was judged."""
    assert main(["run", *words, "-o", "out"]) == 1
    (adapter,) = json.loads(Path("out/report.json").read_text())["adapters"]
    assert (adapter["source"], adapter["cause"]) == (asked, "file-corrupt")
    assert any(asked in path for path in hub.paths())


def test_the_same_in_a_file(hub: LoopbackHub) -> None:
    """The marker is no part of a name: an adapter that inherits the base inherits its revision too."""
    Path("gate.yml").write_text(
        "version: 1\nbase: {model: 'hub:acme/llama', revision: v1}\nadapters:\n"
        "  - {path: 'hub:adaptors/healthy', name: a}\n  - {path: adaptors/healthy, revision: v1, name: b}\n"
        "  - {path: adapters/healthy, base: 'hub:acme/llama'}\n"
    )
    assert main(["run", "gate.yml", "-o", "out"]) == 1
    adapters = json.loads(Path("out/report.json").read_text())["adapters"]
    assert [adapter["cause"] for adapter in adapters] == ["file-corrupt"] * 3
    assert {adapter["base"]["model"] for adapter in adapters} == {"acme/llama"}
    assert [adapter["base"]["revision"] for adapter in adapters] == ["v1"] * 3


def test_right_names_ask_nobody(hub: LoopbackHub) -> None:
    assert main(["run", "adapters/healthy", *HEALTHY, "-o", "out"]) == 1
    assert hub.requests == []


@pytest.mark.parametrize("name", ["hub:./adapters/healthy", "hub:", "hub:healthy", "hub:acme/*", "hub:a/b/c"])
def test_the_marker_before_what_is_no_id(hub: LoopbackHub, capfd: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["run", name, *HEALTHY]) == 2
    assert "hub:owner/name" in capfd.readouterr().err
    assert hub.requests == []


@pytest.mark.attempt("D1-first", "an id that the Hub does not have", "the message begins with the directory")
def test_a_message_of_the_hub_begins_with_the_directory(hub: LoopbackHub) -> None:
    assert main(["run", "acme/unknown", *HEALTHY, "-o", "out"]) == 3
    (adapter,) = json.loads(Path("out/report.json").read_text())["adapters"]
    assert adapter["findings"][0]["message"].startswith("'acme/unknown' is not a directory here, and ")
    assert any(request.token == os.environ["HF_TOKEN"] for request in hub.requests), "the token is what is at stake"
