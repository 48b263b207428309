"""All cases that the gate judges in earnest: those of tests/support/faults.py, and those of the tests of each check."""

from __future__ import annotations

from importlib import import_module

from tests.support import faults
from tests.support.judging.every_check import GOLDENS, EveryCheck

for path in sorted(GOLDENS.glob("test_*.py")):
    import_module(f"tests.judging.checks.{path.stem}")

FAULTS = (*faults.FAULTS, *(case for check in EveryCheck.__subclasses__() for case in check.FAULTS))
HEALTHY = (*faults.HEALTHY, *(case for check in EveryCheck.__subclasses__() for case in check.HEALTHY))
