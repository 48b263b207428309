"""Names become files: each adapter and base is read once, and what goes wrong is a finding of that adapter alone."""

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.files import resolve
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.records.config import AdapterSpec
from merge_gate.records.files import Entry
from tests.support.wording import Wording

NO_TENSORS = b"\x02\0\0\0\0\0\0\0{}"
CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "base_model_name_or_path": "./base"}


def lay_adapter(directory: Path, **changes: Any) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "adapter_model.safetensors").write_bytes(NO_TENSORS)


def lay_base(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(NO_TENSORS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    lay_base(tmp_path / "base")
    lay_adapter(tmp_path / "one")
    lay_adapter(tmp_path / "two")
    return tmp_path


def asked(place: Path, *adapters: str | Mapping[str, Any]) -> tuple[Inputs, tuple[AdapterSpec, ...]]:
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": adapters}))
    config = load_config(str(place / "gate.yml"))
    return Inputs(config, Fetching(notify=pytest.fail)), config.adapters


def prepared(place: Path, *adapters: str | Mapping[str, Any]) -> dict[str, Entry]:
    inputs, specs = asked(place, *adapters)
    return {spec.name: inputs.prepare(spec) for spec in specs}


def why(one: Entry, check: str = "not-judged") -> str:
    assert one.problem.check == check
    assert one.problem.hint
    return one.problem.message


def test_an_adapter_and_the_base_that_it_names(place: Path) -> None:
    one = prepared(place, "./one")["one"]
    assert one.problem is None
    assert one.files.directory == str(place / "one")
    assert one.base.directory == str(place / "base")
    assert one.base.name == "./base", "as the adapter names it: a report has no path of this machine that nobody wrote"


def test_a_base_that_the_adapter_names_is_by_a_linked_config(place, tmp_path_factory) -> None:
    """As the adapters that it lists: the directory of the link counts, not that of its target."""
    prepared(place, "./one")
    target = tmp_path_factory.mktemp("elsewhere") / "gate.yml"
    (place / "gate.yml").rename(target)
    (place / "gate.yml").symlink_to(target)
    config = load_config(str(place / "gate.yml"))
    (base,) = [Inputs(config, Fetching(notify=pytest.fail)).prepare(spec).base for spec in config.adapters]
    assert base.directory == str(place / "base")


def test_each_is_read_once(place: Path) -> None:
    """What is read is gone when a combination needs it again."""
    members = {"adapters": ["one", "two"], "weights": [0.5, 0.5], "method": "linear"}
    inputs, specs = asked(place, "./one", "./two", {"name": "sum", "combine": members})
    one, two = map(inputs.prepare, specs[:2])
    for name in ("one", "two"):
        shutil.rmtree(place / name)
    (place / "base" / "model.safetensors").unlink()
    both = inputs.prepare(specs[2])
    assert both.members == (one.files, two.files)
    assert both.base == one.base == two.base is not None


def test_a_file_that_cannot_be_read_costs_what_it_is_part_of(place: Path) -> None:
    weights = place / "two" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(weights.name)
    members = {"adapters": ["one", "two"], "weights": [0.5, 0.5], "method": "linear"}
    found = prepared(place, "./one", "./two", {"name": "sum", "combine": members})
    assert found["one"].problem is None
    assert "'adapter_model.safetensors'" in why(found["two"])
    assert why(found["sum"]) == why(found["two"])


def test_an_adapter_that_names_no_base(place: Path, wording: Wording) -> None:
    lay_adapter(place / "alone", base_model_name_or_path=None)
    wording(why(prepared(place, "./alone")["alone"]))
    (place / "alone/adapter_config.json").unlink()
    wording(why(prepared(place, "./alone")["alone"]))


@pytest.mark.parametrize("named", ["a" * 5000, "a/" + "b" * 300])
def test_a_name_that_no_file_system_takes_is_no_directory(named: str, place: Path, wording: Wording) -> None:
    lay_adapter(place / "odd", base_model_name_or_path=named)
    one = prepared(place, "./odd")["odd"]
    assert "Hub id" in why(one)
    wording(one.problem.hint)


def test_a_base_of_the_config_is_not_blamed_on_the_adapter(place: Path) -> None:
    (place / "base" / "model.safetensors").unlink()
    one = prepared(place, {"path": "./one", "base": "./base"})["one"]
    assert "model.safetensors" in why(one, "base-incomplete")
    assert "adapter_config.json" not in one.problem.hint


@pytest.mark.parametrize("named", ["/" + "a" * 5000, "/x\0y"])
def test_a_base_name_that_nobody_thought_of_costs_its_adapter(named: str, place: Path) -> None:
    """An unexpected exception, whose message depends on the version of Python."""
    lay_adapter(place / "odd", base_model_name_or_path=named)
    found = prepared(place, "./odd", "./one")
    assert found["odd"].problem is not None
    assert found["one"].problem is None


def limited(place: Path, timeout_s: float | None) -> Entry:
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": ["./one"]}))
    config = load_config(str(place / "gate.yml"))
    return Inputs(config, Fetching(notify=pytest.fail), timeout_s=lambda _: timeout_s).prepare(config.adapters[0])


def test_headers_that_arrive_in_time_are_read(place: Path) -> None:
    assert limited(place, 60.0).problem is None
    (place / "base" / "model.safetensors").write_bytes(b"")
    assert why(limited(place, 60.0), "base-incomplete") == why(limited(place, None), "base-incomplete")


def test_a_base_whose_mount_does_not_answer_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()
    monkeypatch.setattr(resolve.base_files, "read_base", lambda *_, **__: ends.wait(60))
    assert "0.1 s" in why(limited(place, 0.1))
    ends.set()
