"""What holds for every check. The test file of a check has a class of this, with the cases of that check."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from merge_gate.judging.all_checks import refused
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Severity
from tests.support.judging.cases import Given, judged, of, setting, shown
from tests.support.wording import hold

if TYPE_CHECKING:
    from tests.support.faults import Case


TESTS = sorted(Path(__file__).parents[2].glob("**/checks/test_*.py"))
GOLDENS = {path.stem: path for path in sorted(Path(__file__).parents[2].glob("**/checks/*.txt"))}
"""The tests of all checks, and the golden of each."""


def assert_sentences(finding: Finding) -> None:
    """On one line, without a plural of one and without a figure that is none."""
    for text in (finding.message, finding.hint):
        assert text == " ".join(text.split())
        assert not re.search(r"\b1 (more |targeted )?(tensors|modules|values|weights|parameters)\b", text), text
        assert not re.search(r"\b(nan|inf)\b", text), text
        assert not text.endswith(".")


class EveryCheck:
    """The tests of one check, whose id is in the name of their file. Its messages are in the golden next to it.

    Attributes:
        FIRES: each reason for which it fires, and nothing else does. What it says and names is in the golden.
        SITUATIONS: other cases for the golden, by what they are.
        SILENT: the situations without a finding.
        REFUSED: refusals of the engine that its module words.
        QUIET: cases that come close.
        FAULTS: real adapters that it must fail (tests/support/faults.py).
        HEALTHY: real adapters that come close and must pass.
    """

    FIRES: ClassVar[tuple[Given, ...]]
    SITUATIONS: ClassVar[Mapping[str, Given]] = {}
    SILENT: ClassVar[tuple[str, ...]] = ()
    REFUSED: ClassVar[tuple[Refusal, ...]] = ()
    QUIET: ClassVar[tuple[Given, ...]] = ()
    FAULTS: ClassVar[tuple[Case, ...]] = ()
    HEALTHY: ClassVar[tuple[Case, ...]] = ()

    @property
    def id(self) -> str:
        return Path(inspect.getfile(type(self))).stem.removeprefix("test_").replace("_", "-")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "fire" in metafunc.fixturenames:
            metafunc.parametrize("fire", self.FIRES, ids=map(str, range(len(self.FIRES))))

    def test_it_fires_alone(self, fire: Given) -> None:
        (finding,) = judged(fire)
        assert (finding.check, finding.severity) == (self.id, fire.severity or CHECKS[self.id].severity)
        assert finding.hint
        assert_sentences(finding)

    @pytest.mark.parametrize("severity", [Severity.ERROR, Severity.WARNING, Severity.OFF])
    def test_severity_is_what_the_config_says(self, fire: Given, severity: Severity) -> None:
        findings = judged(fire, setting(self.id, severity))
        if not CHECKS[self.id].can_be_off:
            assert [finding.severity for finding in findings] == [fire.severity or Severity.ERROR]
        elif fire.severity is Severity.NOTE:
            assert [finding.severity for finding in findings] == [Severity.NOTE]
        elif severity is Severity.OFF:
            assert findings == ()
        elif fire.severity is Severity.WARNING:  # the lesser case of a check stays one
            assert [finding.severity for finding in findings] == [Severity.WARNING]
        else:
            assert [finding.severity for finding in findings] == [severity]

    def test_it_keeps_quiet(self) -> None:
        for given in self.QUIET:
            assert of(self.id, judged(given)) == []

    def test_a_refusal_becomes_a_finding(self) -> None:
        for fact in self.REFUSED:
            finding = refused(fact)
            assert finding.check in {self.id, NOT_JUDGED}
            assert finding.check == NOT_JUDGED or finding.severity is CHECKS[self.id].severity
            assert_sentences(finding)
            assert pickle.loads(pickle.dumps(fact)) == fact

    def test_its_messages(self) -> None:
        hold(Path(inspect.getfile(type(self))).with_name(f"{self.id}.txt"), self.told())

    def told(self) -> str:
        parts = []
        for number, fire in enumerate(self.FIRES):
            parts += [f"== fires {number}\n", *map(shown, judged(fire))]
        for name, situation in self.SITUATIONS.items():
            parts += [f"== {name}\n", *map(shown, judged(situation))]
        for fact in self.REFUSED:
            parts += [f"== refused {fact.kind}\n", shown(refused(fact))]
        assert [name for name, situation in self.SITUATIONS.items() if not judged(situation)] == [*self.SILENT]
        return "\n".join(parts)
