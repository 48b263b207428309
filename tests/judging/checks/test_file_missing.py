"""When file-missing fires, and what it says: its messages are in file-missing.txt."""

from tests.support.judging.cases import found_in_files
from tests.support.judging.every_check import EveryCheck


class TestFileMissing(EveryCheck):
    FIRES = (found_in_files("file-missing"),)
