"""Fixtures that more than one test file uses. torch and PEFT are imported when the first test asks for a model."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.support import attempts
from tests.support.cases import Judged, digests, lay_out, top_settings, write_config_file
from tests.support.command import merge_gate
from tests.support.properties import FAST_EXAMPLES
from tests.support.wording import Wording, golden_of

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping
    from pathlib import Path

    from tests.support.models import Shelf


# torch starts a thread per core in each process. With a process of tests per core, two threads in each are enough:
# the gate still merges on more than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Under nohup the tests ignore SIGHUP, and what they start would inherit that. A handler ends with exec, so the started
# commands have the default again, and the tests still survive a closed terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# No property is timed: a busy machine is not a fault of the code. In CI the examples are always the same ones, so that
# a red run is due to the change; elsewhere each run looks for new ones. `make test` loads "fast".
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
IN_CI = {"derandomize": bool(os.environ.get("CI"))}
hypothesis.settings.register_profile("full", **UNTIMED, **IN_CI)
hypothesis.settings.register_profile("fast", max_examples=FAST_EXAMPLES, **UNTIMED, **IN_CI)
hypothesis.settings.load_profile("full")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attempts", action="store_true", help="print the table of attempts")


def pytest_configure(config: pytest.Config) -> None:
    attempts.configure(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    attempts.collect(config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties += [(attempts.PROPERTY, row) for row in attempts.rows_of(item)]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist calls it, with `-n`
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.schedule import Schedule  # noqa: PLC0415 - imports pytest-xdist

    return Schedule(config, log)


@pytest.fixture
def wording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wording]:
    """Holds sentences against the golden of the test's module; see tests/support/wording.py."""
    replaced = {str(tmp_path_factory.getbasetemp()): "<temporary>"}
    if "tmp_path" in request.fixturenames:
        replaced[str(request.getfixturevalue("tmp_path"))] = "<here>"
    sentences = Wording(golden_of(request.path), request.node.name, replaced)
    yield sentences
    sentences.close()


@pytest.fixture
def cwd(tmp_path: Path) -> Iterator[Path]:
    """The directory of the test, which is the current one. Afterwards, the earlier one is."""
    with contextlib.chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def variables() -> Iterator[MutableMapping[str, str]]:
    """The variables of the environment. Afterwards, they are as they were."""
    before = dict(os.environ)
    yield os.environ
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the demo, made for a test file. Messages have its name, so it is that of the file."""
    from merge_gate.demo import make_demo  # noqa: PLC0415 - few tests need it

    directory = tmp_path_factory.mktemp(request.path.stem) / "demo"
    make_demo(str(directory))
    return directory


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The tiny bases and adapters, each built on first use."""
    import torch  # noqa: PLC0415 - takes seconds, for which tests without a model need not wait
    from transformers.utils import logging  # noqa: PLC0415

    from tests.support.models import Shelf  # noqa: PLC0415

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def fleet(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small fleet that the command judged once: `cold` is its report, `cache` its verdicts."""
    from tests.support.small_fleet import lay_fleet  # noqa: PLC0415 - imports torch

    place = tmp_path_factory.mktemp("fleet")
    lay_fleet(shelf, place)
    answer = merge_gate("run", "fleet.yml", "--cache", "cache", "--output", "cold", cwd=place)
    assert answer.code == 1, answer.said
    return place


@pytest.fixture(scope="session")
def judged(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Every case of `tests.support.all_faults`, gated in two runs: without pickled weights, and with them."""
    from merge_gate.config.load_config import load_config  # noqa: PLC0415
    from merge_gate.records.options import RunOptions  # noqa: PLC0415
    from merge_gate.run.flow import run_gate  # noqa: PLC0415
    from tests.support.all_faults import FAULTS, HEALTHY  # noqa: PLC0415

    root = tmp_path_factory.mktemp("cases")
    cases = (*FAULTS, *HEALTHY)
    for case in cases:
        lay_out(case, shelf, root / case.name)
    configs = [
        write_config_file(shelf, root, number, dict(top), list(members))
        for number, (top, members) in enumerate(itertools.groupby(sorted(cases, key=top_settings), key=top_settings))
    ]
    before = digests(root, shelf.root)
    reports = [run_gate(load_config(str(path)), RunOptions(device="cpu")) for path in configs]
    return Judged(
        reports={adapter.name: adapter for report in reports for adapter in report.adapters},
        bases=tuple(base for report in reports for base in report.bases),
        before=before,
        after=digests(root, shelf.root),
        adapters_directory=root,
    )
