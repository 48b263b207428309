"""Pickled weights, a pickle that calls a function, and the reader of pickles in this process."""

import io
import zipfile
from typing import Any

from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged, Refusal


def packed(pickled: bytes) -> bytes:
    """A file of torch.save whose data.pkl is another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name in range(2):
            archive.writestr(f"archive/data/{name}", bytes(4 * 12))
    return buffer.getvalue()


def read_pickle(path: str) -> tuple[StoredTensor, ...] | Refusal:
    """The tensors of a pickled file, as the worker lists them."""
    from merge_gate.worker.merging.group_bases import listed_pickle  # noqa: PLC0415 - imports torch and PEFT

    listed = listed_pickle(path)
    assert not isinstance(listed.refusal, NotJudged)
    return listed.refusal or listed.tensors


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced
