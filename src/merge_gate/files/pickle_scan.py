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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from merge_gate.files.headers import MAX_HEADER_BYTES, ZEROS, CorruptFileError, TruncatedFileError, other_format, shown
from merge_gate.records.files import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import BufferedReader

_ZIP = b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_BEFORE_THE_OBJECT = 3  # magic number, protocol version, facts of the system

_MOST_STEPS = 2_000_000
"""A tensor takes about 30, so these are more than 60,000 tensors."""
_MOST_CHARACTERS = 1000
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 1 << 63

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
            value = _run(io.BytesIO(_data_of_archive(file, size_bytes)))
        elif _PICKLE.match(start):
            value = _object_of_legacy_file(file)
        else:
            _refuse_format(file)
    except _BeyondThisReaderError:
        return None
    if not isinstance(value, dict):
        raise CorruptFileError("does not hold tensors by name (torch.save of something else than a state dict)")
    return tuple(replace(tensor, name=name) for name, tensor in value.items() if isinstance(tensor, StoredTensor))


def _refuse_format(file: BufferedReader) -> NoReturn:
    file.seek(0)
    start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        raise CorruptFileError("is not torch's format but safetensors", "give it the name adapter_model.safetensors")
    if (format_name := other_format(file)) is None:
        try:  # a pickle of protocol 0 or 1: torch writes none, and its unrestricted loader runs it
            _object_of_legacy_file(file)
        except UnsafePickleError:
            raise
        except (CorruptFileError, _BeyondThisReaderError):
            pass
    error = TruncatedFileError if format_name == ZEROS else CorruptFileError
    raise error(f"is not torch's format but {format_name or 'something unknown'}")


def _data_of_archive(file: BufferedReader, size_bytes: int) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            root = names[0].partition("/")[0] if names else ""
            name = f"{root}/data.pkl"
            if [one for one in names if one.lower() == name.lower()] != [name]:  # torch's reader ignores the case
                raise CorruptFileError("is a zip archive, but none that torch.save wrote (it has no data.pkl)")
            if archive.getinfo(name).compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise CorruptFileError("has a data.pkl in a compression that torch does not read")
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


# --- values on the stack -------------------------------------------------------------------------------------------


class _Name(str):
    """A class or function as the pickle names it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None


def _storage(reference: Any) -> _Storage:
    """`("storage", class, key, device, elements)`; a class without a dtype of its own leaves it to the tensor."""
    match reference:
        case ("storage", _Name() as name, *_) if name in _STORAGES:
            return _Storage(_STORAGES[name])
        case ("storage", _Name("torch.storage.UntypedStorage"), *_):
            return _Storage(None)
    raise _BeyondThisReaderError


def _tensor(dtype: str | None, shape: Any) -> StoredTensor:
    if dtype is None:
        raise _BeyondThisReaderError
    if isinstance(shape, list):  # torch takes it
        raise _BeyondThisReaderError
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        raise CorruptFileError("has a tensor whose shape is not a tuple of sizes")
    if any(type(size) is not int or not 0 <= size < _MOST_ELEMENTS for size in shape):
        raise CorruptFileError("has a tensor whose shape is not a tuple of sizes")
    return StoredTensor(name="", dtype=dtype, shape=shape)


def _call(function: Any, arguments: Any, *_: Any) -> Any:
    """What torch's own functions make of their arguments, as far as it concerns names, dtypes and shapes."""
    if not isinstance(function, _Name):
        raise _BeyondThisReaderError
    match str(function), arguments:
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (_Storage(dtype), _, shape, *_):
            return _tensor(dtype, shape)
        case "torch._utils._rebuild_tensor_v3", (_Storage(), _, shape, _, _, _, _Name() as dtype, *_):
            return _tensor(_DTYPES.get(dtype), shape)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (
            StoredTensor() as data,
            *_,
        ):
            return data
        case "torch.Size", (tuple() as sizes,):
            return sizes
        case "collections.OrderedDict", ():
            return {}
    if _is_foreign(function):
        raise UnsafePickleError("call", function)
    raise _BeyondThisReaderError


def _is_foreign(name: str) -> bool:
    return not name.startswith(("torch.", "collections.")) and name not in _LEFT_TO_TORCH


