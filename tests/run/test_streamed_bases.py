"""A base on the Hub is judged without a download: same verdicts as from the disk, or an error that says why not."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Answer, merge_gate, start, strict_json, wait_until
from tests.support.faults import LFS_POINTER, overwrite, poison
from tests.support.hub import LoopbackHub
from tests.support.models import Shelf, read_tensors, write_tensors

BASE, TOKEN = "acme/llama", "hf_loopback"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
REPORT = Path("merge-gate-report", "report.json")


@dataclass
class Place:
    """A directory with adapters, a Hub that has their base, and what was on the disk during the runs."""

    directory: Path
    hub: LoopbackHub
    commit: str
    blocks: dict[str, int] = field(default_factory=dict)
    """The blocks that each stub took on the disk while bytes of the base were requested."""

    def run(
        self, *words: str, base: str = BASE, adapters: str = "./adapters/*", **keys: Any
    ) -> tuple[Answer, dict[str, Any]]:
        self.configure(base=base, adapters=[adapters], **keys)

        def look(path: str) -> None:
            if path.startswith("/cdn/"):
                stubs = self.temporary.glob("merge-gate-worker-*/base-*/*.safetensors")
                self.blocks |= {stub.name: stub.stat().st_blocks for stub in stubs}

        self.hub.on_request = look
        answer = merge_gate("run", "gate.yml", *words, cwd=self.directory, **self.variables)
        return answer, strict_json(self.directory / REPORT)

    def configure(self, *, adapters: list[str], base: str = BASE, **keys: Any) -> None:
        settings = {"version": 1, "base": {"model": base} | keys, "adapters": adapters}
        (self.directory / "gate.yml").write_text(json.dumps(settings | {"checks": {"base-mismatch": "off"}}))
        self.temporary.mkdir(exist_ok=True)

    @property
    def temporary(self) -> Path:
        return self.directory / "tmp"

    @property
    def variables(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.directory / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "TMPDIR": str(self.temporary),
        }


def lay_base(shelf: Shelf, directory: Path) -> None:
    """The tiny base in two shards."""
    directory.mkdir()
    tensors = read_tensors(shelf.base("llama"), "model.safetensors")
    shutil.copy(shelf.base("llama") / "config.json", directory)
    names = sorted(tensors)
    listed = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        write_tensors(directory, {name: tensors[name] for name in names if listed[name] == shard}, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.fixture(scope="module")
def served(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("streamed")
    lay_base(shelf, directory / "base")
    for name, break_ in (("good", None), ("nan", poison("lora_B", where="last"))):
        shutil.copytree(shelf.adapter("plain"), directory / "adapters" / name)
        if break_ is not None:
            break_(directory / "adapters" / name)
    with LoopbackHub() as hub:
        files = {file.name: file.read_bytes() for file in (directory / "base").iterdir()}
        commit = hub.add_repo(BASE, files, private=True, token=TOKEN)
        yield Place(directory=directory, hub=hub, commit=commit)


@pytest.fixture
def place(served: Place) -> Iterator[Place]:
    served.hub.requests.clear()
    served.hub.damages.clear()
    served.hub.failures.clear()
    yield served
    shutil.rmtree(served.directory / "cache", ignore_errors=True)


def compared(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of the adapters, without times, and without the name of the base and notes about it."""
    keys = ("name", "verdict", "cause", "coverage", "files", "largest", "layers")
    return [
        {key: one.get(key) for key in keys}
        | {"findings": [finding for finding in one["findings"] if finding["check"] != "base-mismatch"]}
        for one in report["adapters"]
    ]


def stored(place: Place) -> list[str]:
    """The weight files of the base on the disk."""
    return [path.name for path in (place.directory / "cache").rglob("*.safetensors")]


