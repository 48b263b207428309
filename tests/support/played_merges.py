"""Runs that publish, with a played worker: everything of the parent is real, and nothing imports torch.

In: a directory. Out: a base, adapters, and runs on them, in this process or in one that can be killed:

    python -m tests.support.played_merges PLACE TARGET [OPTION...]
"""

import json
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from merge_gate._internal.errors import GateError
from merge_gate.cli.dispatch import main
from merge_gate.features.publish.feature import Publications
from merge_gate.files import resolve
from merge_gate.files.identity import base_identity
from merge_gate.records.files import StoredTensor
from merge_gate.run import flow
from merge_gate.worker import protocol, supervisor
from merge_gate.worker.device import cpu_name
from merge_gate.worker.protocol import Event, Group, Job
from tests.support.judging.cases import base as base_facts
from tests.support.judging.cases import evidence

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": "./base"}
NAMES = [f"layers.{layer}.q.weight" for layer in range(4)]
"""The tensors that a played merge changes."""


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}


def lay_base(directory: Path, files: Mapping[str, Shapes]) -> dict[str, bytes]:
    """Write weight files with random values, an index if there are several, and config.json.

    Returns the bytes of each tensor.
    """
    dice = random.Random(0)
    tensors: dict[str, bytes] = {}
    for name, shapes in files.items():
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        data = b""
        for tensor, (dtype, shape) in shapes.items():
            tensors[tensor] = dice.randbytes(_BYTES[dtype] * math.prod(shape))
            end = len(data) + len(tensors[tensor])
            entries[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), end]}
            data += tensors[tensor]
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        (directory / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
    if len(files) > 1:
        listed = {tensor: file for file, shapes in files.items() for tensor in shapes}
        index = {"metadata": {"total_size": sum(map(len, tensors.values()))}, "weight_map": listed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return tensors


def lay(place: Path, *, names: Sequence[str] = ("one", "two"), rows: int = 8) -> None:
    """A base in two shards, and adapters."""
    base = place / "base"
    base.mkdir()
    first, second = (
        dict.fromkeys(tensors, ("BF16", (rows, 8)))
        for tensors in (("embed.weight", *NAMES[:2]), (*NAMES[2:], "mtp.weight"))
    )
    lay_base(base, {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows, "dtype": "bfloat16"}))
    for name in names:
        lay_adapter(place, name)


def lay_adapter(place: Path, name: str) -> None:
    (place / name).mkdir()
    shapes = {f"base_model.model.q.lora_{letter}.weight": ("F32", (4, 8)) for letter in "AB"}
    lay_base(place / name, {"adapter_model.safetensors": shapes})
    (place / name / "config.json").unlink()
    (place / name / "adapter_config.json").write_text(json.dumps(CONFIG))


def configure(place: Path, name: str = "gate.yml", **settings: Any) -> None:
    """Write a configuration for the adapter "one", with more or other settings."""
    (place / name).write_text(json.dumps({"version": 1, "base": "base", "adapters": ["one"]} | settings))


def merged(content: bytes) -> bytes:
    """The bytes of a tensor after the played merge."""
    return bytes(reversed(content))


def expected(base: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tensors of the published model."""
    return {name: merged(content) if name in NAMES else content for name, content in base.items()}


def play(
    place: Path,
    *words: str,
    send: Callable[[Publications, int, Mapping[str, bytes]], None] | None = None,
    changes: Mapping[str, Any] | None = None,
    adapters: Sequence[str] = (),
    base: str = "base",
) -> int:
    """`merge-gate run ADAPTERS --base BASE WORDS` in `place`, which is the current directory. Returns its exit code.

    `adapters` may name a configuration; by default they are those in `place`. For `send` and `changes`, see `played`.
    """
    named = ["--base", base] if not adapters else []
    adapters = adapters or sorted(path.parent.name for path in place.glob("*/adapter_config.json"))
    with played(place / base, send=send, changes=changes):
        return main(["run", *adapters, *named, *words])


@contextmanager
def played(
    base: Path,
    *,
    send: Callable[[Publications, int, Mapping[str, bytes]], None] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Commands in this block have a played worker, which merges into the base in this directory.

    `send` writes the tensors of a task instead of `write_all`. `changes` are fields of each adapter's evidence.
    """
    tensors = stored(base)
    sends = send or write_all

    def supervise(job: Job, on_event: Callable[[Event], None], _worker: object, services: supervisor.Services) -> None:
        made = [service(job) for service in services]
        publisher: Any = next((one.publisher for one in made if hasattr(one, "publisher")), None)
        on_event(protocol.DeviceChosen(device="cpu", device_name=cpu_name()))
        for number, group in enumerate(job.groups):
            _play_group(number, group, on_event, lambda task: _played(sends, publisher, task, tensors), changes or {})
        if publisher is not None:
            publisher.ended()

    with (
        mock.patch.object(flow, "supervise", supervise),
        mock.patch.object(supervisor.WorkerSlot, "start", return_value=None),
    ):
        yield


def _played(send: Callable[..., None], publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    with suppress(GateError):  # the worker gets what the parent raises
        send(publisher, task, tensors)


def base_digest(place: Path) -> str:
    """The digest of the base that `lay` made."""
    return resolve.digest_directory(str(place / "base"), resolve.base_weight_files(str(place / "base")))


def stored(base: Path) -> dict[str, bytes]:
    """The bytes of each tensor in a directory of weight files."""
    tensors: dict[str, bytes] = {}
    for path in sorted(base.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        data = raw[8 + length :]
        tensors |= {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    return tensors


def _play_group(
    number: int,
    group: Group,
    on_event: Callable[[Event], None],
    send: Callable[[int], None],
    changes: Mapping[str, Any],
) -> None:
    facts = base_facts(model=group.base.model, dtype="bfloat16")
    for task in group.tasks:
        identity = base_identity(group.directory)
        loaded = protocol.BaseLoaded(group=number, task=task.index, facts=facts, identity=identity, seconds=0.0)
        on_event(loaded)
        on_event(protocol.MergeStarted(task=task.index))
        if task.model_files:  # on a thread, as the service does
            sending = threading.Thread(target=send, args=(task.index,), daemon=True)
            sending.start()
            sending.join()
        on_event(protocol.Merged(task=task.index, evidence=evidence(**({"base": facts} | changes))))


def write_all(publisher: Publications, task: int, tensors: Mapping[str, bytes]) -> None:
    """What a worker writes of a merge that changes the layers."""
    planned = tuple(StoredTensor(name=name, dtype="BF16", shape=(len(tensors[name]) // 16, 8)) for name in NAMES)
    write(publisher, task, planned, {name: merged(tensors[name]) for name in NAMES})


def write(
    publisher: Publications, task: int, planned: Sequence[StoredTensor], tensors: Mapping[str, bytes], **message: Any
) -> None:
    """Plan a model, write these tensors in two parts, and send the message."""
    from merge_gate.features.publish.calls import PublicationWritten  # noqa: PLC0415 - of runs that publish
    from merge_gate.features.publish.planned_files import PlannedFiles  # noqa: PLC0415

    with closing(PlannedFiles(publisher.planned(task, tuple(planned)))) as files:
        for name, content in tensors.items():
            half = len(content) // 2
            files.write(name, 0, memoryview(content)[:half])
            files.write(name, half, memoryview(content)[half:])
        checksums = tuple(files.checksums.items())
    publisher.written(PublicationWritten(**{"task": task, "checksums": checksums} | message))


if __name__ == "__main__":
    sys.exit(play(Path.cwd(), *sys.argv[1:]))
