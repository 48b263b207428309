"""Names that became files, and what the files say without a merge."""

from __future__ import annotations

from dataclasses import field, replace

from merge_gate.records.config import AdapterSpec
from merge_gate.records.terms import Finding, record, told


@record
class Snapshot:
    """Files on disk. `name` as written, `revision` the commit for a Hub id, None for a directory."""

    name: str
    directory: str
    revision: str | None = None


@record
class FileIdentity:
    """What tells a file from every other one, and from itself before a write (identity.py)."""

    name: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@record
class BaseContent:
    """What a base holds, as digests: `weights` of its weight files, `settings` of its other files that are read."""

    weights: str
    settings: str


@record
class FileRecord:
    """One input file of an adapter. `path` is relative to the adapter's directory.

    `identity` is that of the open file that was hashed; records of the same bytes are equal, whatever it is.
    """

    path: str = told("Relative to the adapter's directory.")
    size_bytes: int = told("Size in bytes.", key="bytes")
    sha256: str = told("Digest of its bytes, hex.")
    identity: FileIdentity | None = field(default=None, compare=False)


@record
class TensorHeader:
    """A tensor as the weights file describes it. `dtype` in safetensors' words (F32, BF16, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@record
class AdapterFiles:
    """What the preflight read of an adapter without torch.

    `config_json` is the text of adapter_config.json, re-serialised (empty when it is missing or unreadable). `tensors`
    is empty where only torch can tell what pickled weights hold. `weights` is the file PEFT will load, relative to
    `directory`, or None.
    """

    directory: str
    config_json: str = ""
    peft_type: str | None = None
    task_type: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    weights: str | None = None
    tensors: tuple[TensorHeader, ...] = ()
    files: tuple[FileRecord, ...] = ()
    findings: tuple[Finding, ...] = ()


@record
class Prepared:
    """One adapter (or combination) whose names have become files; `problem` says why one has not."""

    spec: AdapterSpec
    members: tuple[AdapterFiles, ...] = ()
    revision: str | None = None
    base: Snapshot | None = None
    problem: Finding | None = None

    @property
    def files(self) -> AdapterFiles:
        """The members' files as one; of an ordinary adapter, its own."""
        if len(self.members) == 1:
            return self.members[0]
        first = self.members[0] if self.members else AdapterFiles(directory="")
        return replace(
            first,
            tensors=tuple(tensor for one in self.members for tensor in one.tensors),
            files=tuple(file for one in self.members for file in one.files),
            findings=tuple(finding for one in self.members for finding in one.findings),
        )


@record
class Entry:
    """One line of the report to be: an adapter in one dtype."""

    prepared: Prepared
    dtype: str
