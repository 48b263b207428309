"""What `--plan` says: how each base would be read, what would be downloaded and written. Nothing of that is done."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.config.load_config import load_config
from merge_gate.files import hub, resolve
from merge_gate.records.options import RunOptions
from merge_gate.report.stored.report_files import write_report
from merge_gate.run import groups
from merge_gate.run.planned_run import plan_run
from merge_gate.worker.memory import MemoryGroup
from tests.support.command import PATIENCE_S, children_of, environment, merge_gate
from tests.support.faults import LFS_POINTER, overwrite, poison
from tests.support.hub import LoopbackHub
from tests.support.models import Shelf
from tests.support.reports import PASS
from tests.support.wording import Wording

BASE = "acme/llama"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is free of the machine: bytes of memory and of the disk."""
    free = SimpleNamespace(memory=3 << 30, disk=5_000_000_000)
    monkeypatch.setattr(MemoryGroup, "free_bytes", lambda _: free.memory)
    monkeypatch.setattr(hub, "free_disk_bytes", lambda _: free.disk)
    return free


@pytest.fixture
def place(shelf: Shelf, tmp_path: Path, free: SimpleNamespace) -> Path:
    """Two adapters that can be merged, one that cannot, and a base."""
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    for name in ("a", "b", "c"):
        shutil.copytree(shelf.adapter("plain"), tmp_path / "adapters" / name)
    overwrite(LFS_POINTER)(tmp_path / "adapters" / "c")
    return tmp_path


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.serve_this_process(monkeypatch, place / "cache")
        for name, directory in ((BASE, place / "base"), ("acme/lora", place / "adapters" / "a")):
            server.add_repo(name, {file.name: file.read_bytes() for file in directory.iterdir()})
        yield server


def planned(place: Path, options: RunOptions = RunOptions(), **config: Any) -> str:  # noqa: B008 - it is frozen
    path = place / "gate.yml"
    path.write_text(json.dumps({"version": 1, "base": "./base", "adapters": ["./adapters/*"]} | config))
    return plan_run(load_config(str(path)), options, lambda _: None, width=1000)[0].replace(str(place), "PLACE")


def fetched(place: Path) -> set[str]:
    return {path.name for path in (place / "cache").rglob("*") if path.is_symlink() or path.suffix == ".safetensors"}


