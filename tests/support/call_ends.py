"""Both ends of the channels for calls, connected in one process."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from merge_gate.worker.call_client import CallClient
from merge_gate.worker.call_service import CallService, Service
from merge_gate.worker.channel import CallChannel


class Ends:
    """A service that answers, and a client that calls."""

    def __init__(self, service: Service) -> None:
        self._calls, self._is_served = CallService([service]), True
        ends = self._calls.start()  # as if the worker got them
        self.of_worker = [CallChannel.of(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)]
        self.client = CallClient(self.of_worker)

    def call(self, message: object) -> object:
        """Call as code of a base may: with any message."""
        self.of_worker[0].send(message)
        return self.of_worker[0].receive()

    def end(self) -> None:
        """The parent's end of the service. It may have ended before."""
        if self._is_served:
            self._is_served = False
            self._calls.close()

    def close(self) -> None:
        self.end()
        for channel in self.of_worker:
            channel.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def open_files(directory: Path) -> int:
    """How many files in a directory this process, which has both ends, has open."""
    links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return sum(link.startswith(str(directory)) for link in links)
