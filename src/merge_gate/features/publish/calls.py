"""The worker's calls for the files of models that are published, and what answers them.

In: calls of the worker, which is not trusted. Out: calls of a `Publisher`, whose fields have the right types.

1. The worker plans a publication, and gets the files open, with their headers and sizes.       `PublicationPlanned`
   It may write anything to them until it ends. Only then they are read, and compared.
2. It sends checksums of what it wrote.                                                         `PublicationWritten`
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import record
from merge_gate.worker.call_service import InvalidCallError, Service

MOST_TENSORS = 1 << 20
"""A worker that lists more is not the gate's own code."""

MOST_DIMENSIONS, MOST_SIZE = 64, 1 << 48
"""A tensor with more of them takes long to multiply, in one call that no signal ends."""


@record
class PublicationPlanned:
    """The worker begins to write a merged model, and forgets what it wrote of this task before.

    `tensors` has every stored tensor that will have another dtype or shape than in the base, and those that the merge
    can change. The model's files come with the answer, open, with their headers and sizes.
    """

    task: int
    tensors: tuple[StoredTensor, ...]


@record
class PublicationWritten:
    """All tensors of a task were written, or `refusal` says why they must not be published.

    `checksums` has the CRC-32 of each tensor that was written, over the bytes in memory. All others are as in the base.
    `settings` are the keys of config.json that the merge changes, in JSON. The answer comes before the task's `Merged`.
    """

    task: int
    checksums: tuple[tuple[str, int], ...] = ()
    settings: str = "{}"
    refusal: NotJudged | None = None


SETTINGS = str
"""The dtype of a publication, in the job."""


class Publisher(Protocol):
    """Makes the files of models. Several threads call it. The worker gets what it raises."""

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        """A merge begins, perhaps again. Returns the new files of its model, open; the caller closes them."""

    def written(self, message: PublicationWritten) -> None:
        """The worker has written all tensors of a task."""

    def ended(self) -> None:
        """A worker process has ended. What it wrote of tasks without a verdict is of no use."""


class PublicationService(Service):
    """Serves one worker process. `tasks` are those whose merges may be published."""

    calls = (PublicationPlanned, PublicationWritten)

    def __init__(self, publisher: Publisher, tasks: Collection[int]) -> None:
        self.publisher, self._tasks = publisher, frozenset(tasks)

    def answer(self, call: object, memory: memoryview) -> tuple[int, ...]:  # noqa: ARG002 - it has no bytes
        match call:
            case PublicationPlanned():
                self._refuse_unfit(call.task, call.tensors)
                if not all(map(_is_fit, call.tensors)):
                    raise InvalidCallError
                return self.publisher.planned(call.task, call.tensors)
            case PublicationWritten():
                self._refuse_unfit(call.task, call.checksums)
                self.publisher.written(call)
                return ()
        raise InvalidCallError

    def _refuse_unfit(self, task: int, listed: Sequence[object]) -> None:
        if task not in self._tasks or len(listed) > MOST_TENSORS:
            raise InvalidCallError

    def end(self) -> None:
        self.publisher.ended()


def _is_fit(tensor: StoredTensor) -> bool:
    return len(tensor.shape) <= MOST_DIMENSIONS and all(0 <= size < MOST_SIZE for size in tensor.shape)
