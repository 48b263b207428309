"""A directory on a FUSE mount: a network mount as far as the kernel can tell, with a server that can fail.

In: a directory and a mount point. Out: a context manager; while it is open, the mount shows the directory, read-only.
With `fails`, the server fails after it has given out so many bytes of weights: it dies, hangs, or answers EIO from then
on. Run as a script it is the server. Needs libfuse3 and fusermount3 (Debian's fuse3) and mfusepy.
"""

import argparse
import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = ".safetensors"
FAILURES = ("dies", "hangs", "eio")
READY_WITHIN_S = 30.0


@contextlib.contextmanager
def mounted(directory: Path, mount: Path, *, fails: str | None = None, after_bytes: int = 0) -> Iterator[None]:
    """Show `directory` at `mount`. With `fails` (one of FAILURES), the server fails after `after_bytes` of weights."""
    mount.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, str(directory), str(mount), "--after", str(after_bytes)]
    server = subprocess.Popen([*words, *(["--fails", fails] if fails else [])], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + READY_WITHIN_S
        while not os.path.ismount(mount):
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < until, f"nothing is mounted at {mount}"
            time.sleep(0.02)
        yield
    finally:
        server.kill()
        server.communicate()
        subprocess.run(["fusermount3", "-u", "-z", str(mount)], check=False, capture_output=True)


def serve(directory: str, mount: str, *, fails: str | None, after_bytes: int) -> None:
    import mfusepy  # noqa: PLC0415 - the server's process only

    class Directory(mfusepy.Operations):
        """The files of a directory, read-only."""

        use_ns = True
        given_bytes = 0

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            status = os.lstat(_inside(directory, path))
            names = ("mode", "nlink", "size", "uid", "gid")
            times = {f"st_{name}": getattr(status, f"st_{name}_ns") for name in ("atime", "ctime", "mtime")}
            return {f"st_{name}": getattr(status, f"st_{name}") for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(entry.name for entry in os.scandir(_inside(directory, path)))]

        def open(self, path: str, flags: int) -> int:
            return os.open(_inside(directory, path), flags)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            if path.endswith(WEIGHTS):
                self.given_bytes += size
                if fails and self.given_bytes > after_bytes:
                    self._fail()
            return os.pread(fh, size, offset)

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def _fail(self) -> None:
            if fails == "dies":
                os._exit(1)
            if fails == "hangs":
                time.sleep(3600)
            raise mfusepy.FuseOSError(errno.EIO)

    mfusepy.FUSE(Directory(), mount, foreground=True, ro=True, nothreads=True)


def _inside(directory: str, path: str) -> Path:
    return Path(directory, path.lstrip("/"))


if __name__ == "__main__":
    asked = argparse.ArgumentParser()
    asked.add_argument("directory")
    asked.add_argument("mount")
    asked.add_argument("--fails", choices=FAILURES)
    asked.add_argument("--after", type=int, default=0)
    given = asked.parse_args()
    serve(given.directory, given.mount, fails=given.fails, after_bytes=given.after)
