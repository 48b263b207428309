"""A worker in the hands of an attacker: it is confined as the real one, imports no torch, and attacks.

In: a job, whose bases have the names of `ATTACKS`. Workers of other bases send a verdict. `attacked` lays out such
bases, and gives the environment of a run on them. An attack sends a line to the socket `started` when it begins.
"""

import ctypes
import errno
import fcntl
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate.features.publish.calls import PublicationPlanned
from merge_gate.records.files import FileIdentity, StoredTensor
from merge_gate.records.measured import BaseFacts, Evidence, FileTensor, TensorMerge, TensorStats
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.report import Sandbox
from merge_gate.worker import protocol
from merge_gate.worker.channel import MOST, MOST_FILES, CallChannel, Channel
from merge_gate.worker.encoding import Limits
from merge_gate.worker.protocol import BaseLoading, Job, Merged, MergeProgressed, MergeStarted, Unjudged
from merge_gate.worker.sandbox import confine, limit
from tests.support.played_merges import lay, lay_adapter
from tests.support.played_worker import OVERLAY

PROGRAM = """
import sys
sys.path.append({root!r})
from tests.support.attacking_worker import main
main(*descriptors)
"""
STATS = TensorStats(name="w", dtype="float32", shape=(1,), numel=1, minimum=0.0, maximum=1.0)
MERGE = TensorMerge(module="m", stats=STATS, dtype_max=1e38, changed=True)


def attacked(place: Path, names: Iterable[str], *, seconds: int = 600, publish: bool = False) -> dict[str, str]:
    """Lay out bases of these names, each with an adapter of its name, and `gate.yml`. Returns changed variables."""
    lay(place, names=())
    lay_adapter(place, "adapter")
    for name in names:
        shutil.copytree(place / "base", place / name)
    entries = [
        {"name": name, "path": "./adapter", "base": f"./{name}", "limits": {"seconds": seconds}} for name in names
    ]
    config: dict[str, Any] = {"version": 1, "trust-remote-code": True, "adapters": entries, "forward": "off"}
    config["checks"] = {"base-mismatch": "off"}
    if publish:
        config["publish"] = {"directory": "./published"}
    (place / "gate.yml").write_text(json.dumps(config))
    overlay = place.parent / f"{place.name}-overlay"  # paths within the current directory do not reach workers
    overlay.mkdir()
    program = PROGRAM.format(root=str(Path(__file__).parents[2]))
    (overlay / "sitecustomize.py").write_text(OVERLAY.format(program=program))
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(overlay), os.environ.get("PYTHONPATH"))))}


class Attacker:
    """What an attack can use: the channels, and what it is about."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.channel = Channel(self.socket, most_files=MOST_FILES)
        self.sandbox = confine(Path.cwd())
        job = self.channel.receive(None)
        assert isinstance(job, Job)
        ends = self.channel.taken_files()
        self.calls = [CallChannel.of(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)]
        self.group, group = next((number, group) for number, group in enumerate(job.groups) if group.tasks)
        self.base, (task,) = group.base, group.tasks
        self.directory, self.task = Path(group.directory), task.index
        self.sandbox = limit(self.sandbox, job, "cpu")
        self.facts = BaseFacts(model=self.base.name, revision=None, dtype="bfloat16", quantization="none")

    def send(self, *events: object) -> None:
        for event in events:
            self.channel.send(event)

    def send_bytes(self, data: bytes) -> None:
        self.socket.sendall(struct.pack("!Q", len(data)) + data)

    def evidence(self, **changes: Any) -> Merged:
        usual = {
            "base": self.facts,
            "peft_type": "LORA",
            "file_tensors": (FileTensor(stats=STATS),),
            "targeted": ("m",),
        }
        usual |= {"merges": (MERGE,), "parameters_checked": 1, "parameters_total": 1}
        return Merged(task=self.task, evidence=Evidence(**(usual | changes)))

    def merge_started(self) -> None:
        self.send(BaseLoading(group=self.group), MergeStarted(task=self.task))

    def tell(self, text: str = "") -> None:
        """Say that the attack begins. Connections are refused, datagrams are not."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(text.encode() or b"begins", str(self.directory.parent / "started"))


