"""The weight files of a base in a directory, as the process reads them that feeds the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_gate.files.identity import base_identity
from merge_gate.sources.feed import LocalFeed, SourceError
from merge_gate.sources.read_ahead import refuse_excess


class LocalFiles(LocalFeed):
    """Files of a directory.

    Raises:
        SourceError: they cannot be read, or are too large for any model.

    Attributes:
        sizes: the size of each file in bytes.
        sha256: empty, since no one lists digests of local files.
        identity: that of the base's files before the first byte was read.
    """

    def __init__(self, directory: str, names: Sequence[str], *, keep: bool = True) -> None:
        super().__init__(directory, keep=keep)
        self.sha256: Mapping[str, str] = {}
        try:
            self.identity = base_identity(directory)
            self.sizes: Mapping[str, int] = {name: Path(directory, name).stat().st_size for name in names}
        except OSError as error:
            raise SourceError(
                f"the base's files cannot be read: {error.strerror}",
                hint="check the disk or the mount that holds the base, then run again",
            ) from error
        refuse_excess(self.sizes)
