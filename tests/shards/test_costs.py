"""What an entry is likely to cost, whatever stands in its files: what is wrong with them, the preflight says."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.files import identity
from merge_gate.shards import costs
from merge_gate.shards.costs import LOAD_BYTES, MERGE_BYTES, Cost, Costs


def cost(place: Path, named: bytes | None) -> Cost:
    """The cost of an adapter of 10 bytes whose adapter_config.json holds this."""
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 10)
    if named is not None:
        (place / "adapter" / "adapter_config.json").write_bytes(named)
    (place / "gate.yml").write_text("version: 1\nadapters: [./adapter]\n", encoding="utf-8")
    config = load_config(str(place / "gate.yml"))
    return Costs(config).of(config.adapters[0])


def config_of(name: object) -> bytes:
    return json.dumps({"base_model_name_or_path": name}).encode()


@pytest.mark.parametrize(
    ("named", "base"),
    [
        (config_of("acme/base"), "acme/base"),
        (config_of("x" * 5000), "x" * 5000),
        (config_of("a\0b"), "a\0b"),
        (config_of(3), ""),
        (config_of(None), ""),
        (b"[]", ""),
        (b"{", ""),
        (b"[" * 100_000, ""),
        (b" " * (1 << 21), ""),
        (None, ""),
    ],
)
def test_a_base_is_known_by_the_name_that_the_adapter_gives(tmp_path: Path, named: bytes | None, base: str) -> None:
    found = cost(tmp_path, named)
    assert found == Cost(base=(base, ""), read_bytes=LOAD_BYTES, merge_bytes=MERGE_BYTES + 10)


def test_a_base_that_is_not_there_has_no_size(tmp_path: Path) -> None:
    found = cost(tmp_path, config_of("/nowhere/base"))
    assert found.base[0].endswith("../nowhere/base")
    assert found.read_bytes == LOAD_BYTES


@pytest.mark.parametrize("hangs", ["sizes", "directory"])
def test_a_base_on_a_mount_that_does_not_answer_has_no_size(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    never, asked = threading.Event(), list[str]()
    own = Path.is_dir

    def hang(directory: str) -> None:
        asked.append(directory)
        never.wait()

    def is_dir(self: Path) -> bool:
        if self.name == "base":
            hang(str(self))
        return own(self)

    if hangs == "sizes":
        monkeypatch.setattr(identity, "base_identity", hang)
    else:
        monkeypatch.setattr(Path, "is_dir", is_dir)
    for module in (identity, costs):
        monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.05)
    found = cost(tmp_path, config_of("./base"))
    never.set()
    assert asked == [str(tmp_path / "base")]
    assert found.read_bytes == LOAD_BYTES


def test_a_base_beside_the_config_has_its_size(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"0" * 1000)
    found = cost(tmp_path, config_of("./base"))
    assert found == Cost(base=("base", ""), read_bytes=LOAD_BYTES + 1000, merge_bytes=MERGE_BYTES + 1010)


def test_an_adapter_that_is_gone_has_no_size(tmp_path: Path) -> None:
    cost(tmp_path, None)
    config = load_config(str(tmp_path / "gate.yml"))
    shutil.rmtree(tmp_path / "adapter")
    assert Costs(config).of(config.adapters[0]).merge_bytes == MERGE_BYTES
