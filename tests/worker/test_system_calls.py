"""The filter of system calls, read as the kernel reads it, for every architecture that it knows."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from merge_gate.worker import sandbox
from merge_gate.worker.sandbox import refuse_calls

ALLOWED, REFUSED, NO_SUCH_CALL, WITHOUT_EFFECT = "allowed", errno.EPERM, errno.ENOSYS, 0
AF_UNIX, AF_INET, THREAD, PROCESS = 1, 2, 0x10F00, 0x1200011


def answer(program: bytes, architecture: int, number: int, argument: int = 0) -> str | int:
    """What the kernel does with a call: `allowed`, or the error that it gives. Classic BPF, as far as it is used."""
    data = struct.pack("=IIQQ", number, architecture, 0, argument)
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    value = at = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        match code:
            case 0x20:
                (value,) = struct.unpack_from("=I", data, operand)
            case 0x06:
                return ALLOWED if operand == 0x7FFF0000 else operand & 0xFFFF
            case 0x15:
                at += if_true if value == operand else if_false
            case 0x35:
                at += if_true if value >= operand else if_false
            case 0x45:
                at += if_true if value & operand else if_false
            case _:
                pytest.fail(f"no step of this program: {code:#x}")
        at += 1


# Numbers of asm/unistd_64.h and asm-generic/unistd.h.
CALLS = {
    "x86_64": {
        "read": 0, "socket": 41, "connect": 42, "clone": 56, "fork": 57, "execve": 59, "kill": 62, "chmod": 90,
        "tgkill": 234, "openat": 257, "utimensat": 280, "clone3": 435,
    },
    "aarch64": {
        "read": 63, "socket": 198, "connect": 203, "clone": 220, "execve": 221, "kill": 129, "fchmodat": 53,
        "tgkill": 131, "openat": 56, "utimensat": 88, "clone3": 435,
    },
}  # fmt: skip
ANSWERS = {
    "read": ALLOWED, "openat": ALLOWED, "connect": REFUSED, "fork": REFUSED, "execve": REFUSED,
    "clone3": NO_SUCH_CALL, "chmod": WITHOUT_EFFECT, "fchmodat": WITHOUT_EFFECT, "utimensat": WITHOUT_EFFECT,
}  # fmt: skip


@pytest.mark.parametrize("machine", CALLS)
def test_the_filter_of_each_architecture(machine: str) -> None:
    kernel, column = sandbox._ARCHITECTURES[machine]
    program = b"".join(sandbox._program(kernel, column))
    for name, number in CALLS[machine].items():
        if name in ANSWERS:
            assert answer(program, kernel, number) == ANSWERS[name], name
            assert answer(program, kernel ^ 1, number) == REFUSED, "a call of another architecture"
            assert answer(program, kernel, number | 0x40000000) == REFUSED, "of x32"
    calls = CALLS[machine]
    assert answer(program, kernel, calls["socket"], AF_UNIX) == ALLOWED
    assert answer(program, kernel, calls["socket"], AF_INET) == REFUSED
    assert answer(program, kernel, calls["clone"], THREAD) == ALLOWED
    assert answer(program, kernel, calls["clone"], PROCESS) == REFUSED
    for call in ("kill", "tgkill"):
        assert answer(program, kernel, calls[call], os.getpid()) == ALLOWED
        assert answer(program, kernel, calls[call], os.getppid()) == REFUSED


def test_a_kernel_without_filters_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MODE_FILTER", 99)  # what such a kernel makes of the right one
    with pytest.raises(OSError, match="Invalid argument"):
        refuse_calls()


def test_an_architecture_without_a_list_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "sparc")
    with pytest.raises(OSError, match="the system calls of sparc are not listed"):
        refuse_calls()
