"""A base that is pinned by its digests: another one of the same shape never passes. The worker is played."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.files import base_watch
from merge_gate.records.measured import BaseFacts
from tests.support.hub import LoopbackHub
from tests.support.judging.cases import base as base_facts
from tests.support.played_merges import base_digest, lay, play, played

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OTHER = "0" * 64


@pytest.fixture
def place(tmp_path: Path, cwd: Path) -> Path:
    lay(tmp_path, names=["one"])
    return tmp_path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def other_weights(place: Path) -> None:
    """Another base of the same shape, in the same directory."""
    weights = place / "base" / WEIGHTS[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")


def gate(place: Path, sha256: Any = None, **config: Any) -> int:
    base = {"model": "./base"} | ({"sha256": sha256} if sha256 is not None else {})
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./one"]} | config))
    return play(place, adapters=["gate.yml"])


def report(place: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((place / "merge-gate-report" / "report.json").read_text())
    return loaded


def cause(place: Path) -> tuple[str, str | None, str]:
    (adapter,) = report(place)["adapters"]
    first = next(iter(adapter["findings"]), {"origin": ""})
    return adapter["verdict"], adapter["cause"], first["origin"]


@pytest.mark.attempt("D3a", "another base of the same shape in ./base, pinned by its digest", "expectation-failed")
def test_the_digest_of_the_report_pins_a_base(place: Path) -> None:
    assert gate(place) == 0
    (listed,) = report(place)["bases"]
    assert listed["sha256"] == base_digest(place)
    assert gate(place, listed["sha256"].upper()) == 0
    other_weights(place)
    assert gate(place) == 0, "without a pin nothing is known about it"

    assert gate(place, listed["sha256"]) == 1
    assert cause(place) == ("failed", "expectation-failed", "base")
    assert report(place)["adapters"][0]["coverage"]["modules_merged"] == 0


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(name, marks=pytest.mark.attempt(f"D3b{number}", f"another {name}", "expectation-failed"))
        for number, name in enumerate((*WEIGHTS, "config.json", "model.safetensors.index.json"))
    ],
)
def test_files_pin_a_base(place: Path, changed: str) -> None:
    files = {path.name: digest(path) for path in (place / "base").iterdir()}
    assert gate(place, files) == 0
    path = place / "base" / changed
    path.write_bytes(path.read_bytes() + b" " if path.suffix == ".json" else path.read_bytes()[:-1] + b"\x3c")
    assert gate(place, files) == 1
    assert cause(place) == ("failed", "expectation-failed", "base")
    (adapter,) = report(place)["adapters"]
    assert changed in adapter["findings"][0]["message"]


@pytest.mark.attempt("D3c", "a pinned file that the base does not have", "expectation-failed")
def test_a_file_that_is_absent(place: Path) -> None:
    assert gate(place, {"tokenizer.json": OTHER}) == 1
    assert cause(place) == ("failed", "expectation-failed", "base")


@pytest.mark.attempt("D3d", "--expect base-sha256=…", "expectation-failed")
def test_the_option(place: Path) -> None:
    assert play(place, "--expect", f"base-sha256={base_digest(place)}") == 0
    assert play(place, "--expect", f"base-sha256={OTHER}") == 1
    assert cause(place) == ("failed", "expectation-failed", "base")
    assert play(place, "--expect", "base-sha256=main") == 2


def test_an_adapter_has_a_pin_of_its_own(place: Path) -> None:
    entries = [
        {"path": "./one", "base": {"sha256": OTHER}},
        {"path": "./one", "name": "two", "base": {"model": "./base"}},
    ]
    assert gate(place, base_digest(place), adapters=entries) == 1
    assert [adapter["verdict"] for adapter in report(place)["adapters"]] == ["failed", "passed"]
    (place / "elsewhere").mkdir()
    for path in (place / "base").iterdir():
        (place / "elsewhere" / path.name).write_bytes(path.read_bytes())
    other_weights(place)
    assert gate(place, OTHER, adapters=[{"path": "./one", "base": "./elsewhere"}]) == 0, "another model, no pin"


def test_a_severity_counts(place: Path) -> None:
    assert gate(place, OTHER, checks={"expectation-failed": "warning"}) == 0
    assert "expectation-failed" in {finding["check"] for finding in report(place)["adapters"][0]["findings"]}
    assert gate(place, OTHER, checks={"expectation-failed": "off"}) == 0
    assert report(place)["adapters"][0]["findings"] == []


def test_a_base_that_cannot_be_hashed_is_not_judged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(base_watch.resolve, "digest_files", fail)
    assert gate(place, OTHER) == 3
    assert cause(place)[:2] == ("error", "not-judged")


@pytest.fixture
def hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.serve_this_process(monkeypatch, place / ".cache")
        server.add_repo("acme/llama", {path.name: path.read_bytes() for path in (place / "base").iterdir()})
        yield server


def streamed(place: Path, pin: str, facts: BaseFacts) -> int:
    base = {"model": "hub:acme/llama", "access": "stream", "sha256": pin}
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./one"]}))
    with played(place / "base", changes={"base": facts}):
        return main(["run", "gate.yml"])


@pytest.mark.usefixtures("hub")
def test_a_streamed_base_is_compared_before_its_bytes_arrive(place: Path) -> None:
    assert streamed(place, OTHER, base_facts(dtype="bfloat16")) == 1
    assert cause(place) == ("failed", "expectation-failed", "base")


@pytest.mark.usefixtures("hub")
@pytest.mark.attempt("D3f", "a pinned base whose bytes were not all read", "error")
def test_a_part_of_a_streamed_base_proves_nothing(place: Path) -> None:
    """The played worker reads no bytes, and says nothing of it."""
    assert streamed(place, base_digest(place), base_facts(dtype="bfloat16")) == 3
    assert cause(place)[:2] == ("error", "not-judged")