def main(descriptor: int, *_: int) -> None:
    """In the place of `merge_gate.worker.child.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        attacker = Attacker(descriptor)
    except (EOFError, OSError):
        os._exit(0)
    attacker.send(protocol.DeviceChosen(device="cpu", device_name="played", sandbox=attacker.sandbox))
    try:
        ATTACKS.get(attacker.directory.name, _judge)(attacker)
    except OSError:  # the parent has hung up
        os._exit(1)
    attacker.send(protocol.Finished())
    time.sleep(0.2)
    os._exit(0)


def _judge(at: Attacker) -> None:
    """As a worker that no one attacks. A base whose name begins with `broken` has a NaN in its merge."""
    at.merge_started()
    stats = replace(STATS, nan=1, first_index=(0,)) if at.directory.name.startswith("broken") else STATS
    at.send(at.evidence(merges=(replace(MERGE, stats=stats),)))


# --- messages --------------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that makes a directory."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def _shared() -> tuple[object, ...]:
    """A tuple of a few hundred bytes as a pickle, and of 10**30 values without sharing."""
    parts: tuple[object, ...] = ("a",)
    for _ in range(30):
        parts = (parts,) * 10
    return parts


def _bytes(data: bytes) -> Callable[[Attacker], None]:
    def attack(at: Attacker) -> None:
        at.merge_started()
        at.send_bytes(data)

    return attack


def _changed(**changes: Any) -> Callable[[Attacker], None]:
    """Evidence with changed fields."""

    def attack(at: Attacker) -> None:
        at.merge_started()
        at.send(at.evidence(**changes))

    return attack


def _after_start(*events: object) -> Callable[[Attacker], None]:
    def attack(at: Attacker) -> None:
        at.merge_started()
        at.send(*events)

    return attack


def _unjudged(refusal: object) -> Callable[[Attacker], None]:
    def attack(at: Attacker) -> None:
        at.merge_started()
        at.send(Unjudged(task=at.task, refusal=refusal))  # type: ignore[arg-type]

    return attack


def _twice(at: Attacker) -> None:
    at.merge_started()
    at.send(at.evidence(), MergeStarted(task=at.task), at.evidence())


def _as_another(at: Attacker) -> None:
    at.merge_started()
    at.send(at.evidence(base=replace(at.facts, model="./healthy")))


def _hang_up(at: Attacker) -> None:
    at.merge_started()
    at.socket.close()
    time.sleep(60)


MARKUP = "\n::error::x\r<script>\x1b[31m\udcff\x00" + "x" * 1_000_000
HUGE = "[" + "1," * 100 + "1" + "0" * 6000 + "]"

MESSAGES: dict[str, Callable[[Attacker], None]] = {
    "pickle": _bytes(pickle.dumps(Evil())),
    "pickle-shared": _bytes(pickle.dumps(_shared())),
    "pickle-memo": _bytes(b"\x80\x04Nr\x00\x00\x00\x10."),
    "pickle-deep": _bytes(b"\x80\x04" + b"(" * 2_000_000 + b"t" * 2_000_000 + b"."),
    "deep-lists": _bytes(b"[" + b",".join([b"[" * 900 + b"]" * 900] * 550) + b"]"),
    "endless-length": lambda at: (at.merge_started(), at.socket.sendall(struct.pack("!Q", 1 << 63)), time.sleep(60))[0],
    "huge-message": _bytes(b'{"Unjudged":[0,{"NotJudged":["' + b"x" * 250_000_000 + b'","","runtime",null]}]}'),
    "huge-number": _bytes(b'{"MergeStarted":[0,' + HUGE.encode() + b"]}"),
    "text-as-evidence": _bytes(b'{"Merged":[0,"x"]}'),
    "no-base": _changed(base=None),
    "numbers-as-merges": _changed(merges=(1, 2)),
    "text-as-number": _changed(parameters_checked="a"),
    "no-tensors": _changed(file_tensors=None),
    "negative-numbers": _changed(parameters_checked=-1, parameters_total=-1, layers_in_blocks=-(2**63)),
    "odd-names": _changed(targeted=("\udcff\ud800\x00",), merges=(replace(MERGE, module="\udcff\ud800"),)),
    "not-finite": _changed(
        merges=(replace(MERGE, stats=replace(STATS, minimum=float("nan")), dtype_max=float("nan")),)
    ),
    "index-beyond": _changed(merges=(replace(MERGE, stats=replace(STATS, nan=1, first_index=(9, 9, 9))),)),
    "odd-shape": _changed(merges=(replace(MERGE, stats=replace(STATS, shape=(-1, 0), numel=-5)),)),
    "unknown-dtype": _changed(merges=(replace(MERGE, stats=replace(STATS, dtype="\n::error::")),)),
    "text-as-refusal": _unjudged("x"),
    "markup": _unjudged(NotJudged(message=MARKUP)),
    "unknown-refusal": _unjudged(Refusal(kind="nonsense", fields={"a": 1})),
    "empty-refusal": _unjudged(Refusal(kind="worker_raised", fields={})),
    "list-as-task": _after_start(MergeStarted(task=[])),  # type: ignore[arg-type]
    "large-task": _after_start(MergeStarted(task=10**18)),
    "text-as-others": _after_start(MergeStarted(task=0, others="abc")),  # type: ignore[arg-type]
    "text-as-progress": _after_start(MergeProgressed(task=0, done="a", total=None, module=5)),  # type: ignore[arg-type]
    "negative-group": _after_start(BaseLoading(group=-1)),
    "text-as-group": _after_start(BaseLoading(group="x")),  # type: ignore[arg-type]
    "late-device": _after_start(protocol.DeviceChosen(device="cpu", device_name="x", sandbox=Sandbox())),
    "idle": _after_start(protocol.Idle()),
    "list-of-a-pickle": _after_start(protocol.PickleListed()),
    "finished-early": _after_start(protocol.Finished()),
    "merged-twice": _twice,
    "as-another-base": _as_another,
    "exits": lambda at: (at.merge_started(), os._exit(0))[0],
    "kills-itself": lambda at: (at.merge_started(), os.kill(os.getpid(), signal.SIGKILL))[0],
    "hangs-up": _hang_up,
}
"""Each costs its own adapter, and nothing else."""

OWN_LIES = {"negative-numbers", "odd-names", "not-finite", "index-beyond", "odd-shape", "unknown-dtype", "merged-twice"}
"""Evidence of the right types. A base's code can lie about its base, so any verdict is allowed."""


