"""When config-unsafe fires, and what it says: its messages are in config-unsafe.txt."""

from tests.support.judging.cases import found_in_files
from tests.support.judging.every_check import EveryCheck


class TestConfigUnsafe(EveryCheck):
    FIRES = (found_in_files("config-unsafe"),)
