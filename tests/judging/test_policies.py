"""What the policies set."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from merge_gate.cli.parser import parsed
from merge_gate.config.model import FileEntry
from merge_gate.judging.all_checks import judge_merge
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.policies import DEFAULT, POLICIES, Policy
from merge_gate.records.config import CheckSetting
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import base, broken, evidence, files, spec

RELEASE = POLICIES["release"]


def test_the_default_changes_nothing() -> None:
    for check, row in CHECKS.items():
        assert POLICIES[DEFAULT].setting(check) == CheckSetting(check=check, severity=row.severity, limit=row.limit)
    assert POLICIES[DEFAULT] == Policy()


def test_a_release_is_stricter_and_only_that() -> None:
    for check, row in CHECKS.items():
        expected = Severity.ERROR if check in RELEASE.errors else row.severity
        assert RELEASE.setting(check).severity is expected
    assert all(CHECKS[check].severity is Severity.WARNING for check in RELEASE.errors), "each row changes something"


def test_the_words_are_the_same_everywhere() -> None:
    assert set(get_args(FileEntry.model_fields["policy"].annotation)) == set(POLICIES)
    assert parsed(["run", "x", "--policy", "release"]).policy in POLICIES
    with pytest.raises(SystemExit):
        parsed(["run", "x", "--policy", DEFAULT])  # no option and no variable makes a reviewed file less strict


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_a_warning_about_the_base_is_an_error(check: str) -> None:
    """Whichever check it is of: here, of an infinite buffer."""
    limit = replace(broken("rotary.limit", posinf=1), is_buffer=True)
    case = evidence(base=base(nonfinite=(limit,)))
    settings = tuple(POLICIES["release" if name == check else DEFAULT].setting(name) for name in CHECKS)
    found = [one for one in judge_merge(spec(checks=settings), files(), case) if one.origin is Origin.BASE]
    assert [one.check for one in found] == ["base-nonfinite"]
    assert found[0].severity is (Severity.ERROR if check == "base-nonfinite" else Severity.WARNING)
