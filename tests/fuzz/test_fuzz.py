"""The parsers of what strangers write stand any bytes: those that are kept, and a minute of others."""

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from merge_gate import features
from merge_gate.worker.call_service import Service
from merge_gate.worker.channel import FROM_WORKER
from merge_gate.worker.encoding import GarbledError, decoded
from merge_gate.worker.protocol import Event, Idle, PickleListed
from tests.support.fuzz import targets
from tests.support.fuzz.targets import TARGETS, OutOfBoundsError, bounded
from tests.tools import fuzz
from tests.tools.fuzz import CORPUS, ROOT

HOW_LONG = [("--plain", "--runs=500"), pytest.param(("--seconds=8",), marks=pytest.mark.slow)]
"""Options of `tests.tools.fuzz`: a fixed number of inputs, or a guided search for some seconds."""


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus_inputs_never_crash(path: Path) -> None:
    bounded(TARGETS[path.parent.name])(path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS) == set(fuzz.NAMES)


def test_the_corpus_has_every_event_and_every_call() -> None:
    """And what the parent makes itself, which it refuses from a worker."""
    kinds = (*get_args(Event), PickleListed, *get_args(targets.CALLS))
    assert {path.name for path in (CORPUS / "message").iterdir()} == {kind.__name__ for kind in kinds}
    for kind in kinds:
        data = (CORPUS / "message" / kind.__name__).read_bytes()
        if kind is Idle:
            with pytest.raises(GarbledError):
                decoded(data, FROM_WORKER)
        else:
            assert type(decoded(data, FROM_WORKER | targets.CALLS)) is kind


def test_every_call_of_a_feature_is_fuzzed() -> None:
    for module in pkgutil.walk_packages(features.__path__, f"{features.__name__}."):
        importlib.import_module(module.name)
    services = [one for one in Service.__subclasses__() if one.__module__.startswith(features.__name__)]
    assert {call for service in services for call in service.calls} == set(get_args(targets.CALLS))


@pytest.mark.parametrize("name", fuzz.NAMES)
@pytest.mark.parametrize("how_long", HOW_LONG, ids=["few", "seconds"])
def test_mutated_inputs_never_crash(name: str, how_long: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, fuzz.__file__, name, "--seed=1", *how_long, f"--keep={tmp_path}"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counted = re.search(rf"^{name}: ([\d,]+) inputs", ended.stdout)
    assert counted, ended.stdout
    assert int(counted[1].replace(",", "")) > len([*(CORPUS / name).iterdir()])
    assert not [*tmp_path.iterdir()]


def test_an_input_that_brings_a_parser_down_is_kept(tmp_path, monkeypatch, capsys) -> None:
    def parser(data: bytes) -> None:
        if b"lora" not in data:
            raise ZeroDivisionError

    monkeypatch.setitem(targets.TARGETS, "headers", parser)
    asked = argparse.Namespace(alone="headers", seed=1, runs=10_000, seconds=60, keep=tmp_path)
    assert fuzz.plainly(asked) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert b"lora" not in kept.read_bytes()


def test_time_of_an_input_is_bounded() -> None:
    def slow(_: bytes) -> None:
        end_s = time.process_time() + targets.LONGEST_CPU_S
        while time.process_time() < end_s:
            pass

    with pytest.raises(OutOfBoundsError, match=r"took 1\.\d\d s"):
        bounded(slow)(b"")


def test_memory_of_an_input_is_bounded() -> None:
    """In a process of its own: the peak of this one may be above all that is taken here."""
    code = """if True:
        from tests.support.fuzz.targets import OutOfBoundsError, bounded
        hold = bounded(lambda data: bytearray(b"x") * len(data) * 2**20)
        hold(bytes(1))
        try:
            hold(bytes(300))
        except OutOfBoundsError as error:
            print(error)
    """
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"300 bytes of input took .* s and 3\d\d MiB", ended.stdout)
