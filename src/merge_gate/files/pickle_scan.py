"""Pickled weights, read without unpickling: names, dtypes and shapes of what torch.save wrote.

In: an open file, which is hostile. Out: `StoredTensor`s; None if the file holds what only torch's own restricted loader
can judge; or `CorruptFileError`. No torch and no unpickler: nothing is imported, and nothing is called.
"""

# pickletools splits the opcodes. They are carried out on a stack of text, numbers, and containers, where a function is
# its name. torch.save writes a zip archive with a `data.pkl`. Before torch 1.6 it wrote five pickles in a row, the
# object as the fourth, and then the data (torch/serialization.py).

from __future__ import annotations

import errno
import io
import pickletools
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_gate.files.headers import (
    MAX_HEADER_BYTES,
    ZEROS,
    CorruptFileError,
    TruncatedFileError,
    other_format,
    shown,
)
from merge_gate.records.files import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader

_ZIP = b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_BEFORE_THE_OBJECT = 3  # magic number, protocol version, facts of the system

_STORAGES = {
    "torch.BoolStorage": "BOOL", "torch.ByteStorage": "U8", "torch.CharStorage": "I8", "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32", "torch.LongStorage": "I64", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.FloatStorage": "F32", "torch.DoubleStorage": "F64", "torch.ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""torch's names for what safetensors calls otherwise. Newer dtypes have no storage class of their own."""

_LEFT_TO_TORCH = {
    "_codecs.encode", "__builtin__.set", "builtins.set", "__builtin__.bytearray", "builtins.bytearray",
    "__builtin__.complex", "builtins.complex",
}  # fmt: skip
"""What torch's restricted loader knows and this reader does not, except names of torch and collections."""

_DO_NOT_LOAD = (
    "do not load this file: whatever unpickles it runs that; ask who made it, and have the adapter saved as "
    "safetensors, which holds tensors and nothing that runs"
)


class UnsafePickleError(CorruptFileError):
    """Unpickling the file imports or calls what no state dict needs."""

    def __init__(self, does: str, name: str) -> None:
        super().__init__(f"would {does} {shown(name)} when it is loaded, expected tensors only", _DO_NOT_LOAD)


class _BeyondThisReaderError(Exception):
    """Not broken as far as can be seen; torch has to say what it is."""


def read_pickled(file: BufferedReader, size_bytes: int) -> tuple[StoredTensor, ...] | None:
    """The tensors that a file of torch.save holds, in its order; None where that cannot be told without torch.

    Raises `CorruptFileError` for what torch's restricted loader would refuse as well, `UnsafePickleError` if that would
    run something.
    """
    if not size_bytes:
        raise TruncatedFileError("is empty (0 bytes)")
    file.seek(0)
    start = file.read(len(_ZIP))
    try:
        if start == _ZIP:
            return _headers(_run(io.BytesIO(_data_of_archive(file, size_bytes))))
        if _PICKLE.match(start):
            return _headers(_object_of_legacy_file(file))
    except _BeyondThisReaderError:
        return None
    if _is_safetensors(file):
        raise CorruptFileError("is not torch's format but safetensors", "give it the name adapter_model.safetensors")
    if (format_name := other_format(file)) is None:
        _refuse_calls(file)
    error = TruncatedFileError if format_name == ZEROS else CorruptFileError
    raise error(f"is not torch's format but {format_name or 'something unknown'}")


def _is_safetensors(file: BufferedReader) -> bool:
    """Whether the file begins as safetensors do: eight bytes of length, then the object."""
    file.seek(0)
    start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def _data_of_archive(file: BufferedReader, size_bytes: int) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            root = names[0].partition("/")[0] if names else ""
            name = f"{root}/data.pkl"
            if name not in names:
                raise CorruptFileError("is a zip archive, but none that torch.save wrote (it has no data.pkl)")
            with archive.open(name) as data:
                raw = data.read(MAX_HEADER_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's start is the file's
            raise
        raise TruncatedFileError(f"is truncated or damaged: {size_bytes:,} bytes of a zip archive ({error})") from None
    if len(raw) > MAX_HEADER_BYTES:
        raise CorruptFileError(f"has a data.pkl of more than {MAX_HEADER_BYTES:,} bytes, which is no list of tensors")
    return raw


def _object_of_legacy_file(file: BufferedReader) -> Any:
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_HEADER_BYTES))
    for _ in range(_BEFORE_THE_OBJECT):
        _run(stream)
    value = _run(stream)
    _run(stream)  # the keys of its storages, which are unpickled as well
    return value


