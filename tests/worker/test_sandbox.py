"""The worker's sandbox, tried by code that a base brings along, with and without it, and its filter of system calls."""

import ctypes
import errno
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from merge_gate.records.report import Sandbox
from merge_gate.worker import sandbox
from merge_gate.worker.protocol import Job
from merge_gate.worker.sandbox import SWITCH, confine, limit, refuse_calls
from tests.support.command import environment, merge_gate, strict_json
from tests.support.wording import Wording

ROGUE = """
import json, os, signal, socket, subprocess, threading
from pathlib import Path
from transformers import LlamaForCausalLM

outside, port = Path(PLACE), PORT
here = Path.cwd()


def bomb():
    children = [os.fork() for _ in range(3)]
    if 0 in children:
        os._exit(0)


def thread():
    started = threading.Thread(target=here.joinpath("by-thread").write_text, args=("x",))
    started.start()
    started.join()


def grow():
    with here.joinpath("long").open("wb") as file:
        file.truncate(1 << 45)


def connect(kind, address):
    with socket.socket(kind, socket.SOCK_STREAM) as line:
        line.settimeout(5)
        line.connect(address)


def whisper():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.sendto(b"secret", ("127.0.0.1", port))


tries = {
    "write": lambda: outside.joinpath("written").write_text("x"),
    "append": lambda: outside.joinpath("victim").open("a").write("x"),
    "truncate": lambda: os.truncate(outside / "victim", 0),
    "remove": lambda: outside.joinpath("removable").unlink(),
    "rename": lambda: outside.joinpath("renamable").rename(outside / "renamed"),
    "link": lambda: os.link(outside / "victim", here / "link"),
    "chmod": lambda: outside.joinpath("victim").chmod(0o777),
    "times": lambda: os.utime(outside / "victim", (1, 1)),
    "tcp": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
    "udp": whisper,
    "unix": lambda: connect(socket.AF_UNIX, str(outside / "socket")),
    "fork": bomb,
    "program": lambda: subprocess.run(["touch", str(outside / "touched")], check=True),
    "signal": lambda: os.kill(os.getppid(), signal.SIGCONT),
    "grow": grow,
    "thread": thread,
    "own": lambda: here.joinpath("own").write_text("x"),
}
done = []
for name, attempt in tries.items():
    try:
        attempt()
        done.append(name)
    except OSError:
        pass


class RogueForCausalLM(LlamaForCausalLM):
    pass


RESULT
"""
TELL = 'raise RuntimeError("done: " + " ".join(done))'


@contextmanager
def victims(outside: Path) -> Iterator[int]:
    """A directory outside of the worker's own, and a port of the loopback, both of which ought to stay as they are."""
    outside.mkdir()
    for name in ("victim", "removable", "renamable"):
        (outside / name).write_text("as it was")
    (outside / "victim").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(outside / "socket"))
        unix.listen()
        yield tcp.getsockname()[1]


