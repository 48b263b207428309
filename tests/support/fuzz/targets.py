"""What is fuzzed: each parser of something that strangers write, with what must hold of whatever it makes of any bytes.

A target takes bytes and returns nothing. It lets through the parser's own refusal, which is its answer to a broken
file, and raises anything else: what the parser did not expect, or an assertion on its answer. `bounded` holds the two
figures that every input is held to.
"""

import atexit
import contextlib
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from safetensors import deserialize

from merge_gate._internal.errors import ConfigError, UsageError
from merge_gate._internal.text import has_hidden
from merge_gate.config.load_config import load_config
from merge_gate.features.publish.calls import PublicationPlanned, PublicationWritten
from merge_gate.files import adapter_config, json_object
from merge_gate.files.headers import CorruptFileError, parse_file
from merge_gate.judging import bounds
from merge_gate.judging.all_checks import judge_merge, refused
from merge_gate.records.files import BaseFiles, StoredTensor
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.terms import BaseKey
from merge_gate.report.formats import json_report, terminal_text
from merge_gate.report.stored import stored_report
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.worker import protocol
from merge_gate.worker.channel import FROM_WORKER, limits_of
from merge_gate.worker.encoding import GarbledError, decoded, encoded
from merge_gate.worker.parent_feed import BytesRequested, SpansExpected
from merge_gate.worker.supervisor import Attempt
from tests.support.judging import cases

CALLS = PublicationPlanned | PublicationWritten | SpansExpected | BytesRequested
LONGEST_CPU_S = 1.0
MOST_BYTES = 200 * 2**20
FRAMED = b"F"
"""The first byte of an input whose rest is put into the frame that a random change would break."""

_LARGEST_FINDINGS = 200_000
_TENSORS = tuple(
    StoredTensor(name=f"base_model.model.layers.0.q_proj.lora_{side}.weight", dtype="F32", shape=shape)
    for side, shape in (("A", (8, 16)), ("B", (16, 8)))
)


class OutOfBoundsError(Exception):
    """An input took longer, or more memory, than an input may."""