def _refuse_calls(file: BufferedReader) -> None:
    """A pickle of protocol 0 or 1 has no mark at its start. torch writes none, and its unrestricted loader runs it."""
    try:
        _object_of_legacy_file(file)
    except UnsafePickleError:
        raise
    except (CorruptFileError, _BeyondThisReaderError):
        return


def _headers(value: Any) -> tuple[StoredTensor, ...]:
    if not isinstance(value, dict):
        raise CorruptFileError("does not hold tensors by name (torch.save of something else than a state dict)")
    return tuple(
        StoredTensor(name=name, dtype=tensor.dtype, shape=tensor.shape)
        for name, tensor in value.items()
        if isinstance(tensor, _Tensor)
    )


# --- values on the stack -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function as the pickle names it."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]


def _storage(reference: Any) -> _Storage:
    """`("storage", class, key, device, elements)`; a class without a dtype of its own leaves it to the tensor."""
    match reference:
        case ("storage", _Name(text), *_) if text in _STORAGES:
            return _Storage(_STORAGES[text])
        case ("storage", _Name("torch.storage.UntypedStorage"), *_):
            return _Storage(None)
    raise _BeyondThisReaderError


def _tensor(dtype: str | None, shape: Any) -> _Tensor:
    if dtype is None:
        raise _BeyondThisReaderError
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise CorruptFileError("has a tensor whose shape is not a tuple of sizes")
    return _Tensor(dtype, shape)


def _call(function: Any, arguments: Any) -> Any:
    """What torch's own functions make of their arguments, as far as it concerns names, dtypes and shapes."""
    if not isinstance(function, _Name):
        raise _BeyondThisReaderError
    match function.text, arguments:
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (_Storage(dtype), _, shape, *_):
            return _tensor(dtype, shape)
        case "torch._utils._rebuild_tensor_v3", (_Storage(), _, shape, _, _, _, _Name(dtype), *_):
            return _tensor(_DTYPES.get(dtype), shape)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (_Tensor() as data, *_):
            return data
        case "torch.Size", (tuple() as sizes,):
            return sizes
        case "collections.OrderedDict", ():
            return {}
    if _is_foreign(function.text):
        raise UnsafePickleError("call", function.text)
    raise _BeyondThisReaderError


def _is_foreign(name: str) -> bool:
    return not name.startswith(("torch.", "collections.")) and name not in _LEFT_TO_TORCH


# --- the stack -----------------------------------------------------------------------------------------------------

_MARK = object()


