"""The tests repeat what outsiders tried, and `--attempts` prints it as a table."""

from types import SimpleNamespace

import pytest

from tests.support import attempts

LEAST_ROWS = 150


def test_no_attempt_is_lost(request: pytest.FixtureRequest) -> None:
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("not all tests are collected")
    assert len(set(request.config.stash[attempts.ROWS])) >= LEAST_ROWS


def test_the_table_has_what_was_seen_of_each_attempt() -> None:
    table, printed = attempts.AttemptTable(), []
    for number, outcome in (("M2", "passed"), ("M1", "passed"), ("M2", "failed")):
        row = (attempts.PROPERTY, (number, "a | b", "exit code 2"))
        report = pytest.TestReport("node", ("", 0, ""), {}, outcome, None, "call", user_properties=[row])
        table.pytest_runtest_logreport(report)
    table.pytest_terminal_summary(SimpleNamespace(write_line=printed.append))
    assert printed[2:] == [
        r"| M1 | a \| b | exit code 2 | as expected |",
        r"| M2 | a \| b | exit code 2 | **not as expected** |",
    ]