# --- time ------------------------------------------------------------------------------------------------------------


def _silent(at: Attacker) -> None:
    """Half a message."""
    at.merge_started()
    at.tell()
    at.socket.sendall(struct.pack("!Q", 1000) + b"x")
    time.sleep(600)


def _flood(at: Attacker) -> None:
    """What begins something, as often as it may come, and the events that may come without end."""
    at.tell()
    at.merge_started()
    at.merge_started()
    while True:
        at.send(MergeProgressed(task=at.task, done=1, total=2, module="m" * 1000))
        at.send(protocol.InProgress(task=at.task, thread=1))


def _large(at: Attacker) -> None:
    """The largest messages, as fast as they are read."""
    at.send(BaseLoading(group=at.group))
    facts = _large_facts(at.facts, Limits(15 << 20, MOST.values))
    at.tell()
    while True:
        at.send(protocol.BaseMeasured(group=at.group, task=at.task, facts=facts))


def _large_facts(facts: BaseFacts, limits: Limits) -> BaseFacts:
    """As many figures as a message may have: about 90 bytes and 20 values each, with the lists counted fourfold."""
    return replace(
        facts, nonfinite=(replace(STATS, nan=1, first_index=(0,)),) * min(limits.bytes // 90, limits.values // 20)
    )


def _sends_files(at: Attacker) -> None:
    """Open files with events and calls, of which the parent takes none, and with messages that it refuses."""
    at.merge_started()
    at.tell()
    files = [os.open(os.devnull, os.O_RDONLY)] * 50

    def send(channel: Channel, message: object) -> None:
        while True:
            try:
                return channel.send(message, files)
            except OSError as error:  # so many are on their way
                if error.errno != errno.ETOOMANYREFS:
                    raise
            time.sleep(0.01)

    for _ in range(50):
        send(at.channel, protocol.InProgress(task=at.task))
        for channel in at.calls:
            send(channel, PublicationPlanned(task=at.task, tensors=()))
            channel.receive()
            for file in channel.taken_files():
                os.close(file)
    at.tell()
    for channel in (*at.calls, at.channel):
        send(channel, protocol.Idle())
    time.sleep(60)


def _floods_bases(at: Attacker) -> None:
    """Every event of which something is printed or kept, with other and long texts each time."""
    at.tell()
    text = "x" * 300_000
    for number in itertools.count():
        at.send(BaseLoading(group=at.group))
        facts = replace(at.facts, loaded_as=f"{number}{text}", no_skeleton=text, parameters=number)
        facts = replace(facts, replaced=(text,) * 3, dtypes=((text, 0.5),) * 3)
        files = (FileIdentity(name=text, device=number, inode=0, size_bytes=0, mtime_ns=0, ctime_ns=0),)
        at.send(protocol.BaseLoaded(group=at.group, task=at.task, facts=facts, identity=files, seconds=0.0))
        at.send(protocol.BaseMeasured(group=at.group, task=at.task, facts=facts))
        at.send(MergeStarted(task=at.task))


def _floods_devices(at: Attacker) -> None:
    """Devices without end, before the first base."""
    at.tell()
    for number in itertools.count():
        text = f"{number}" + "x" * 300_000
        at.send(protocol.DeviceChosen(device="cpu", device_name=text, sandbox=Sandbox(missing=(text,) * 3)))


_PDEATHSIG = 1


def _holds(at: Attacker) -> None:
    """Another end, and an expression that is matched without end by one call, which holds the interpreter."""
    try:
        refused = ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, 0, 0, 0, 0), ctypes.get_errno()
        assert refused == (-1, errno.EPERM), refused
        at.merge_started()
        at.tell(str(os.getpid()))
    finally:
        re.match(r"(a+)+$", "a" * 60 + "b")