class _Stack:
    """The pickle machine, reduced to what a state dict needs."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.foreign: list[str] = []

    def push(self, value: Any) -> None:
        self.values.append(value)

    def top(self) -> Any:
        if not self.values:
            raise CorruptFileError("holds a damaged pickle: it takes more than it has put down")
        return self.values[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.values[-1]
        return value

    def pop_mark(self) -> list[Any]:
        taken: list[Any] = []
        while (value := self.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def pop_some(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def remember(self, place: int) -> None:
        self.memo[place] = self.top()

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise CorruptFileError("holds a damaged pickle: it refers to what it does not hold")
        self.push(self.memo[place])

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise _BeyondThisReaderError
        target.extend(items)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise _BeyondThisReaderError
        target.update((key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=False) if type(key) is str)

    def push_items(self, pairs: list[Any]) -> None:
        self.push({})
        self.set_items(pairs)

    def call(self, function: Any, arguments: Any) -> None:
        self.push(_call(function, arguments))

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise CorruptFileError("holds a damaged pickle: it names a function by something else than text")
        self.push_name(f"{module}.{name}")

    def push_name(self, text: str) -> None:
        if _is_foreign(text):
            self.foreign.append(text)
        self.push(_Name(text))

    def call_marked(self) -> None:
        function, *arguments = self.pop_mark() or (None,)
        self.call(function, tuple(arguments))

    def refuse_foreign(self) -> None:
        """An unpickler imports a name's module as soon as it has read the name."""
        if self.foreign:
            raise UnsafePickleError("import", self.foreign[0])


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
_LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "STRING", "UNICODE", "INT", "LONG", "FLOAT",
}  # fmt: skip
_NOTHING = {"STOP", "PROTO", "FRAME"}
_STEPS: dict[str, Callable[[_Stack, Any], object]] = {
    "TUPLE": lambda stack, _: stack.push(tuple(stack.pop_mark())),
    "TUPLE1": lambda stack, _: stack.push(tuple(stack.pop_some(1))),
    "TUPLE2": lambda stack, _: stack.push(tuple(stack.pop_some(2))),
    "TUPLE3": lambda stack, _: stack.push(tuple(stack.pop_some(3))),
    "APPEND": lambda stack, _: stack.extend(stack.pop_some(1)),
    "APPENDS": lambda stack, _: stack.extend(stack.pop_mark()),
    "SETITEM": lambda stack, _: stack.set_items(stack.pop_some(2)),
    "SETITEMS": lambda stack, _: stack.set_items(stack.pop_mark()),
    "LIST": lambda stack, _: stack.push(stack.pop_mark()),
    "DICT": lambda stack, _: stack.push_items(stack.pop_mark()),
    "POP": lambda stack, _: stack.pop(),
    "PUT": lambda stack, place: stack.remember(place),
    "MEMOIZE": lambda stack, _: stack.remember(len(stack.memo)),
    "GET": lambda stack, place: stack.recall(place),
    "GLOBAL": lambda stack, name: stack.push_name(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda stack, _: stack.name(*stack.pop_some(2)),
    "BINPERSID": lambda stack, _: stack.push(_storage(stack.pop())),
    "REDUCE": lambda stack, _: stack.call(*stack.pop_some(2)),
    "NEWOBJ": lambda stack, _: stack.call(*stack.pop_some(2)),
    "NEWOBJ_EX": lambda stack, _: stack.call(*stack.pop_some(3)[:2]),  # without the keywords
    "INST": lambda stack, name: stack.call(_Name(name.replace(" ", ".", 1)), tuple(stack.pop_mark())),
    "OBJ": lambda stack, _: stack.call_marked(),
    "BUILD": lambda stack, _: stack.pop(),  # attributes of a state dict (`_metadata`)
}
_STEPS |= {f"{size}BIN{name}": _STEPS[name] for size in ("", "LONG_") for name in ("PUT", "GET")}


def _run(stream: io.BytesIO) -> Any:
    """The value of the next pickle in the stream."""
    stack = _Stack()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old texts
            for opcode, argument, _ in pickletools.genops(stream):
                _carry_out(stack, opcode.name, argument)
    except _BeyondThisReaderError:
        stack.refuse_foreign()
        raise
    except ValueError as error:
        raise CorruptFileError(f"holds a damaged pickle ({error})") from None
    stack.refuse_foreign()
    return stack.pop()


def _carry_out(stack: _Stack, opcode: str, argument: Any) -> None:
    if opcode in _LITERALS:
        stack.push(argument)
    elif opcode in _CONSTANTS:
        stack.push(_CONSTANTS[opcode]())
    elif opcode in _STEPS:
        _STEPS[opcode](stack, argument)
    elif opcode not in _NOTHING:
        raise _BeyondThisReaderError