def everything(place: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and directory but the configuration, with its time and bytes."""
    paths = (path for path in place.rglob("*") if path.name != "gate.yml")
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def test_a_base_in_a_directory(place: Path, wording: Wording) -> None:
    options = RunOptions(output="report", features={"cache": str(place / "verdicts")})
    text = planned(place, options, base={"model": "./base", "dtype": ["float32", "bfloat16"]}, publish="models")
    wording(text)
    assert not {"report", "models", "verdicts"} & {path.name for path in place.iterdir()}


def test_a_plan_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also leaves what a run would remove or move: what killed runs left, and the earlier report."""
    write_report(PASS, str(place / "report"))
    (place / "models" / ".a.partial").mkdir(parents=True)
    verdicts = place / "verdicts" / "verdicts"
    verdicts.mkdir(parents=True)
    unfinished = verdicts / f".{'0' * 64}.{'0' * 16}.tmp"
    for path in (unfinished, verdicts / ("0" * 64)):
        path.touch()
        os.utime(path, (0, 0))
    before = everything(place)
    hashed: list[object] = []
    monkeypatch.setattr(resolve, "digest_file", lambda path, *_: hashed.append(path))
    options = RunOptions(device="cuda", output=str(place / "report"), features={"cache": str(place / "verdicts")})
    earlier = set(threading.enumerate())
    assert "2 merges" in planned(place, options, publish="models")
    for thread in set(threading.enumerate()) - earlier:
        thread.join(PATIENCE_S)
    assert not hashed, "a base may be large"
    assert not children_of(os.getpid()), "a worker was started"
    assert everything(place) == before


def test_lines_are_as_wide_as_the_terminal(place: Path) -> None:
    planned(place)
    text, _ = plan_run(load_config(str(place / "gate.yml")), RunOptions(), lambda _: None, width=50)
    assert max(map(len, text.splitlines())) <= 50


def test_a_base_that_the_worker_does_not_map(place, free, wording, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(groups, "network_file_system", lambda _: "nfs4")
        wording(planned(place))
    free.memory = 4000
    wording(planned(place))


@pytest.mark.parametrize(("free_bytes", "access"), [(5_000_000_000, None), (2_000_000_000, None), (10, "download")])
def test_a_base_and_an_adapter_on_the_hub(free_bytes, access, free, server, place, wording) -> None:
    """No weights are fetched."""
    free.disk = free_bytes
    base = {"model": BASE, "access": access} if access else BASE
    text = planned(place, base=base, adapters=["acme/lora", "./adapters/b"])
    wording(re.sub(r" at [0-9a-f]{12} ", " at COMMIT ", text))  # the files have the version of transformers
    assert fetched(place) <= {"adapter_config.json", "config.json"}
    assert not [*(place / "cache").rglob("refs/*")]
    assert not any("/cdn/" in path for path in server.paths())


def test_what_is_in_the_cache_is_read_from_there(server: LoopbackHub, place: Path) -> None:
    plain = planned(place, base="./base", adapters=["./adapters/a"])
    hub.Repository(repo_id=BASE, revision=None, notify=lambda _: None).fetch(lambda names, _: tuple(names))
    before = everything(place / "cache")
    cached = planned(place, base=BASE, adapters=["./adapters/a"])
    assert everything(place / "cache") == before
    assert cached.splitlines()[3:] == plain.splitlines()[3:], "from the weights to the time"
    assert "mapped" in cached


def test_an_unknown_base_is_an_error_of_its_adapters(server: LoopbackHub, place: Path) -> None:
    text = planned(place, base="acme/nothing")
    assert "on 0 bases" in text
    assert "they cannot be judged:\n  a (auto): could not be judged" in text
    assert "wrong   the base 'acme/nothing'" in text or "wrong   'acme/nothing'" in text
    assert "to do" in text
    assert "estimate" not in text


@pytest.mark.parametrize(("is_damaged", "code"), [(False, 3), (True, 1)])
def test_the_exit_code_is_that_of_the_run(
    place: Path, is_damaged: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_damaged:
        (place / "adapters" / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    adapters = [str(place / "adapters" / name) for name in "ab"]
    config = json.loads((place / "adapters" / "a" / "adapter_config.json").read_text())
    for name in "ab":
        text = json.dumps(config | {"base_model_name_or_path": "/mnt/train/llama"})
        (place / "adapters" / name / "adapter_config.json").write_text(text)
    assert main(["run", *adapters, "--plan"]) == code
    text = capsys.readouterr().out
    assert text.count("not-judged\n    wrong   the base '/mnt/train/llama' is not a directory here") == 2 - is_damaged
    assert text.count("    to do") == 2
    assert ("a (auto): failed, file-corrupt\n    wrong" in text) is is_damaged


@pytest.mark.slow
def test_what_earlier_runs_stored_is_in_the_plan(place: Path, wording: Wording) -> None:
    """A verdict needs no merge."""
    poison("lora_B")(place / "adapters" / "a")
    options = RunOptions(features={"cache": str(place / "verdicts")})
    planned(place, options)
    time.sleep(2.0)  # a digest is remembered only of files that are older
    answer = merge_gate("run", "gate.yml", "--cache", "verdicts", "--only", "b", cwd=place)
    assert answer.code == 0, answer.said
    wording(planned(place, options))


WITHOUT_TORCH = """
import sys
from merge_gate.cli.dispatch import main
code = main(["run", "gate.yml", "--plan", "--cache", "verdicts", "--publish", "models"])
print(code, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_the_command_prints_the_plan_without_torch_or_a_report(place: Path) -> None:
    text = planned(place)
    before = everything(place)
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH], cwd=place, env=environment(), stdout=subprocess.PIPE, check=True
    )
    *lines, last = done.stdout.decode().splitlines()
    assert last == "1 False False"
    assert lines[0] == text.splitlines()[0].replace("PLACE/", "")
    assert everything(place) == before


def test_a_plan_in_a_container_is_refused(place: Path) -> None:
    planned(place)
    answer = merge_gate("run", "gate.yml", "--plan", "--container", cwd=place)
    assert answer.code == 2, answer.said
    assert "--plan" in answer.err
