"""When pickle-refused fires, and what it says: its messages are in pickle-refused.txt."""

from tests.support.judging.cases import found_in_files
from tests.support.judging.every_check import EveryCheck


class TestPickleRefused(EveryCheck):
    FIRES = (found_in_files("pickle-refused"),)