def gate(shelf, place: Path, port: int, results: dict[str, str], **changes: str) -> Any:
    """Gate an adapter on bases of these names, whose code is hostile and ends as the results say; the report."""
    shutil.copytree(shelf.adapter("plain"), place / "adapter")
    for name, result in results.items():
        base = place / name
        shutil.copytree(shelf.base("llama"), base)
        config = json.loads((base / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_rogue.RogueForCausalLM"}
        (base / "config.json").write_text(json.dumps(config))
        code = ROGUE.replace("PLACE", repr(str(place / "outside"))).replace("PORT", str(port))
        (base / "modeling_rogue.py").write_text(code.replace("RESULT", result))
    entries = [{"name": name, "path": "./adapter", "base": f"./{name}"} for name in results]
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": entries, "trust-remote-code": True}))
    answer = merge_gate("run", "gate.yml", "--device", "cpu", cwd=place, **changes)
    return strict_json(place / "merge-gate-report" / "report.json") | {"said": answer.said}


def done_by(report: Any, name: str) -> set[str]:
    (adapter,) = (one for one in report["adapters"] if one["name"] == name)
    message = next(one["message"] for one in adapter["findings"] if one["check"] == "not-judged")
    return set(str(message).partition("done: ")[2].split())


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HOME")


Confined = tuple[Any, Path, os.stat_result]


@pytest.fixture(scope="module")
def confined(shelf, tmp_path_factory: pytest.TempPathFactory) -> Confined:
    """A run within the sandbox, its directory, and what the file `victim` was before.

    The code of a base tells what it could do, that of another one lets it be loaded. The caches that the environment
    names are outside of the worker's directory.
    """
    place = tmp_path_factory.mktemp("confined")
    with victims(place / "outside") as port:
        before = (place / "outside" / "victim").stat()
        elsewhere = {name: str(place / "elsewhere" / name.lower()) for name in CACHES}
        return gate(shelf, place, port, {"tells": TELL, "loads": ""}, **elsewhere), place, before


def test_code_of_a_base_is_held_and_the_report_says_by_what(confined: Confined) -> None:
    report, place, before = confined
    # What Landlock leaves open seems to succeed, so that libraries can copy files with their modes, and does nothing.
    assert done_by(report, "tells") == {"own", "thread", "chmod", "times"}, report["said"]
    assert report["environment"]["sandbox"] == {
        "held": ["files", "network", "processes", "file size", "memory"],
        "missing": [],
    }
    outside = place / "outside"
    assert sorted(one.name for one in outside.iterdir()) == ["removable", "renamable", "socket", "victim"]
    assert (outside / "victim").read_text() == "as it was"
    after = (outside / "victim").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert stat.S_IMODE(after.st_mode) == 0o600


def test_code_of_a_base_runs_within_it_with_the_workers_caches(confined: Confined) -> None:
    """A library that may not make the directory of its cache fails while it is imported, and with it the adapter."""
    report, place, _ = confined
    assert [one["verdict"] for one in report["adapters"] if one["name"] == "loads"] == ["passed"], report["said"]
    assert [one["loaded_as"] for one in report["bases"] if one["model"] == "./loads"] == ["RogueForCausalLM"]
    assert not (place / "elsewhere").exists()


def test_without_it_the_report_says_so_and_code_does_harm(shelf, tmp_path: Path) -> None:
    with victims(tmp_path / "outside") as port:
        report = gate(shelf, tmp_path, port, {"tells": TELL}, MERGE_GATE_SANDBOX="off")
    harm = {"write", "remove", "truncate", "tcp", "unix", "fork", "program"}
    assert harm <= done_by(report, "tells"), report["said"]
    (missing,) = report["environment"]["sandbox"]["missing"]
    assert report["environment"]["sandbox"]["held"] == []
    assert "MERGE_GATE_SANDBOX" in missing
    assert missing in report["said"]
    assert not (tmp_path / "outside" / "victim").read_text()


WITHOUT = """
import errno, json, os, platform
from pathlib import Path
from merge_gate.worker import sandbox
from merge_gate.worker.protocol import Job

def absent(_paths):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

sandbox.restrict_writes = absent
platform.machine = lambda: "sparc"
held = sandbox.confine(Path.cwd())
limited = [sandbox.limit(held, Job(groups=()), device) for device in ("cpu", "cuda:0")]
print(json.dumps([held.held, held.missing, limited[0].held, limited[1].missing[-1]]))
"""


def test_what_a_kernel_lacks_is_said_with_its_reason(tmp_path: Path, wording: Wording) -> None:
    """And that a card's driver maps more addresses than there is memory."""
    command = [sys.executable, "-P", "-c", WITHOUT]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, check=True)
    held, missing, limits, missing_on_a_card = json.loads(done.stdout)
    assert (held, limits) == ([], ["file size", "memory"])
    wording(*missing, missing_on_a_card)


LIMITED = """
import os
from merge_gate.records.files import BaseFiles
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey
from merge_gate.worker.protocol import ConsumerSpec, Group, Job, Task
from merge_gate.worker.sandbox import limit

most = 5 << 30
task = Task(index=0, files=(), consumers=(ConsumerSpec(feature="publish", most_bytes=most),))
key = BaseKey(model="base", revision=None, dtype="auto", quantization="none")
group = Group(base=key, directory="", files=BaseFiles(directory=""), tasks=(task,))
limit(Sandbox(), Job(groups=(group,)), "cpu")
file = os.open("model", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, most)
for grow in (lambda: os.ftruncate(file, most + 1), lambda: os.pwrite(file, b"xx", most)):
    try:
        grow()
    except OSError as error:
        print(error.strerror)
"""


def test_a_file_may_be_as_large_as_the_largest_of_a_model(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", LIMITED]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, check=True)
    assert done.stdout.split(b"\n")[:2] == [b"File too large"] * 2


# --- in a thread of this process, of which alone it holds ------------------------------------------------------------


def in_a_thread(what: Callable[[], None]) -> None:
    """Run something that is given up for good, and raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - the test's own failures too
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_what_is_given_up_is_given_up(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()

    def give_up() -> None:
        assert confine(own) == Sandbox(held=("files", "network", "processes"))
        (own / "file").write_text("x")
        (own / "file").rename(own / "renamed")
        Path(os.devnull).write_text("x")
        with pytest.raises(PermissionError):
            (other / "file").write_text("x")
        with pytest.raises(PermissionError):
            (own / "renamed").rename(other / "renamed")
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_INET)
        with pytest.raises(PermissionError):
            os.fork()

    in_a_thread(give_up)
    assert list(other.iterdir()) == []


@pytest.mark.attempt("F16", "the worker opens, links, cuts, or renames a model's file", "it can only write to it")
def test_a_file_that_was_passed_open_can_be_written_to_only(tmp_path: Path) -> None:
    own, models = tmp_path / "own", tmp_path / "models"
    own.mkdir()
    models.mkdir()
    descriptor = os.open(models / "model", os.O_RDWR | os.O_CREAT)
    path = f"/proc/self/fd/{descriptor}"

    def give_up() -> None:
        confine(own)
        os.pwrite(descriptor, b"x", 3)
        for attempt in (
            lambda: os.open(path, os.O_RDWR),
            lambda: os.truncate(path, 0),
            lambda: os.link(path, own / "link", follow_symlinks=True),
            lambda: os.link(models / "model", own / "link"),
            lambda: (models / "model").rename(models / "other"),
            (models / "model").unlink,
            lambda: (models / "new").write_bytes(b""),
        ):
            with pytest.raises(OSError, match=r"."):
                attempt()

    in_a_thread(give_up)
    os.close(descriptor)
    assert [(path.name, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()] == [("model", b"\0\0\0x")]


def test_a_cards_driver_may_write_where_it_has_to(tmp_path: Path) -> None:
    shared = Path("/dev/shm") / f"{tmp_path.name}-{os.getpid()}"

    def try_to_write(*devices: str) -> None:
        confine(tmp_path, devices)
        Path("/dev/zero").write_text("x")
        shared.write_text("x")
        shared.unlink()

    with pytest.raises(PermissionError):
        in_a_thread(try_to_write)
    in_a_thread(lambda: try_to_write("zero"))


def test_capabilities_that_cannot_be_read_are_still_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CAPABILITIES_VERSION", 0)
    held: list[Sandbox] = []
    in_a_thread(lambda: held.append(confine(tmp_path)))
    assert held == [Sandbox(held=("files", "network", "processes"))]


def test_switched_off_nothing_is_given_up_and_nothing_bounded(tmp_path: Path, variables) -> None:
    variables[SWITCH] = "off"
    told = Sandbox(missing=("everything: MERGE_GATE_SANDBOX is off",))
    assert confine(tmp_path) == told
    assert limit(told, Job(groups=()), "cpu") is told


def test_a_rule_that_the_kernel_refuses_is_an_error(tmp_path: Path) -> None:
    def give_up() -> None:
        with pytest.raises(FileNotFoundError):
            sandbox.restrict_writes([tmp_path / "absent"])
        (tmp_path / "file").write_text("x")

    in_a_thread(give_up)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sandbox._call(sandbox._RESTRICT, -1, 0)


ALLOWED, REFUSED, NO_SUCH_CALL, WITHOUT_EFFECT = "allowed", errno.EPERM, errno.ENOSYS, 0
AF_UNIX, AF_INET, THREAD, NEW_PROCESS = 1, 2, 0x10F00, 0x1200011


def answer(program: bytes, architecture: int, number: int, argument: int = 0, second: int = 0) -> str | int:
    """What the kernel does with a call: `allowed`, or the error that it gives. Classic BPF, as far as it is used."""
    data = struct.pack("=IIQQQ", number, architecture, 0, argument, second)
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
        "prlimit64": 302, "prctl": 157, "ioctl": 16, "fcntl": 72,
    },
    "aarch64": {
        "read": 63, "socket": 198, "connect": 203, "clone": 220, "execve": 221, "kill": 129, "fchmodat": 53,
        "tgkill": 131, "openat": 56, "utimensat": 88, "clone3": 435,
        "prlimit64": 261, "prctl": 167, "ioctl": 29, "fcntl": 25,
    },
}  # fmt: skip
ARGUMENTS = {"kill": (9,), "tgkill": (9,), "prlimit64": (0,)}
SECONDS = [
    ("ioctl", 0x5412, True), ("ioctl", 0x541C, True), ("ioctl", 0x540E, True), ("ioctl", 0x5410, True),
    ("ioctl", 0x8901, True), ("ioctl", 0x8902, True), ("ioctl", 0x5401, False), ("fcntl", 8, True),
    ("fcntl", 15, True), ("fcntl", 2, False),
    ("ioctl", 0xC020462A, False), ("ioctl", 0x30000001, False), ("ioctl", 37, False),  # nvidia, nvidia-uvm
    ("ioctl", 0xC0184B01, False), ("ioctl", 0xC0106407, False),  # kfd, dri
]  # fmt: skip
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
    assert answer(program, kernel, calls["clone"], NEW_PROCESS) == REFUSED
    for call, (first, *_) in ARGUMENTS.items():
        for own in (0, os.getpid()) if call == "prlimit64" else (os.getpid(),):
            assert answer(program, kernel, calls[call], own, first) == ALLOWED
        assert answer(program, kernel, calls[call], os.getppid(), first) == REFUSED
    for call, number in (("prctl", 1), ("prctl", 15)):
        assert answer(program, kernel, calls[call], number) == (REFUSED if number == 1 else ALLOWED)
    for call, number, is_refused in SECONDS:
        assert answer(program, kernel, calls[call], 3, number) == (REFUSED if is_refused else ALLOWED), hex(number)
    for name, numbers in sandbox._REFUSED.items():
        if numbers[column]:
            assert answer(program, kernel, numbers[column]) == REFUSED, name
    for call in ("kill", "tgkill"):
        assert answer(program, kernel, calls[call], os.getpid()) == ALLOWED
        assert answer(program, kernel, calls[call], os.getppid()) == REFUSED


REACHING = {
    "its end without its parent": lambda call: call(157, 1, 0, 0, 0, 0),
    "limits of the parent": lambda call: call(302, os.getppid(), 0, None, None),
    "the affinity of a group": lambda call: call(141, 1, 0, 5),
    "scheduling": lambda call: call(144, os.getppid(), 0, None),
    "a segment of memory": lambda call: call(29, 0x6B6B, 4096, 0o1600),
    "a semaphore": lambda call: call(64, 0x6B6B, 1, 0o1600),
    "a queue": lambda call: call(68, 0x6B6B, 0o1600),
    "a POSIX queue": lambda call: call(240, b"merge-gate-test", 0o102, 0o600, None),
    "a new key": lambda call: call(248, b"user", b"merge-gate", b"x", 1, -4),
    "the keys of the session": lambda call: call(250, 0, -3, 0),
    "a program of the kernel": lambda call: call(321, 0, None, 0),
    "counters of the parent": lambda call: call(298, None, os.getppid(), -1, -1, 0),
    "faults of memory": lambda call: call(323, 0),
}
"""Calls on x86_64 with which code reaches other processes, or parts of the kernel."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_this_kernel_refuses_what_reaches_other_processes(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def give_up() -> None:
        confine(tmp_path)
        for what, attempt in REACHING.items():
            assert attempt(libc.syscall) == -1, what
            assert ctypes.get_errno() == errno.EPERM, what
        with pytest.raises(PermissionError):
            resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))
        assert resource.prlimit(0, resource.RLIMIT_CORE) == resource.prlimit(os.getpid(), resource.RLIMIT_CORE)
        one, other = socket.socketpair()
        with one, other, pytest.raises(PermissionError):
            fcntl.fcntl(one, fcntl.F_SETOWN, os.getppid())

    in_a_thread(give_up)


