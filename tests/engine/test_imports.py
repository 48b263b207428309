"""Imports in less time: what transformers and PEFT are afterwards is what they are without, and so is a merge."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.engine import imports
from merge_gate.engine.child import judge_job
from merge_gate.engine.process import OFFLINE, WorkerProcess
from merge_gate.engine.protocol import Event, Group, Job, Merged, Task
from merge_gate.records.report import Sandbox
from merge_gate.sources.preflight import preflight
from tests.command import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.models import Shelf

PLAIN = "import contextlib\nquick = contextlib.nullcontext()\n"
QUICK = "from merge_gate.engine.imports import quick_imports\nquick = quick_imports()\n"
IMPORTS = """
import json, sys
before = list(sys.meta_path)
with quick:
    import peft, transformers, transformers.models, transformers.loss.loss_utils as losses
    is_there = "scipy.optimize._optimize" in sys.modules
"""
SAID = """
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from transformers.utils import import_utils
found = {
    "names": sorted(dir(transformers)),
    "models": sorted(dir(transformers.models)),
    "modules": sorted(transformers.models._modules),
    "losses": {name: f"{one.__module__}.{one.__name__}" for name, one in losses.LOSS_MAPPING.items()},
    "scipy": transformers.utils.is_scipy_available(),
    "reading": type(import_utils.create_import_structure_from_path).__name__,
    "matching": [side.tolist() for side in linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])],
    "finders": [type(one).__name__ for one in sys.meta_path if one not in before],
    "peft": sorted(dir(peft)),
}
import scipy.optimize
found["scipy's"] = sorted(dir(scipy.optimize))
print(json.dumps([is_there, found]))
"""


def said(script: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(**OFFLINE), check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def printed(script: str) -> list[str]:
    """What a fresh interpreter prints, with `quick` at hand."""
    done = subprocess.run([sys.executable, "-c", QUICK + script], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_libraries_are_what_they_are_without() -> None:
    plain, quick = said(PLAIN + IMPORTS + SAID), said(QUICK + IMPORTS + SAID)
    assert quick[1] == plain[1]
    assert (plain[0], quick[0]) == (True, False), "nothing is saved any more"


def test_whoever_wants_more_of_scipy_gets_it_meanwhile() -> None:
    script = (
        "with quick:\n    import scipy.optimize._zeros_py, scipy.optimize\n"
        "    from scipy.optimize import brentq, minimize\n"
        "print(round(brentq(lambda x: x - 2, 0, 9)), scipy.optimize.minimize is minimize)"
    )
    assert printed(script) == ["2 True"]


def test_without_scipy_nothing_stands_in_its_place() -> None:
    script = "import sys\nwith quick:\n    pass\nprint('scipy.optimize' in sys.modules, 'scipy' in sys.modules)"
    assert printed(script) == ["False False"]


def test_who_looks_at_every_module_imports_nothing_by_it() -> None:
    """As inspect does, for `__wrapped__` and its like; any other name is the real module's."""
    script = (
        "import sys\nwith quick:\n    import scipy.optimize as one\n"
        "    print(hasattr(one, '__wrapped__'), type(sys.modules['scipy.optimize']).__name__)\n"
        "    print(one.brentq.__module__, type(sys.modules['scipy.optimize']).__name__)"
    )
    assert printed(script) == ["False _Optimize", "scipy.optimize._zeros_py module"]


READS = "def create_import_structure_from_path(path):\n    return [path]\n"


@pytest.mark.parametrize(("source", "is_remembered"), [(READS, True), ("other = len\n", False)])
def test_only_the_function_that_reads_gets_a_memory(
    source: str, is_remembered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release without it is imported as it is."""
    (tmp_path / "structures.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "_STRUCTURES", "structures")
    with imports.quick_imports():
        module = importlib.import_module("structures")
        meanwhile = dict(vars(module))
    assert sys.modules.pop("structures") is module
    changed = {name for name, value in vars(module).items() if meanwhile[name] is not value}
    assert changed == ({"create_import_structure_from_path"} if is_remembered else set()), "and is put back"


def test_the_worker_merges_as_this_process_does(shelf: Shelf) -> None:
    """The worker imports in less time; this process has imported everything as it comes."""
    files = preflight(str(shelf.adapter("plain")), allow_pickle=False)
    base = shelf.base("llama")
    group = Group(label="base", directory=str(base), dtype="float32", tasks=(Task(index=0, files=(files,)),))
    job = Job(groups=(group,), device="cpu")
    heard: list[Event] = []
    with WorkerProcess() as child:
        assert child.run(job, heard.append, is_overdue=lambda: False) is None
    here = [one for one in judge_job(job, heard.append, Sandbox()) if isinstance(one, Merged)]
    there = [one for one in heard if isinstance(one, Merged)]
    assert len(here) == 1
    assert [timeless(one) for one in there] == [timeless(one) for one in here]


def timeless(event: Merged) -> Merged:
    return replace(event, evidence=replace(event.evidence, seconds=0.0))
