"""The worker lists pickled weights before it gets its job, with torch's restricted unpickler."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from merge_gate._internal.errors import EngineError
from merge_gate.files.headers import parse_file
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import Refusal
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.command import children_of
from tests.support.files.pickles import Call
from tests.support.models import Shelf


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerSlot]:
    with WorkerSlot() as slot:
        yield slot


def listed(worker: WorkerSlot, path: Path) -> tuple[StoredTensor, ...]:
    tensors = worker.read_pickle(str(path))
    assert isinstance(tensors, tuple)
    return tensors


def test_it_lists_what_safetensors_holds_of_the_same_tensors(worker: WorkerSlot, shelf: Shelf) -> None:
    with (shelf.adapter("plain") / "adapter_model.safetensors").open("rb") as file:
        expected = parse_file(file)
    assert set(listed(worker, shelf.adapter("pickled") / "adapter_model.bin")) == set(expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_a_pickle_that_calls_is_refused_and_not_run(worker: WorkerSlot, tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.zeros(2), "b": Call(os.mkdir, str(tmp_path / "made"))}
    torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    refusal = worker.read_pickle(str(tmp_path / "a.bin"))
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.fields["names"]) == ("pickle_unreadable", "posix.mkdir")
    assert not (tmp_path / "made").exists()


def test_other_content_is_refused(worker: WorkerSlot, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save([torch.zeros(2)], path)
    assert isinstance(worker.read_pickle(str(path)), Refusal)
    path.write_bytes(b"PK\x03\x04 and no more")
    assert isinstance(worker.read_pickle(str(path)), Refusal)
    torch.save({"a": torch.zeros(2, 3), "step": 3}, path)
    assert [(one.name, one.dtype, one.shape) for one in listed(worker, path)] == [("a", "F32", (2, 3))]
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, path)
    refusal = worker.read_pickle(str(path))
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.fields["dtype"]) == ("tensor_unreadable", "complex128")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"a": torch.zeros(2), 5: torch.zeros(1)}, "they hold a name of type int"),
        ({"a": torch.zeros(2), 5: 1}, "they hold a name of type int"),
        ({"state_dict": {"a": torch.zeros(2)}}, 'they hold a dict as "state_dict" in place of tensors by name'),
        ({"step": 3}, 'they hold a int as "step" in place of tensors by name'),
    ],
)
def test_content_of_other_types_is_named(
    worker: WorkerSlot, tmp_path: Path, content: dict[object, object], error: str
) -> None:
    torch.save(content, tmp_path / "a.bin")
    refusal = worker.read_pickle(str(tmp_path / "a.bin"))
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.fields["error"]) == ("pickle_unreadable", error)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_peft_cannot_copy_are_named(worker: WorkerSlot, tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for tensor, dtype in ((quantized, "qint8"), (nested, "a nested layout")):
        torch.save({"a": tensor}, tmp_path / "a.bin")
        refusal = worker.read_pickle(str(tmp_path / "a.bin"))
        assert isinstance(refusal, Refusal)
        assert (refusal.kind, refusal.fields["name"], refusal.fields["dtype"]) == ("tensor_unreadable", "a", dtype)


def test_a_process_that_ends_costs_the_file_that_it_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    with WorkerSlot() as worker:
        worker.start()
        for pid in children_of(os.getpid()):
            os.kill(pid, 9)
        with pytest.raises(EngineError, match="SIGKILL"):
            worker.read_pickle(str(tmp_path / "a.bin"))
        assert worker.read_pickle(str(tmp_path / "a.bin"))
