"""Imports in less time: what transformers and PEFT are afterwards is what they are without, and so is a merge."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import transformers
from packaging.version import Version

from merge_gate.files.preflight import preflight
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker import quick_imports, sandbox
from merge_gate.worker.child import judge_job
from merge_gate.worker.process import OFFLINE, WorkerProcess
from merge_gate.worker.protocol import Event, Group, Job, Merged, Task
from merge_gate.worker.supervisor import Attempt
from tests.support.command import environment
from tests.support.engine.base_headers import base_files
from tests.support.models import Shelf

PLAIN = "import contextlib\nquick = contextlib.nullcontext()\n"
QUICK = "from merge_gate.worker.quick_imports import quick_imports\nquick = quick_imports()\n"
IMPORTS = """
import inspect, json, sys
with quick:
    import peft, transformers, transformers.models, transformers.loss.loss_utils as losses
    are_there = "scipy.optimize._optimize" in sys.modules
"""
SAID = """
import fsspec, torch
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from transformers.utils import import_utils
marked = transformers.generation.continuous_batching.cache.PagedAttentionCache.update
found = {
    "names": sorted(dir(transformers)),
    "models": sorted(dir(transformers.models)),
    "modules": sorted(transformers.models._modules),
    "losses": {name: f"{one.__module__}.{one.__name__}" for name, one in losses.LOSS_MAPPING.items()},
    "scipy": transformers.utils.is_scipy_available(),
    "statistics": "scipy.stats" in sys.modules,
    "reading": import_utils.create_import_structure_from_path.cache_parameters(),
    "matching": [side.tolist() for side in linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])],
    "peft": sorted(dir(peft)),
    "plugins": sorted(fsspec.available_protocols()),
    "compiled": [torch.compile.__module__, torch.compile(len) is len, torch.compiler.disable(len)([1])],
    "marked": [marked.__module__, marked.__qualname__, str(inspect.signature(marked))],
}
import scipy.optimize
found["scipy's"] = sorted(dir(scipy.optimize))
print(json.dumps([are_there, found]))
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


@pytest.mark.slow
def test_libraries_are_what_they_are_without() -> None:
    plain, quick = said(PLAIN + IMPORTS + SAID), said(QUICK + IMPORTS + SAID)
    assert quick[1] == plain[1]
    uses_scipy = plain[1]["statistics"]  # by scikit-learn, which older releases of transformers import
    assert (plain[0], quick[0]) == (True, uses_scipy), "nothing is saved any more"
    assert not uses_scipy or Version(transformers.__version__) < Version("5.24"), "less is saved than was"


def test_whoever_wants_more_of_scipy_gets_it_meanwhile() -> None:
    script = (
        "with quick:\n    import scipy.optimize._zeros_py, scipy.optimize\n"
        "    from scipy.optimize import brentq, minimize\n"
        "print(round(brentq(lambda x: x - 2, 0, 9)), scipy.optimize.minimize is minimize)"
    )
    assert printed(script) == ["2 True"]


def test_the_optimizers_run_when_their_function_is_called() -> None:
    script = (
        "with quick:\n    from scipy.optimize import linear_sum_assignment\n"
        "import scipy.optimize as one\nprint(type(one).__name__, linear_sum_assignment([[1, 2], [2, 1]])[1].tolist())\n"
        "print(type(one).__name__, one.linear_sum_assignment is not linear_sum_assignment, one.nothing)"
    )
    ended = subprocess.run([sys.executable, "-c", QUICK + script], check=False, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["_Deferred [0, 1]"]
    assert ended.stderr.splitlines()[-1].startswith(
        "AttributeError: module 'scipy.optimize' has no attribute 'nothing'"
    )


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
    assert printed(script) == ["False _Deferred", "scipy.optimize._zeros_py module"]


@pytest.mark.slow
def test_if_the_quick_way_fails_the_engine_is_imported_as_usual() -> None:
    script = (
        "import sys\nfrom merge_gate.worker import child\nfrom merge_gate.worker.quick_imports import _Finder\n"
        "def fail(finder, name, *_):\n    if name == 'transformers.utils.import_utils': raise KeyError(name)\n"
        "_Finder.find_spec = fail\nchild._import_engine()\n"
        "print([name in sys.modules for name in ('transformers.utils.import_utils', child._ENGINE)])"
    )
    assert printed(script) == ["[True, True]"]


READS = """
import functools
@functools.lru_cache
def create_import_structure_from_path(path):
    return [path]
"""


@pytest.mark.parametrize(
    ("source", "changed"),
    [(READS, {"create_import_structure_from_path"}), (READS.replace("@functools.lru_cache", ""), set()), ("", set())],
    ids=["a cache", "a release without a cache", "a release without the function"],
)
def test_a_cache_without_a_limit_is_there_only_meanwhile(source, changed, tmp_path, monkeypatch) -> None:
    """Another release of transformers is imported as it is."""
    (tmp_path / "structures.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quick_imports, "STRUCTURES", "structures")
    with quick_imports.quick_imports():
        module = importlib.import_module("structures")
        meanwhile = dict(vars(module))
    assert sys.modules.pop("structures") is module
    assert {name for name, value in vars(module).items() if meanwhile[name] is not value} == changed, "and is put back"


def test_the_worker_merges_as_this_process_does(shelf: Shelf, variables) -> None:
    """The worker imports in less time; this process has imported everything as it comes."""
    files = preflight(str(shelf.adapter("plain")), allow_pickle=False)
    base = shelf.base("llama")
    group = Group(
        base=BaseKey(model="base", revision=None, dtype="float32", quantization="none"),
        directory=str(base),
        files=base_files(base),
        tasks=(Task(index=0, files=(files,), no_forward=""),),
    )
    job = Job(groups=(group,), device="cpu")
    heard: list[Event] = []
    with WorkerProcess() as child:
        assert child.run(Attempt(job, heard.append)) is None
    variables[sandbox.SWITCH] = "off"  # its limits would hold for the tests after this one
    here = [one for one in judge_job(job, heard.append, Sandbox()) if isinstance(one, Merged)]
    there = [one for one in heard if isinstance(one, Merged)]
    assert len(here) == 1
    assert [timeless(one) for one in there] == [timeless(one) for one in here]


def timeless(event: Merged) -> Merged:
    return replace(event, evidence=replace(event.evidence, seconds=0.0))