def test_a_streamed_base_has_the_verdicts_of_one_on_the_disk(place: Place) -> None:
    """And no weight is on the disk, and the token goes to the Hub alone."""
    local, from_disk = place.run(base="./base")
    place.hub.requests.clear()
    answer, streamed = place.run("--access", "stream")
    assert (local.code, answer.code) == (1, 1), answer.said
    assert [one["verdict"] for one in streamed["adapters"]] == ["passed", "failed"], answer.said
    assert compared(streamed) == compared(from_disk)
    assert "streamed" in streamed["adapters"][0]["forward"]["why_not"]
    (of_disk,), (of_stream,) = from_disk["bases"], streamed["bases"]
    assert of_stream["sha256"] == of_disk["sha256"]
    assert of_stream["revision"] == place.commit
    assert of_stream["parameters"] == of_disk["parameters"]
    assert stored(place) == []
    assert set(place.blocks) == set(SHARDS)
    assert max(place.blocks.values()) * 512 <= 8192, "the header, and no data"
    assert not list((place.directory / "tmp").iterdir())
    assert {one.token for one in place.hub.requests if one.path.startswith("/cdn/")} == {None}
    assert {one.token for one in place.hub.requests if "/resolve/" in one.path} == {TOKEN}
    resolved = [one.path for one in place.hub.requests if "/resolve/" in one.path and one.path.endswith(SHARDS)]
    assert len(resolved) == len(SHARDS), "one resolver call for each file"


@pytest.mark.slow
def test_a_model_on_a_streamed_base_has_the_bytes_from_the_disk(place: Place) -> None:
    _, from_disk = place.run("--only", "good", "--publish", "from-disk", base="./base")
    answer, streamed = place.run("--only", "good", "--publish", "streamed", "--access", "stream")
    assert answer.code == 0, answer.said
    weights = {
        one["adapters"][0]["published"]["directory"]: {
            file["path"]: file["sha256"]
            for file in one["adapters"][0]["published"]["files"]
            if file["path"].startswith("model")
        }
        for one in (from_disk, streamed)
    }
    assert len(weights["streamed/good"]) == len(SHARDS) + 1
    assert weights["streamed/good"] == weights["from-disk/good"]
    assert stored(place) == []
    assert not list((place.directory / "tmp").iterdir())


def sent_bytes(hub: LoopbackHub, longest: int) -> int:
    """The bytes of all ranges that were sent, of files of at most this size."""
    ends = [asked.removeprefix("bytes=").split("-") for asked in hub.ranges]
    return sum(min(int(last) + 1, longest) - int(first) for first, last in ends)


@pytest.mark.slow
def test_one_transfer_of_a_streamed_base_serves_every_model(place: Place) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(place.directory / "adapters" / "good", place.directory / "several" / name)
    sizes = [len(place.hub.repos[BASE].commits[place.commit][name]) for name in SHARDS]
    counts = []
    for words in ((), ("--publish", "several-merged")):
        place.hub.ranges.clear()
        answer, report = place.run("--access", "stream", *words, adapters="./several/*")
        assert answer.code == 0, answer.said
        counts.append(sent_bytes(place.hub, max(sizes)))
    assert counts[0] >= sum(sizes)
    # How often a tensor is asked for by itself depends on time. Each model would ask for the whole base again.
    assert counts[1] < counts[0] + sum(sizes), "three models together ask for less than the base once more"
    files = [{file["path"]: file["sha256"] for file in one["published"]["files"]} for one in report["adapters"]]
    assert len({of_model[SHARDS[0]] for of_model in files}) == 1, "the adapters are the same"


