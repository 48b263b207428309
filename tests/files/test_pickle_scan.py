"""Pickled weights without unpickling: what torch writes is read as torch reads it; what is hostile is not run."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import errno
import functools
import io
import os
import pickle
import pickletools
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_gate.files.headers import CorruptFileError
from merge_gate.files.pickle_scan import UnsafePickleError, read_pickled
from merge_gate.records.files import StoredTensor
from tests.support.files.headers_of import header_of
from tests.support.files.pickles import Call, packed
from tests.support.properties import examples
from tests.support.wording import Wording

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.zeros(4, 3),
        "half": torch.zeros(2, 3, dtype=torch.float16),
        "scalar": torch.tensor(3),
        "nothing": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.zeros(2, 2)),
    }


def look(path: Path) -> tuple[StoredTensor, ...] | None:
    with path.open("rb") as file:
        return read_pickled(file, path.stat().st_size)


def refuse(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        look(path)
    return str(caught.value)


# --- what torch writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_reads_what_safetensors_holds_of_the_same_tensors(tmp_path: Path, protocol: int, zipped: bool) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    torch.save(tensors(), tmp_path / "a.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = look(tmp_path / "a.bin")
    assert found is not None
    assert {one.name for one in found} == set(tensors())
    assert sorted(found, key=lambda one: one.name) == sorted(
        header_of(tmp_path / "a.safetensors"), key=lambda one: one.name
    )


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_has_the_name_that_safetensors_gives_it(tmp_path: Path, name: str) -> None:
    value = {"a": torch.zeros(4, 2, dtype=getattr(torch, name))}
    save_file(value, tmp_path / "a.safetensors")
    torch.save(value, tmp_path / "a.bin")
    assert look(tmp_path / "a.bin") == header_of(tmp_path / "a.safetensors")


def test_views_have_their_own_shape(tmp_path: Path) -> None:
    whole = torch.zeros(6, 4)
    torch.save({"t": whole.T, "rows": whole[1:3]}, tmp_path / "a.bin")
    found = look(tmp_path / "a.bin")
    assert found is not None
    assert [one.shape for one in found] == [(4, 6), (2, 4)]


def test_a_state_dict_with_its_attributes(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "a.bin")
    assert look(tmp_path / "a.bin") == (
        StoredTensor(name="weight", dtype="F32", shape=(2, 3)),
        StoredTensor(name="bias", dtype="F32", shape=(2,)),
    )


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(2), "counts": collections.Counter("aab")},
    ],
    ids=["sparse", "counter"],
)
def test_what_only_torch_knows_is_left_to_torch(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.bin")
    assert look(tmp_path / "a.bin") is None


def rebuilt(storage: bytes, shape: bytes) -> bytes:
    """`{"a": tensor}`, as opcodes: a tensor of torch's `_rebuild_tensor` on this storage and of this shape."""
    reference = b"(X\x07\0\0\0storagec" + storage + b"X\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor\n(" + reference + b"K\0" + shape + b"K\x01\x85tRs."


FLOAT = b"torch\nFloatStorage\n"