def bounded(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Hold every input to its time (of the processor, so that a busy machine is nobody's fault) and its memory."""
    before = _peak_bytes()

    def held(data: bytes) -> None:
        start_s = time.process_time()
        target(data)
        taken_s, grown = time.process_time() - start_s, _peak_bytes() - before
        if taken_s > LONGEST_CPU_S or grown > MOST_BYTES:
            raise OutOfBoundsError(f"{len(data):,} bytes of input took {taken_s:.2f} s and {grown / 2**20:.0f} MiB")

    return held


def _peak_bytes() -> int:
    """Of this process alone: what getrusage says begins with the peak of the parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:", 1)[1].split(None, 1)[0]) * 1024


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[BufferedReader]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with os.fdopen(file.fileno(), "rb", closefd=False) as reader:
            yield reader


def _sound(tensors: tuple[StoredTensor, ...]) -> None:
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert all(type(size) is int and size >= 0 for tensor in tensors for size in tensor.shape)


# --- the parsers ---------------------------------------------------------------------------------------------------


def headers(data: bytes) -> None:
    """The header of a safetensors file. What is accepted, the library accepts as well, with the same tensors."""
    if data.startswith(FRAMED):
        size, header = 8 * sum(data[1:2]), data[2:]
        data = len(header).to_bytes(8, "little") + header + bytes(size)
    with _opened(data) as file:
        try:
            tensors = parse_file(file)
        except CorruptFileError as error:
            assert not has_hidden(str(error)), error
            return
    _sound(tensors)
    known = {name: (one["dtype"], tuple(one["shape"])) for name, one in deserialize(data)}
    assert known == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def config_of_adapter(data: bytes) -> None:
    """adapter_config.json. What is taken means what it means to any JSON parser; what is found is short."""
    try:
        parsed = json_object.parse(data)
    except json_object.InvalidObjectError as error:
        assert not has_hidden(str(error)), error
        return
    assert parsed == json.loads(data)
    record = adapter_config.recorded(parsed)
    assert pickle.loads(pickle.dumps(record)) == record
    findings = bounds.bounded(adapter_config.judge(parsed, _TENSORS))
    assert {one.check for one in findings} <= {"config-invalid", "config-unsafe"}
    assert not any(has_hidden(one.message) for one in findings)
    assert sum(len(one.message) + len(one.hint) for one in findings) < _LARGEST_FINDINGS


def config(data: bytes) -> None:
    """The configuration. A problem names a place in the file; without one, every adapter has a name of its own."""
    path = _place() / "gate.yml"
    path.write_bytes(data)
    try:
        loaded = load_config(str(path))
    except ConfigError as error:
        lines = data.count(b"\n") + data.count(b"\r") + sum(map(data.count, _OTHER_LINE_ENDS)) + 1
        assert error.problems
        assert all(1 <= one.line <= lines + 1 and one.column >= 1 for one in error.problems)
        assert not any(has_hidden(one.message) or has_hidden(one.hint) for one in error.problems), error
        return
    names = [adapter.name for adapter in loaded.adapters]
    assert names
    assert len(set(names)) == len(names)


_OTHER_LINE_ENDS = tuple(end.encode() for end in "\x85\u2028\u2029")
_PLACES: list[Path] = []


def _place() -> Path:
    """A directory with a base and adapters, for as long as this process lives."""
    if not _PLACES:
        _PLACES.append(Path(tempfile.mkdtemp(prefix="fuzz-")))
        atexit.register(shutil.rmtree, _PLACES[0], ignore_errors=True)
        for name in ("models/base", "adapters/support", "adapters/team-a"):
            (_PLACES[0] / name).mkdir(parents=True)
    return _PLACES[0]


def report(data: bytes) -> None:
    """A stored report. What is read is shown in every format, changed by nothing, and read again as the same."""
    try:
        stored = json_report.read(data, "report.json")
    except UsageError as error:
        assert not has_hidden(str(error)), error
        return
    written = json_report.render(stored)
    assert json_report.render(json_report.read(written.encode(), "report.json")) == written
    for render in FORMATS.values():
        render(stored).encode()
    terminal_text.render(stored, "").encode()
    changes = stored_report.compare(stored, stored)
    (stored_report.render_text(changes) + stored_report.render_markdown(changes)).encode()


def message(data: bytes) -> None:
    """A message of the worker: bytes, or a change of one. What is read of it arrives again as the same."""
    for expected in (FROM_WORKER, CALLS):
        with contextlib.suppress(GarbledError):
            record = decoded(data, expected, limits_of(None))
            assert repr(decoded(encoded(record), expected)) == repr(record)
            if expected is FROM_WORKER and not isinstance(record, protocol.PickleListed):
                _receive(record)


_KEYS = [BaseKey(model=name, revision=None, dtype="auto", quantization="none") for name in ("./base", "./other")]
_JOB = protocol.Job(
    groups=tuple(
        protocol.Group(base=key, directory=key.name, files=BaseFiles(directory=key.name), tasks=(task,))
        for key, task in zip(_KEYS, (protocol.Task(index=index, files=()) for index in (0, 1)), strict=True)
    )
)


def _receive(event: protocol.Event) -> None:
    """An event while the first of two bases is in progress. It ends no task of the other one, and is judged in time."""
    heard: list[protocol.Event] = []
    attempt = Attempt(_JOB, heard.append)
    for before in (protocol.BaseLoading(group=0), protocol.MergeStarted(task=0)):
        attempt.receive(before)
    attempt.receive(event)
    for ended in heard:
        if isinstance(ended, protocol.Merged | protocol.Unjudged):
            assert ended.task == 0
            with contextlib.suppress(Exception):  # of values that make no sense: the adapter is `error` (run/flow.py)
                _judge(ended)
    rest = attempt.remaining_job(NotJudged(message="it died"), set())
    assert [task.index for task in rest.groups[1].tasks] == [1]


def _judge(event: protocol.Merged | protocol.Unjudged) -> None:
    if isinstance(event, protocol.Merged):
        judge_merge(cases.spec(), cases.files(), event.evidence)
    elif isinstance(event.refusal, Refusal):
        refused(event.refusal)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "headers": headers,
    "adapter-config": config_of_adapter,
    "config": config,
    "report": report,
    "message": message,
}
