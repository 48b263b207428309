"""When file-lfs-pointer fires, and what it says: its messages are in file-lfs-pointer.txt."""

from tests.support.judging.cases import found_in_files
from tests.support.judging.every_check import EveryCheck


class TestFileLfsPointer(EveryCheck):
    FIRES = (found_in_files("file-lfs-pointer"),)