def test_a_size_is_a_shape(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(packed(rebuilt(FLOAT, b"ctorch\nSize\nK\x02\x85\x85R")))
    assert look(tmp_path / "a.bin") == (StoredTensor(name="a", dtype="F32", shape=(2,)),)


@pytest.mark.parametrize(
    "shape",
    [
        b"K\x02", b"J\xff\xff\xff\xff\x85", b"X\x01\0\0\0a\x85",
        b"\x8a\x0a" + bytes(9) + b"\x01\x85", b"(" + 65 * b"K\x01" + b"t",
    ],
    ids=["number", "negative", "text", "beyond 64 bits", "65 dimensions"],
)  # fmt: skip
def test_a_shape_that_is_none(tmp_path: Path, shape: bytes, wording: Wording) -> None:
    wording(refuse(tmp_path / "a.bin", packed(rebuilt(FLOAT, shape))))


@pytest.mark.parametrize(
    "written",
    [
        rebuilt(b"torch.storage\nUntypedStorage\n", b"K\x02\x85"),
        b"\x80\x02}X\x01\0\0\0a)Qs.",
        b"\x80\x02}X\x01\0\0\0aK\x01)Rs.",
        b"\x80\x02K\x01K\x01a.",
        b"\x80\x02K\x01K\x01K\x01s.",
    ],
    ids=["bytes", "reference", "a call of a number", "an item of a number", "an entry of a number"],
)
def test_what_has_no_meaning_here_is_left_to_torch(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(packed(written))
    assert look(tmp_path / "a.bin") is None


def test_an_escape_that_is_none_is_no_warning(tmp_path: Path, wording: Wording) -> None:
    wording(refuse(tmp_path / "a.bin", packed(b"\x80\x02S'\\q'\n.")))


@pytest.mark.parametrize(
    "written", [rebuilt(FLOAT, b"]K\x02a"), rebuilt(FLOAT, b"K\x02\x85")[:-2] + b"}bs."], ids=["list", "rebuilt again"]
)
def test_a_tensor_that_torch_may_make_otherwise_is_left_to_torch(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(packed(written))
    assert look(tmp_path / "a.bin") is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"\x80\x04X\x58\x02\0\0" + 600 * b"a" + b"\x940h\0h\0\x93.", "more than 1000 characters"),
        (b"\x80\x02" + 2_001 * b"]" + b".", "more than 2,000 steps"),
    ],
    ids=["a name by memory", "steps without end"],
)
def test_a_small_pickle_makes_nothing_large(
    tmp_path: Path, written: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_gate.files.pickle_scan._MOST_STEPS", 2_000)
    assert said in refuse(tmp_path / "a.bin", packed(written))


def test_two_lists_of_tensors_in_one_archive(tmp_path: Path) -> None:
    """torch's reader ignores the case of names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("archive/data.pkl", "archive/DATA.pkl"):
            archive.writestr(name, rebuilt(FLOAT, b"K\x02\x85"))
    refuse(tmp_path / "a.bin", content.getvalue())


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_that_torch_does_not_read(tmp_path: Path, method: int) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr("archive/data.pkl", rebuilt(FLOAT, b"K\x02\x85"))
    refuse(tmp_path / "a.bin", content.getvalue())


def test_a_list_of_tensors_without_end_is_not_read(tmp_path: Path, wording: Wording) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_001))
    wording(refuse(tmp_path / "a.bin", (tmp_path / "a.bin").read_bytes()))


class FailingDisk(io.FileIO):
    """Whose start cannot be read a second time."""

    reads = 0

    def readinto(self, buffer: Any) -> int:
        self.reads += self.tell() == 0
        if self.reads > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def test_a_disk_that_fails_is_not_the_files_fault(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(packed(b"\x80\x02}."))
    with (
        io.BufferedReader(FailingDisk(tmp_path / "a.bin"), 16) as file,
        pytest.raises(OSError, match=os.strerror(errno.EIO)),
    ):
        read_pickled(file, 9)


# --- what is hostile -----------------------------------------------------------------------------------------------


class Empty:
    """An object without arguments, which the oldest protocols write by INST and OBJ."""


HOSTILE: dict[str, tuple[Any, str]] = {
    "os.system": (Call(os.system, "touch ran"), r"'(posix|nt)\.system'"),
    "eval": (Call(eval, "open('ran', 'w')"), r"'(__builtin__|builtins)\.eval'"),
    "the inner of two": (Call(print, Call(eval, "open('ran', 'w')")), r"'(__builtin__|builtins)\.eval'"),
    "a function of a function": (Call(functools.partial, os.system), r"'functools\.partial'"),
    "far down": ({"a": [({}, [Call(os.mkdir, "ran")])]}, r"'(posix|nt)\.mkdir'"),
    "with keywords": (Call(copyreg.__newobj_ex__, Empty, (), {"a": 1}), r"(Empty|getattr|__newobj_ex__)'"),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["zip", "before-1.6", "bare"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_call_is_named_and_not_made(
    tmp_path: Path, case: str, kind: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, function = HOSTILE[case]
    whole = {"payload": value}
    if kind == "bare":
        (tmp_path / "a.bin").write_bytes(pickle.dumps(whole, protocol))
    else:
        torch.save(whole, tmp_path / "a.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UnsafePickleError, match=function) as raised:
        look(tmp_path / "a.bin")
    assert "allow-pickle" not in raised.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "written",
    [
        b"(ios\nsystem\n.",
        b"((ios\nsystem\nt.",
        b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.",
        b"cos\nsystem\n(S'ls'\ntR.",
        b"cos\nsystem\n(S'ls'\ntR0}.",
        b"\x80\x02}(X\x01\x00\x00\x00acos\nsystem\n)Ru\x8f.",  # before what this reader does not know
    ],
    ids=["INST", "INST-in-a-tuple", "OBJ", "text", "result-dropped", "and-a-set"],
)
def test_a_call_is_named_however_it_is_written(tmp_path: Path, written: bytes, wording: Wording) -> None:
    for content in (packed(written), written):
        message = refuse(tmp_path / "a.bin", content)
        assert "'os.system'" in message
        wording(message)


@pytest.mark.parametrize("ends", [b".", b"\x8f."], ids=["read", "left to torch"])
def test_a_name_alone_is_imported_by_who_unpickles_it(tmp_path: Path, ends: bytes, wording: Wording) -> None:
    written = b"\x80\x02}X\x01\x00\x00\x00acevil.module\nthing\ns" + ends
    message = refuse(tmp_path / "a.bin", packed(written))
    assert "'evil.module.thing'" in message
    wording(message)


def test_a_call_among_the_keys_of_storages(tmp_path: Path, wording: Wording) -> None:
    """The fifth pickle of a file of before torch 1.6, which is unpickled too."""
    torch.save(tensors(), tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    stream = io.BytesIO((tmp_path / "a.bin").read_bytes())
    for _ in range(4):
        collections.deque(pickletools.genops(stream), 0)
    content = stream.getvalue()[: stream.tell()] + pickle.dumps([Call(os.system, "ls")], 2)
    wording(refuse(tmp_path / "a.bin", content))


@pytest.mark.parametrize("value", [{1, 2}, bytearray(b"a"), b"a", 1j], ids=repr)
def test_what_is_no_tensor_and_calls_nothing_foreign_is_left_to_torch(tmp_path: Path, value: Any) -> None:
    torch.save({"a": torch.zeros(2), "more": value}, tmp_path / "a.bin")
    assert look(tmp_path / "a.bin") is None
    assert torch.load(tmp_path / "a.bin", weights_only=True)["more"] == value


def test_setattr_is_not_mistaken_for_a_set(tmp_path: Path, wording: Wording) -> None:
    hostile = pickle.dumps({"a": Call(setattr, "x", "y", 1)}, protocol=2)
    wording(refuse(tmp_path / "a.bin", packed(hostile)))


def test_something_else_than_tensors_by_name(tmp_path: Path, wording: Wording) -> None:
    wording(refuse(tmp_path / "a.bin", packed(pickle.dumps([1, 2], protocol=2))))


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",  # tuples in tuples
        b"\x80\x02" + b")" + b"\x85" * 200_000 + b"}\x86R.",  # a call of them
        b"\x80\x04" + b")" + b"\x85" * 200_000 + b"\x8c\x01a\x93.",  # a module of that name
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",  # a key that would have to be hashed
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02}",
    ],
    ids=["memo", "tuples", "call", "name", "key", "nothing", "no-mark", "no-memo", "length", "no-end"],
)
def test_what_brings_an_unpickler_down_is_read_to_its_end(tmp_path: Path, hostile: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(packed(hostile))
    with contextlib.suppress(CorruptFileError):
        assert not look(tmp_path / "a.bin")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04", b"junk" * 9])
def test_a_file_that_is_not_whole(tmp_path: Path, content: bytes) -> None:
    assert refuse(tmp_path / "a.bin", content)


def test_safetensors_under_the_name_of_a_pickle(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 3)}, tmp_path / "a.bin")
    with (tmp_path / "a.bin").open("rb") as file, pytest.raises(CorruptFileError, match="safetensors") as caught:
        read_pickled(file, (tmp_path / "a.bin").stat().st_size)
    assert "adapter_model.safetensors" in caught.value.hint


def test_an_archive_that_torch_did_not_write(tmp_path: Path, wording: Wording) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    wording(refuse(tmp_path / "a.bin", (tmp_path / "a.bin").read_bytes()))


@settings(max_examples=examples(300))
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_gets_past_as_another_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    """Whatever torch's own loader still reads of a damaged file, this reader reads alike or leaves to torch."""
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3).half()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        whole = bytearray(archive.read("archive/data.pkl"))
    place %= len(whole)
    whole[place] = byte
    path.write_bytes(packed(bytes(whole[:place]) if cut else bytes(whole)))
    try:
        found = look(path)
    except CorruptFileError:
        with pytest.raises(Exception):  # noqa: B017 - torch has many ways to say it
            named(torch.load(path, weights_only=True))
        return
    if found is None:
        return
    try:
        loaded = torch.load(path, weights_only=True)
    except Exception:  # noqa: BLE001 - as above
        return
    assert [(one.name, one.shape) for one in found] == named(loaded)


def named(loaded: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Raises where there are no tensors by name."""
    return [(name, tuple(tensor.shape)) for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)]


def test_an_archive_whose_directory_points_before_its_start_is_damaged(tmp_path: Path, wording: Wording) -> None:
    """Not a disk that cannot be read, which would be nobody's fault."""
    whole = bytearray(packed(b"\x80\x02}."))
    place = whole.rindex(b"PK\x01\x02") + 42  # where the first member starts
    whole[place : place + 4] = (1).to_bytes(4, "little")
    end = whole.rindex(b"PK\x05\x06") + 16  # where the directory starts, for a file that lost its first bytes
    whole[end : end + 4] = (len(whole)).to_bytes(4, "little")
    wording(refuse(tmp_path / "a.bin", bytes(whole)).partition(" (")[0])
