"""The tree of errors: what each carries."""

from __future__ import annotations

from merge_gate._internal.errors import ConfigError, ExitCode, GateError, UsageError
from merge_gate.records.refusals import CannotJudge, Refused


def test_a_refusal_is_carried_whole_and_is_no_error_of_the_gate() -> None:
    for kind in (Refused, CannotJudge):
        error = kind("layer_left_unmerged", module="model.layers.0")
        assert (error.refusal.kind, error.refusal.fields) == ("layer_left_unmerged", {"module": "model.layers.0"})
        assert "model.layers.0" in str(error)
        assert not isinstance(error, GateError)


def test_wrong_usage_has_an_exit_code_of_its_own() -> None:
    assert {error.exit_code for error in (ConfigError, UsageError)} == {ExitCode.USAGE}
    assert GateError.exit_code is ExitCode.ERROR
