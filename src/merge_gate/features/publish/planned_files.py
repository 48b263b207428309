"""The weight files of a planned model, which another process has made with their headers and sizes, and passed open.

In: open files, and bytes of tensors. Out: these bytes at their places, and a CRC-32 of each tensor.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

from merge_gate.files.headers import parse_places


class PlannedFiles:
    """The files, which are this object's own. Several threads may write different tensors."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors
        self._places: dict[str, list[tuple[int, int, int]]] = {}
        """Of each tensor, its files, each with its start and its end there."""
        for descriptor in descriptors:
            with open(descriptor, "rb", closefd=False) as file:
                for tensor, start, end in parse_places(file):
                    self._places.setdefault(tensor.name, []).append((descriptor, start, end))
        self._written = dict.fromkeys(self._places, (0, 0))
        """Of each tensor, how many bytes were written, and their checksum."""

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Write bytes of a tensor, in each file that has it. They come in order; from `offset` 0 on, they begin again.

        Raises:
            OSError: the disk is full, or fails.
        """
        content = content.cast("B")
        for descriptor, start, _ in self._places[name]:
            write_all(descriptor, start + offset, content)
        checksum = zlib.crc32(content, self._written[name][1] if offset else 0)
        self._written[name] = offset + len(content), checksum

    def lacks(self, name: str) -> bool:
        """Whether a tensor of the model was not written whole."""
        return name in self._places and not self._is_whole(name)

    @property
    def checksums(self) -> dict[str, int]:
        """The checksum of each tensor that was written whole."""
        return {name: checksum for name, (_, checksum) in self._written.items() if self._is_whole(name)}

    def _is_whole(self, name: str) -> bool:
        _, start, end = self._places[name][0]
        return self._written[name][0] == end - start

    def close(self) -> None:
        """Close the files. May be called once."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def write_all(descriptor: int, start: int, content: memoryview) -> None:
    """Write bytes to a place in a file, however many the system writes at a time."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)