def _name(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise CorruptFileError("holds a damaged pickle: it names a function by something else than text")
    if len(module) + len(name) > _MOST_CHARACTERS:
        raise CorruptFileError(
            f"holds a damaged pickle: it names a function by more than {_MOST_CHARACTERS} characters"
        )
    return _Name(f"{module}.{name}")


def _extend(target: Any, items: list[Any]) -> Any:
    if not isinstance(target, list):
        raise _BeyondThisReaderError
    target.extend(items)
    return target


def _set_items(target: Any, pairs: Sequence[Any]) -> Any:
    if not isinstance(target, dict):
        raise _BeyondThisReaderError
    target.update((key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=False) if type(key) is str)
    return target


def _build(target: Any, _: Any) -> Any:
    """Without the attributes of a state dict (`_metadata`). A tensor would get another storage and shape."""
    if isinstance(target, StoredTensor):
        raise _BeyondThisReaderError
    return target


# --- the pickle machine, reduced to what a state dict needs ----------------------------------------------------------

_MARK = object()
_NOTHING = {"STOP", "PROTO", "FRAME"}
_LITERALS = (
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "STRING", "UNICODE", "INT", "LONG", "FLOAT",
)  # fmt: skip
_STEPS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_LITERALS, lambda value: value),
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "TUPLE": tuple, **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda *items: items),
    "LIST": list, "APPEND": lambda target, item: _extend(target, [item]), "APPENDS": _extend,
    "DICT": lambda pairs: _set_items({}, pairs), "SETITEM": lambda target, *pair: _set_items(target, pair),
    "SETITEMS": _set_items,
    "POP": lambda _: None,
    "GLOBAL": lambda name: _Name(name.replace(" ", ".", 1)), "STACK_GLOBAL": _name,
    "BINPERSID": _storage,
    "REDUCE": _call, "NEWOBJ": _call, "NEWOBJ_EX": _call,  # without the keywords
    "INST": lambda arguments, name: _call(_Name(name.replace(" ", ".", 1)), tuple(arguments)),
    "OBJ": lambda items: _call(items[0] if items else None, tuple(items[1:])),
    "BUILD": _build,
}  # fmt: skip
"""What each opcode makes of what it takes from the stack, and of its argument if it has one."""


def _run(stream: io.BytesIO) -> Any:
    """The value of the next pickle in the stream."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    foreign: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old texts
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count == _MOST_STEPS:
                    raise CorruptFileError(
                        f"holds a pickle of more than {_MOST_STEPS:,} steps, which is no list of tensors"
                    )
                _carry_out(opcode, argument, stack, memo)
                if stack and isinstance(stack[-1], _Name) and _is_foreign(stack[-1]):
                    foreign.append(stack[-1])
    except _BeyondThisReaderError:
        if not foreign:
            raise
    except ValueError as error:
        raise CorruptFileError(f"holds a damaged pickle ({error})") from None
    if foreign:  # an unpickler imports a name's module as soon as it has read the name
        raise UnsafePickleError("import", foreign[0])
    return _pop(stack)


def _carry_out(opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if opcode.name.endswith(("PUT", "MEMOIZE")):
        memo[len(memo) if argument is None else argument] = stack[-1] if stack else _pop(stack)
    elif opcode.name.endswith("GET"):
        if argument not in memo:
            raise CorruptFileError("holds a damaged pickle: it refers to what it does not hold")
        stack.append(memo[argument])
    elif opcode.name in _STEPS:
        value = _STEPS[opcode.name](*_taken(opcode, stack), *([] if opcode.arg is None else [argument]))
        stack.extend([value] if opcode.stack_after else [])
    elif opcode.name not in _NOTHING:
        raise _BeyondThisReaderError


def _taken(opcode: pickletools.OpcodeInfo, stack: list[Any]) -> list[Any]:
    """What the opcode takes from the stack: single values, then a list of those above the last mark."""
    count, above = len(opcode.stack_before), []
    if pickletools.markobject in opcode.stack_before:
        count, values = opcode.stack_before.index(pickletools.markobject), []
        while (value := _pop(stack)) is not _MARK:
            values.append(value)
        above = [values[::-1]]
    return [*[_pop(stack) for _ in range(count)][::-1], *above]


def _pop(stack: list[Any]) -> Any:
    if not stack:
        raise CorruptFileError("holds a damaged pickle: it takes more than it has put down")
    return stack.pop()
