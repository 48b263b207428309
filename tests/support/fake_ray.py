"""A stand-in for the module `ray`, which runs each task in this process, one after the other.

In: the resources of nodes, and what is to go wrong. Out: what was asked for.
"""

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from ray import exceptions

from merge_gate.features.ray.feature import run_shard

TWO_WORKERS: tuple[dict[str, float], ...] = ({"CPU": 2.0},)


class Ray:
    """What the gate uses of Ray. `loses` says whether a task is lost after something that it has sent."""

    exceptions = exceptions

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.resources = list(nodes or TWO_WORKERS)
        self.asked: dict[str, Any] = {}
        self.refusal: Exception | None = None
        self.is_up = False
        self.shards: list[tuple[int, int]] = []
        self.cancelled = 0
        self.run: Callable[..., Iterator[list[Any]]] = run_shard
        self.changes: Callable[[Any], Any] = lambda work: work
        self.loses: Callable[[tuple[int, int], list[Any]], bool] = lambda shard, batch: False
        self.is_silent: Callable[[], bool] = lambda: False

    def init(self, **options: Any) -> None:
        self.asked |= options
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray has its own
        if self.refusal is not None:
            raise self.refusal
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [dead, *({"Alive": True, "Resources": resources} for resources in self.resources)]

    def put(self, work: Any) -> Any:
        return self.changes(work)

    def remote(self, function: Any) -> Any:
        assert function is run_shard
        return SimpleNamespace(options=lambda **asked: self.asked.update(asked) or SimpleNamespace(remote=self._start))

    def _start(self, work: Any, shard: tuple[int, int], lost_adapters: Any) -> Iterator[list[Any]]:
        self.shards.append(shard)
        return self._batches(work, shard, lost_adapters)

    def _batches(self, work: Any, shard: tuple[int, int], lost_adapters: Any) -> Iterator[list[Any]]:
        for batch in self.run(work, shard, lost_adapters):
            for item in batch:
                yield [item]
                if self.loses(shard, item):
                    raise exceptions.RayError("\n it died\nstack")

    def wait(self, running: list[Any], *, timeout: float, num_returns: int) -> tuple[list[Any], list[Any]]:
        assert (timeout > 0, num_returns) == (True, 1)
        ready = [] if self.is_silent() else running[:1]
        return ready, running[len(ready) :]

    def get(self, sent: Any) -> Any:
        return sent

    def cancel(self, running: Any, *, force: bool) -> None:
        assert force
        self.cancelled += 1
        raise ValueError("it is gone")
