"""A read that does not end in time is given up; any other ends as it would without a limit."""

from __future__ import annotations

import threading

import pytest

from merge_gate.files import base_watch
from merge_gate.files.base_watch import BaseWatch
from merge_gate.limits.timeout import within


def test_the_result_is_that_of_the_read() -> None:
    assert within(60.0, lambda: 7) == 7
    assert within(60.0, lambda: None) is None


def test_so_is_its_exception() -> None:
    with pytest.raises(KeyError, match="gone"):
        within(60.0, lambda: {}["gone"])


def test_a_read_that_hangs_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, never.wait)
    never.set()


def test_a_mount_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, never = [], threading.Event()

    def hang(directory: str) -> None:
        asked.append(directory)
        never.wait()

    monkeypatch.setattr(base_watch, "base_identity", hang)
    monkeypatch.setattr(base_watch, "ANSWER_TIMEOUT_S", 0.01)
    watch = BaseWatch()
    for entry in range(3):
        watch.loaded("/mnt/base", (), [entry])
    assert watch.void() == {"/mnt/base": [0, 1, 2]}
    assert not watch.is_unchanged(0)
    assert watch.is_silent("/mnt/base")
    assert asked == ["/mnt/base"]
    never.set()
