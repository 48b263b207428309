"""The tree of errors: what each carries."""

from __future__ import annotations

from merge_gate.errors import ConfigError, ExitCode, GateError, Refused, UsageError
from merge_gate.records.measured import Refusal


def test_a_refusal_is_carried_whole_and_is_no_error_of_the_gate() -> None:
    refusal = Refusal(check="not-mergeable", message="it cannot be merged", hint="merge another one")
    error = Refused(refusal)
    assert error.refusal is refusal
    assert str(error) == refusal.message
    assert not isinstance(error, GateError)


def test_wrong_usage_has_an_exit_code_of_its_own() -> None:
    assert {error.exit_code for error in (ConfigError, UsageError)} == {ExitCode.USAGE}
    assert GateError.exit_code is ExitCode.ERROR