def _reads_nothing(at: Attacker) -> None:
    """Calls without end, whose answers are left unread."""
    at.merge_started()
    call = PublicationPlanned(task=at.task, tensors=())

    def ask(channel: CallChannel) -> None:
        while True:
            channel.send(call)

    at.tell()
    for channel in at.calls:
        threading.Thread(target=ask, args=(channel,), daemon=True).start()
    time.sleep(600)


def _large_calls(at: Attacker) -> None:
    """The largest calls on all channels at a time, and then the largest event."""
    tensor = StoredTensor(name="w" * 40, dtype="F32", shape=(1, 2, 3))
    call = PublicationPlanned(task=at.task, tensors=(tensor,) * (MOST.values // 4 // 13))
    threads = [threading.Thread(target=channel.send, args=(call,)) for channel in at.calls]
    at.send(BaseLoading(group=at.group))
    at.tell()
    for thread in threads:
        thread.start()
    facts = _large_facts(at.facts, Limits(15 << 20, MOST.values))
    at.send(protocol.BaseMeasured(group=at.group, task=at.task, facts=facts))
    at.send(Unjudged(task=at.task, refusal=NotJudged(message="x" * (15 << 20))))


TIMES: dict[str, Callable[[Attacker], None]] = {
    "silent": _silent,
    "floods": _flood,
    "sends-large-messages": _large,
    "holds-the-interpreter": _holds,
    "reads-nothing": _reads_nothing,
    "sends-large-calls": _large_calls,
    "sends-files": _sends_files,
    "floods-with-bases": _floods_bases,
    "floods-with-devices": _floods_devices,
}


# --- what it can still do --------------------------------------------------------------------------------------------


def _still(at: Attacker) -> None:
    """What docs/concepts/security.md says that code in a worker can still do."""
    outside = at.directory / "config.json"
    done = {"reads": bool(outside.read_bytes())}
    with outside.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done["locks"] = True
    process = os.getppid() if os.geteuid() else 0  # the parent of root's worker has more capabilities
    os.sched_setaffinity(process, os.sched_getaffinity(process))
    done["chooses cores"] = True
    for number in range(40):
        with Path(f"fill-{number}").open("wb") as file:
            file.truncate(512 << 20)
    done["fills its directory"] = len(list(Path.cwd().glob("fill-*"))) == 40
    done["has a limit of its memory"] = resource.getrlimit(resource.RLIMIT_DATA)[0] < 1 << 50
    at.tell(json.dumps(done))
    _judge(at)


ATTACKS = MESSAGES | TIMES | {"still": _still}