def test_no_terminal_is_read_or_typed_into(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)

    def give_up() -> None:
        confine(tmp_path)
        for path in (name, "/dev/ptmx", "/dev/tty"):
            with pytest.raises(OSError, match=r"Permission denied|No such device"):
                os.open(path, os.O_RDONLY | os.O_NOCTTY)
        with pytest.raises(PermissionError):
            fcntl.ioctl(theirs, termios.TIOCSTI, b"x")
        with pytest.raises(PermissionError):
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        assert os.path.exists("/dev/shm")  # noqa: PTH110 - as libraries ask
        for device in ("null", "zero", "urandom"):
            Path("/dev", device).open("rb").close()

    in_a_thread(give_up)
    os.close(ours)
    os.close(theirs)


def test_a_base_in_shared_memory_can_be_read(tmp_path: Path) -> None:
    shared = Path("/dev/shm") / f"{tmp_path.name}-{os.getpid()}"
    shared.write_text("x")

    def give_up() -> None:
        confine(tmp_path)
        assert shared.read_text() == "x"

    try:
        in_a_thread(give_up)
    finally:
        shared.unlink()


MOUNT = "36 25 0:40 / {place} rw,relatime shared:1 - {kind} server:/export rw\n"


@pytest.mark.parametrize(
    ("place", "kind", "is_read"),
    [("/data", "nfs4", True), ("/data", "ext4", False), ("/data/deep", "nfs4", False), ("/", "fuse", False)],
)
def test_a_network_mount_in_the_root_is_not_waited_for(place, kind, is_read, tmp_path, wording) -> None:
    (tmp_path / "mounts").write_text(MOUNT.format(place=place, kind=kind))
    why = sandbox.why_terminals_are_read(tmp_path / "mounts")
    assert bool(why) == is_read
    if why:
        wording(why)


def test_the_page_names_each_call_that_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "security.md").read_text(encoding="utf-8")
    table = page.partition("seccomp refuses these calls:")[2].partition("No real GPU was tried")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    tables = sandbox._REFUSED, sandbox._UNKNOWN, sandbox._WITHOUT_EFFECT, sandbox._OWN_ONLY, sandbox._BY_ARGUMENT
    assert named == {name for each in tables for name in each} | {"socket", "clone"}


def test_a_kernel_without_filters_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MODE_FILTER", 99)  # what such a kernel makes of the right one
    with pytest.raises(OSError, match="Invalid argument"):
        refuse_calls()