@pytest.mark.parametrize("kind", ["other", "whole", "shifted"])
def test_wrong_bytes_are_an_error_and_never_a_verdict(kind: str, place: Place) -> None:
    place.hub.damage("/cdn/", kind)
    answer, report = place.run("--access", "stream")
    assert answer.code == 3, answer.said
    assert {one["verdict"] for one in report["adapters"]} == {"error"}
    assert stored(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_pass_that_a_signal_ends_leaves_a_true_report(number: signal.Signals, shelf: Shelf, place: Place) -> None:
    """It leaves the verdict that was reached before. The others need the whole pass."""
    pointer = place.directory / "pointer" / "lfs"
    if not pointer.exists():
        shutil.copytree(shelf.adapter("plain"), pointer)
        overwrite(LFS_POINTER)(pointer)
    place.configure(adapters=["./pointer/*", "./adapters/*"], access="stream")
    bodies: list[str] = []

    def stall(path: str) -> None:
        if path.startswith("/cdn/"):
            bodies.append(path)
            if len(bodies) == len(SHARDS) + 1:  # the headers have arrived
                place.hub.damage("/cdn/", "stall")

    place.hub.on_request = stall
    process = start("run", "gate.yml", cwd=place.directory, **place.variables)
    wait_until(lambda: len(bodies) > len(SHARDS), process)
    process.send_signal(number)
    assert process.wait(60) == 3
    report = strict_json(place.directory / REPORT)
    reached = [one["name"] for one in report["adapters"] if one["verdict"] != "error"]
    assert (report["complete"], reached) == (False, ["lfs"])

    place.hub.damages.clear()
    place.hub.on_request = lambda path: path
    answer = merge_gate("run", "gate.yml", cwd=place.directory, **place.variables)
    report = strict_json(place.directory / REPORT)
    assert report["complete"] is True, answer.said
    assert [(one["name"], one["verdict"]) for one in report["adapters"]] == [
        ("lfs", "failed"),
        ("good", "passed"),
        ("nan", "failed"),
    ]
    assert stored(place) == []


@pytest.mark.slow
def test_two_dtypes_of_a_streamed_base_are_read_once(place: Place) -> None:
    dtypes = ["bfloat16", "float16"]
    _, from_disk = place.run("--only", "good", base="./base", dtype=dtypes)
    place.hub.requests.clear()
    answer, streamed = place.run("--only", "good", "--access", "stream", dtype=dtypes)
    assert [one["verdict"] for one in streamed["adapters"]] == ["passed", "passed"], answer.said
    assert compared(streamed) == compared(from_disk)
    assert [one["sha256"] for one in streamed["bases"]] == [one["sha256"] for one in from_disk["bases"]]
    of_biases = len(dtypes)  # next to a cross-checked weight, they are read again: from the window, or by themselves
    assert {name: 2 <= count <= 2 + of_biases for name, count in reads(place).items()} == dict.fromkeys(SHARDS, True)


@pytest.mark.slow
def test_a_base_is_quantized_while_it_is_streamed(place: Place) -> None:
    _, from_disk = place.run(base="./base", quantization="bnb-4bit")
    place.hub.requests.clear()
    answer, streamed = place.run("--access", "stream", quantization="bnb-4bit")
    assert [one["verdict"] for one in streamed["adapters"]] == ["passed", "failed"], answer.said
    assert compared(streamed) == compared(from_disk)
    assert stored(place) == []
    assert streamed["bases"][0]["sha256"] == from_disk["bases"][0]["sha256"]
    assert reads(place) == dict.fromkeys(SHARDS, 2)


def reads(place: Place) -> Counter[str]:
    """How often each weight file was asked for: once for its header, and once for its bytes, which are one piece."""
    return Counter(Path(one.path).name for one in place.hub.requests if one.path.startswith("/cdn/"))


@pytest.mark.slow
def test_cached_verdicts_on_a_streamed_base_need_its_headers(place: Place) -> None:
    _, first = place.run("--cache", "verdicts", access="stream")
    place.hub.requests.clear()
    answer, second = place.run("--cache", "verdicts", access="stream")
    assert answer.code == 1, answer.said
    assert [one["cached"] for one in second["adapters"]] == [True, True]
    assert [(one["verdict"], one["cause"]) for one in second["adapters"]] == [
        (one["verdict"], one["cause"]) for one in first["adapters"]
    ]
    assert second["bases"][0]["sha256"] == first["bases"][0]["sha256"]
    assert reads(place) == dict.fromkeys(SHARDS, 1)
