"""The worker gets the files of a model, and what it writes and reports arrives; other calls end the service."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import EngineError, NotPublishedError, SourceError
from merge_gate.features.publish.calls import MOST_TENSORS, PublicationPlanned, PublicationService, PublicationWritten
from merge_gate.features.publish.consumer import Connection
from merge_gate.features.publish.weight_files import ModelLayout, ModelWriter, new_file
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.protocol import Answer, Idle
from tests.support.call_ends import Ends, open_files, wait_until

TENSOR = StoredTensor(name="a", dtype="BF16", shape=(2, 3))


class LoaderTrace:
    """Makes the files of tasks 0 to 3: each plan has one, or as many as `names` has."""

    def __init__(self, directory: Path) -> None:
        self.calls: list[object] = []
        self.directory, self.names = directory, ("model.safetensors",)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        self.calls.append((task, tensors))
        if self.names == ("refused",):
            raise NotPublishedError("the disk is full")
        files = tuple(new_file(f"{task} {name}", tensors, None) for name in self.names)
        return ModelWriter(self.directory, ModelLayout(files=files)).make_files()

    def written(self, message: PublicationWritten) -> None:
        self.calls.append(message)

    def ended(self) -> None:
        """Nothing is left."""


class Publishing(Ends):
    """Tasks 0 to 3 may be published."""

    def __init__(self, directory: Path) -> None:
        self.publisher: Any = LoaderTrace(directory)
        super().__init__(PublicationService(self.publisher, range(4)))
        self.connection = Connection(self.client)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Publishing]:
    both = Publishing(tmp_path / "models")
    yield both
    both.close()


def test_a_plan_gets_the_files_and_what_is_written_is_in_them(ends: Publishing) -> None:
    client = ends.connection

    def write(task: int) -> None:
        files = client.plan(task, [TENSOR])
        files.write("a", 0, memoryview(bytes([task]) * 12))
        client.finish(task, files.checksums, "{}", None)
        files.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    wait_until(lambda: not open_files(ends.publisher.directory))
    calls = ends.publisher.calls
    for task in range(4):
        content = bytes([task]) * 12
        assert (ends.publisher.directory / f"{task} model.safetensors").read_bytes().endswith(content)
        message = PublicationWritten(task=task, checksums=(("a", zlib.crc32(content)),))
        assert calls.index((task, (TENSOR,))) < calls.index(message)
    assert len(calls) == 8


def test_more_files_come_than_fit_into_one_message(ends: Publishing) -> None:
    ends.publisher.names = tuple(map(str, range(300)))
    files = ends.connection.plan(0, [TENSOR])
    wait_until(lambda: open_files(ends.publisher.directory) == 300)
    files.write("a", 0, memoryview(b"x" * 12))
    files.close()
    assert not open_files(ends.publisher.directory)
    assert all(path.read_bytes().endswith(b"x" * 12) for path in ends.publisher.directory.iterdir())


def test_files_that_do_not_all_arrive_are_an_error(ends: Publishing) -> None:
    """As if the process may not open as many."""
    ends.publisher.names = ("0", "1", "2")
    for channel in ends.of_worker:
        channel._most_files = 1
    with pytest.raises(SourceError, match="3 more files"):
        ends.connection.plan(0, [TENSOR])
    wait_until(lambda: not open_files(ends.publisher.directory))


def test_a_refusal_arrives(ends: Publishing) -> None:
    refusal = NotJudged(message="no")
    ends.connection.finish(3, {}, "{}", refusal)
    assert ends.publisher.calls == [PublicationWritten(task=3, refusal=refusal)]
    ends.publisher.names = ("refused",)
    with pytest.raises(SourceError, match="full"):
        ends.connection.plan(3, [TENSOR])


def test_a_service_that_is_gone_is_an_error(ends: Publishing) -> None:
    ends.connection.plan(0, [TENSOR]).close()
    ends.end()
    for call in (lambda: ends.connection.plan(0, [TENSOR]), lambda: ends.connection.finish(0, {}, "{}", None)):
        with pytest.raises(EngineError):
            call()


@pytest.mark.attempt("F15", "the worker passes open files to the run", "they are closed")
def test_the_parent_takes_no_files(ends: Publishing, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with other.open("wb") as file:
        ends.of_worker[0].send(PublicationWritten(task=0), [file.fileno()] * 300)
    assert ends.of_worker[0].receive() == Answer()
    assert not open_files(other)


@pytest.mark.parametrize(
    "message",
    [
        PublicationPlanned(task=4, tensors=()),
        PublicationPlanned(task=3, tensors=("a",)),  # type: ignore[arg-type]
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(-1,)),)),
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(1,) * 65),)),
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(1 << 48,)),)),
        PublicationPlanned(task=3, tensors=(TENSOR,) * (MOST_TENSORS + 1)),
        PublicationWritten(task=4),
        PublicationWritten(task=3, checksums=("a",)),  # type: ignore[arg-type]
        PublicationWritten(task=3, checksums=(("a", "b"),)),  # type: ignore[arg-type]
        PublicationWritten(task=3, checksums=(("a", 1),) * (MOST_TENSORS + 1)),
        PublicationWritten(task=3, settings=3),  # type: ignore[arg-type]
        Answer(),
        Idle(),
    ],
    ids=lambda message: str(message)[:60],
)
def test_a_call_that_the_gate_never_makes_ends_the_service(ends: Publishing, message: object) -> None:
    assert ends.call(PublicationPlanned(task=3, tensors=(TENSOR,))) == Answer(files=1)
    with pytest.raises((EOFError, OSError)):
        ends.call(message)
    ends.end()
    assert ends.publisher.calls == [(3, (TENSOR,))]
