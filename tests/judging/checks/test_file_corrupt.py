"""When file-corrupt fires, and what it says: its messages are in file-corrupt.txt."""

from tests.support.judging.cases import found_in_files, reason
from tests.support.judging.every_check import EveryCheck


class TestFileCorrupt(EveryCheck):
    FIRES = (found_in_files("file-corrupt"),)
    REFUSED = (
        reason("tensor_unreadable", name="odd", is_meta=True, dtype="float32"),
        reason("tensor_unreadable", name="odd", dtype="float4_e2m1fn_x2"),
        reason("tensor_unreadable", text="unknown dtype"),
        reason("pickle_unreadable", error="RuntimeError"),
        reason("pickle_unreadable", error='they hold a dict as "state_dict" in place of tensors by name'),
        reason("pickle_unreadable", error="UnpicklingError", names="torch.hub.load"),
    )
