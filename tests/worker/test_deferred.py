"""Packages that run when somebody wants something of them: what runs them, what does not, and that they run once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from merge_gate.worker.startup.deferred import Deferring, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RAN: list[str] = []
"""What has run, in order: the packages of these tests write it."""

NOTE = f"from {__name__} import RAN\nRAN.append(__name__)\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make modules of a package `late`, each of which notes that it runs."""
    finders = list(sys.meta_path)
    directory = tmp_path / "late"
    directory.mkdir()
    RAN.clear()

    def make(**sources: str) -> None:
        for name, source in sources.items():
            (directory / f"{name}.py").write_text(NOTE + source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.meta_path[:] = finders
    for name in [one for one in sys.modules if one.partition(".")[0] == "late"]:
        del sys.modules[name]


def deferred(**part: tuple[str, ...]) -> Deferring:
    return Deferring({"late": Part(**part)})


def late(name: str = "late") -> ModuleType:
    return importlib.import_module(name)


def test_a_name_runs_it_once_in_the_module_that_is_there(write: Callable[..., None]) -> None:
    write(__init__="one, two = 1, 2\n")
    with deferred():
        held = late()
        assert RAN == []
    assert (held.one, held.two) == (1, 2)
    assert (RAN, late() is held, type(held)) == (["late"], True, ModuleType)
    with pytest.raises(AttributeError, match="module 'late' has no attribute 'three'"):
        _ = held.three


def test_it_runs_within_the_context_as_after_it(write: Callable[..., None]) -> None:
    write(__init__="one = 1\n__all__ = ['one']\n")
    with deferred():
        names: dict[str, object] = {}
        exec("from late import *", names)
    assert (names["one"], RAN) == (1, ["late"])


def test_what_is_named_below_runs_without_it_and_stays(write: Callable[..., None]) -> None:
    write(__init__="one = 1\n", below="from late import beside\nthree = 3\n", beside="", other="")
    with deferred(below=("below", "beside")):
        below = late("late.below")
        assert late().beside is sys.modules["late.beside"]
    assert (RAN, below.three) == (["late.below", "late.beside"], 3)
    assert late().one == 1
    assert (late().below, late("late.below"), RAN[2:]) == (below, below, ["late"])


@pytest.mark.parametrize("source", ["", "import late.other\n"], ids=["alone", "it imports that itself"])
def test_any_other_module_below_runs_it_first(source: str, write: Callable[..., None]) -> None:
    write(__init__=f"one = 1\n{source}", other="import late\nfour = late.one + 3\n")
    with deferred():
        held = late()
    other = late("late.other")
    assert (other.four, held.other, late("late.other")) == (4, other, other)
    assert RAN == ["late", "late.other"]


def test_a_module_that_is_not_there_is_missed_as_usual(write: Callable[..., None]) -> None:
    write(__init__="")
    with deferred():
        late()
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'late\.none'"):
        late("late.none")


def test_functions_run_it_when_they_are_called_and_marks_never(write: Callable[..., None]) -> None:
    write(__init__="def double(x):\n    return 2 * x\ndef marked(f):\n    return None\n")
    with deferred(called=("double",), marks=("marked",)):
        double, marked = late().double, late().marked
    assert (marked(len), marked(reason="none")(len), RAN) == (len, len, [])
    assert (double(4), RAN) == (8, ["late"])
    assert double(x=5) == 10
    assert late().double is not double
    assert late().marked(len) is None


def test_who_looks_at_every_module_runs_nothing(write: Callable[..., None]) -> None:
    """As inspect does, for `__wrapped__`; and as those do who ask whether a package is installed."""
    write(__init__="")
    with deferred():
        assert importlib.util.find_spec("late") is not None
        assert "late" not in sys.modules
        held = late()
    assert not hasattr(held, "__wrapped__")
    assert held.__file__ is not None
    assert RAN == []


def test_what_was_there_before_is_left_alone(write: Callable[..., None]) -> None:
    write(__init__="", below="")
    held = late()
    with deferred():
        assert late() is held
        late("late.below")
    assert RAN == ["late", "late.below"]


def test_what_is_not_installed_is_missed_as_usual() -> None:
    with (
        Deferring({"not_installed": Part()}),
        pytest.raises(ModuleNotFoundError, match="No module named 'not_installed'"),
    ):
        late("not_installed")


def test_the_finder_stays_as_long_as_something_waits(write: Callable[..., None]) -> None:
    write(__init__="one = 1\n")
    with deferred() as unused:
        assert unused in sys.meta_path
    assert unused not in sys.meta_path
    with deferred() as finder:
        held = late()
    assert finder in sys.meta_path
    assert held.one == 1
    assert finder not in sys.meta_path


def test_a_package_that_asks_for_what_it_has_not_yet_is_told_so(write: Callable[..., None]) -> None:
    write(__init__="from late import below\none = 1\n", below="from late import one\n")
    with deferred():
        held = late()
    with pytest.raises(ImportError, match="cannot import name 'one'"):
        _ = held.one


def test_what_fails_for_the_order_goes_as_usual_afterwards(write: Callable[..., None]) -> None:
    """`below` wants another module, which runs the package, which wants `below`. The worker then imports as usual."""
    write(__init__="from late.below import two\n", below="import late.other\ntwo = 2\n", other="")
    with pytest.raises(ImportError, match="cannot import name 'two'"), deferred(below=("below",)):
        late("late.below")
    assert late("late.below").two == late().two == 2


def test_threads_wait_for_the_one_that_runs_it(write: Callable[..., None]) -> None:
    write(__init__="import time\ntime.sleep(0.2)\none = 1\n")
    with deferred():
        held = late()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(getattr(held, "one", None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, RAN) == ([1] * 4, ["late"])
