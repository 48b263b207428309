"""The records travel: frozen, hashable, picklable; and what follows from their own fields is right."""

import dataclasses
import pickle
from typing import Any

import pytest

from merge_gate._internal.errors import (
    ConfigError,
    EngineError,
    ExitCode,
    GateError,
    LauncherError,
    ResolveError,
    UsageError,
)
from merge_gate.records import config, files, measured, report, terms
from merge_gate.records.config import Problem
from merge_gate.records.measured import TensorMerge, TensorStats
from merge_gate.records.refusals import Refusal
from merge_gate.records.report import TOOL, AdapterReport, ConfigFile, Environment, Report, Tool
from merge_gate.records.terms import BaseKey, Quantization, Result, Verdict

NAN, INF = float("nan"), float("inf")
RECORDS = [
    one
    for module in (terms, config, files, measured, report)
    for one in vars(module).values()
    if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_is_frozen_slotted_and_keyword_only(kind: type) -> None:
    parameters = kind.__dataclass_params__
    assert parameters.frozen
    assert "__slots__" in vars(kind)
    for field in dataclasses.fields(kind):
        assert field.kw_only
        assert field.default_factory is dataclasses.MISSING, field.name
        if field.default is not dataclasses.MISSING:
            hash(field.default)


def stats(**changes: object) -> TensorStats:
    return TensorStats(**({"name": "t", "dtype": "float32", "shape": (2,), "numel": 2} | changes))


@pytest.mark.parametrize("bad", ["nan", "posinf", "neginf"])
def test_one_bad_value_of_any_kind_is_not_finite(bad: str) -> None:
    assert stats().finite
    assert not stats(**{bad: 1}).finite


@pytest.mark.parametrize(
    ("minimum", "maximum", "largest"), [(None, None, 0.0), (-3.0, 2.0, 3.0), (1.0, 2.0, 2.0), (-3.0, -2.0, 3.0)]
)
def test_the_largest_magnitude(minimum: float | None, maximum: float | None, largest: float) -> None:
    assert stats(minimum=minimum, maximum=maximum).max_abs == largest


def merge(**changes: Any) -> TensorMerge:
    found = {"module": "m", "stats": stats(minimum=-3.0, maximum=2.0), "dtype_max": 6.0, "changed": True}
    return TensorMerge(**(found | changes))


def test_shares_of_a_merge() -> None:
    one = merge(base_norm=8.0, delta_norm=2.0, lost_norm=0.5)
    assert (one.delta_ratio, one.lost_share) == (0.25, 0.25)


@pytest.mark.parametrize(("part", "whole"), [(None, 1.0), (1.0, None), (1.0, 0.0), (NAN, 1.0), (1.0, NAN), (INF, 1.0)])
def test_a_share_that_is_no_number_is_not_known(part: float | None, whole: float | None) -> None:
    assert merge(delta_norm=part, base_norm=whole).delta_ratio is None


def report(*verdicts: Verdict, complete: bool = True) -> Report:
    base = BaseKey(model="b", revision=None, dtype="float32", quantization=Quantization.NONE)
    return Report(
        complete=complete,
        tool=Tool(name=TOOL, version="0"),
        environment=Environment(python="3"),
        config=ConfigFile(path="c", sha256="0"),
        adapters=tuple(
            AdapterReport(name=str(i), source="s", base=base, verdict=verdict, line=1, column=1)
            for i, verdict in enumerate(verdicts)
        ),
    )


P, F, E = Verdict.PASSED, Verdict.FAILED, Verdict.ERROR


@pytest.mark.parametrize(
    ("one", "result"),
    [
        (report(P, P), Result.PASS),
        (report(P, F), Result.FAIL),
        (report(E, F, P), Result.FAIL),
        (report(E, P), Result.ERROR),
        (report(), Result.ERROR),
        (report(complete=False), Result.ERROR),
        (report(P, complete=False), Result.ERROR),
        (report(F, complete=False), Result.FAIL),
    ],
)
def test_a_proven_failure_outranks_all_and_no_vacuous_one_passes(one: Report, result: Result) -> None:
    assert one.result is result


def test_a_report_travels() -> None:
    one = report(P, F)
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(one) == hash(report(P, F))


@pytest.mark.parametrize("kind", [GateError, UsageError, ResolveError, EngineError, LauncherError])
def test_an_error_keeps_its_hint_when_it_travels(kind: type[GateError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", hint="what next")))
    assert (type(error), error.message, error.hint, str(error)) == (kind, "what", "what next", "what; to do: what next")


def test_a_config_error_keeps_its_problems_when_it_travels() -> None:
    problem = Problem(message="unknown key", path="gate.yml", line=3, column=5, hint="did you mean adapters?")
    error = pickle.loads(pickle.dumps(ConfigError((problem,))))
    assert error.problems == (problem,)
    assert str(problem) == "gate.yml:3:5: unknown key (did you mean adapters?)"


def test_what_the_user_can_mend_is_2_and_the_rest_is_3() -> None:
    assert {kind: kind.exit_code for kind in (ConfigError, UsageError, ResolveError, EngineError, LauncherError)} == {
        ConfigError: ExitCode.USAGE,
        UsageError: ExitCode.USAGE,
        ResolveError: ExitCode.ERROR,
        EngineError: ExitCode.ERROR,
        LauncherError: ExitCode.ERROR,
    }


def test_records_with_mappings_can_be_hashed() -> None:
    """Tasks and events hold them, and are members of sets."""
    assert len({Refusal(kind="a", fields={"x": 1}), Refusal(kind="a", fields={"x": 1})}) == 1
    fetched = files.Fetched(repo_id="a/b", commit="c", directory="d", sizes={"e": 1})
    assert len({fetched, fetched}) == 1
