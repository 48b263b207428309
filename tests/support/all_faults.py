"""All cases that the gate judges in earnest: those of tests/support/faults.py, and those of the tests of each check."""

from importlib import import_module
from pathlib import Path

from tests.support import faults
from tests.support.judging.every_check import TESTS, EveryCheck

for path in TESTS:
    import_module(".".join(path.relative_to(Path(__file__).parents[2]).with_suffix("").parts))

FAULTS = (*faults.FAULTS, *(case for check in EveryCheck.__subclasses__() for case in check.FAULTS))
HEALTHY = (*faults.HEALTHY, *(case for check in EveryCheck.__subclasses__() for case in check.HEALTHY))
