"""A base on the Hub is laid out without its data: true headers, true lengths, and its small files."""

import json
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from merge_gate._internal.errors import ResolveError, SourceError
from merge_gate.config.load_config import load_config
from merge_gate.features.stream.hub_file import HubFiles, lay_out
from merge_gate.files import base_files, hub
from merge_gate.files.headers import parse_places
from merge_gate.files.resolve import Fetching, Inputs, resolve_base
from merge_gate.records.files import Fetched, Snapshot
from merge_gate.records.terms import Access
from tests.support.hub import LoopbackHub

BASE, MODEL = "acme/base", "model.safetensors"
VALUES = random.Random(0).randbytes(4000)


def safetensors(data: bytes, **sizes: int) -> bytes:
    """A file with float32 tensors of these many values, one after the other."""
    header, start = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [start, start + 4 * size]}
        start += 4 * size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHTS = safetensors(VALUES, a=1000)
FILES = {MODEL: WEIGHTS, "config.json": b"{}"}


def streaming(parent: Path, files: list[HubFiles] | None = None, **options: Any) -> Fetching:
    """A base is laid out in `parent`, and its files are added to `files`."""

    def lay(base: Fetched) -> str:
        directory, of_hub = lay_out(base, str(parent))
        (files if files is not None else []).append(of_hub)
        return directory

    return Fetching(**{"access": Access.STREAM, "lay_out": lay} | options)


def resolved(tmp_path: Path, access: Access = Access.STREAM) -> tuple[Snapshot, list[HubFiles]]:
    files: list[HubFiles] = []
    return resolve_base(BASE, how=streaming(tmp_path, files, access=access)), files


def weights_in_cache(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*.safetensors")]


def test_the_directory_has_the_header_and_the_length_and_no_data(server: LoopbackHub, tmp_path: Path) -> None:
    commit = server.add_repo(BASE, FILES)
    base, _ = resolved(tmp_path)
    stub = Path(base.directory, MODEL)
    head = WEIGHTS[: -len(VALUES)]
    assert stub.read_bytes() == head + bytes(len(VALUES))
    with stub.open("rb") as file:
        assert [tensor.name for tensor, _, _ in parse_places(file)] == ["a"]
    assert base.revision == commit
    assert base.base_files.is_streamed
    assert [one.name for one in base.base_files.tensors] == ["a"]
    assert weights_in_cache(tmp_path) == []


def test_the_files_have_the_true_bytes(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, FILES)
    _, (files,) = resolved(tmp_path)
    for start, end in (
        (0, len(WEIGHTS)),
        (3, 10),
        (len(WEIGHTS) - 4001, len(WEIGHTS)),
        (len(WEIGHTS) - 5, len(WEIGHTS)),
    ):
        buffer = bytearray(end - start)
        files.read(MODEL, start, memoryview(buffer))
        assert buffer == WEIGHTS[start:end]


def test_a_header_that_is_longer_than_the_first_read(server: LoopbackHub, tmp_path: Path) -> None:
    header = safetensors(b"", **{f"layers.{number}.weight": 1 for number in range(20_000)})
    assert len(header) > 1 << 20
    server.add_repo(BASE, FILES | {MODEL: header + b"\1" * 80_000})
    base, _ = resolved(tmp_path)
    assert Path(base.directory, MODEL).read_bytes() == header + bytes(80_000)


@pytest.mark.parametrize(
    "weights",
    [b"", b"\xff" * 40, b"<!doctype html>" + bytes(100), WEIGHTS[:-8]],
    ids=["empty", "length", "page", "cut"],
)
def test_a_file_that_is_no_safetensors_is_refused_as_on_disk(
    weights: bytes, server: LoopbackHub, tmp_path: Path
) -> None:
    server.add_repo(BASE, FILES | {MODEL: weights})
    with pytest.raises(ResolveError) as from_disk:
        resolved(tmp_path, Access.DOWNLOAD)
    other = tmp_path / "other"
    other.mkdir()
    constants.HF_HUB_CACHE = str(tmp_path / "empty")
    with pytest.raises(ResolveError) as streamed:
        resolved(other)
    assert streamed.value.check == from_disk.value.check


def test_a_tensor_in_two_files_is_not_compared(server: LoopbackHub, tmp_path: Path) -> None:
    shards = {f"model-0000{number}-of-00002.safetensors": WEIGHTS for number in (1, 2)}
    index = b'{"metadata": {}, "weight_map": {"a": "%s", "b": "%s"}}' % tuple(map(str.encode, shards))
    server.add_repo(BASE, shards | {"config.json": b"{}", "model.safetensors.index.json": index})
    base, _ = resolved(tmp_path)
    assert [one.check for one in base.base_files.findings] == ["base-inconsistent"]


def test_a_size_that_no_model_has_is_refused_before_a_read() -> None:
    """A mirror can state any size, and the list of pieces grows with it."""

    class Stated:
        size_bytes, sha256 = 1 << 62, "0" * 64

        def read_into(self, *_: object) -> None:
            pytest.fail("nothing is read")

    with pytest.raises(SourceError, match="together"):
        HubFiles({MODEL: Stated()})  # type: ignore[dict-item]


def test_a_file_without_a_digest_is_refused(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, FILES)
    server.file_headers["X-Linked-ETag"] = '"0123"'
    with pytest.raises(SourceError):
        resolved(tmp_path)


def test_a_full_disk_is_an_error(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, FILES | {MODEL: safetensors(bytes(4 << 20), a=1 << 20)})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))
    try:
        with pytest.raises(SourceError):
            resolved(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


# --- what is streamed ------------------------------------------------------------------------------------------------


def test_auto_streams_what_does_not_fit_on_the_disk(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo(BASE, FILES)
    too_much = 2 * shutil.disk_usage(tmp_path).total
    rounds = [(Access.AUTO, too_much, True), (Access.AUTO, 0, False)]  # by then, the cache has it
    for access, spare, is_streamed in [*rounds, (Access.AUTO, too_much, False), (Access.STREAM, too_much, False)]:
        monkeypatch.setattr(hub, "SPARE_DISK_BYTES", spare)
        base, _ = resolved(tmp_path, access)
        assert base.base_files.is_streamed is is_streamed
        assert weights_in_cache(tmp_path) == ([] if is_streamed else [MODEL])


def test_pickles_are_not_streamed(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, {"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(ResolveError, match="pickle"):
        resolve_base(BASE, how=streaming(tmp_path, allow_pickle=True))


def test_without_a_place_for_stubs_a_base_is_downloaded(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, FILES)
    base = resolve_base(BASE, how=Fetching(access=Access.STREAM))
    assert not base.base_files.is_streamed
    assert weights_in_cache(tmp_path) == [MODEL]


def test_values_that_are_tied_are_not_compared_in_stubs(tmp_path: Path) -> None:
    data = safetensors(bytes(range(16)), **{"lm_head.weight": 2, "model.embed_tokens.weight": 2})
    (tmp_path / MODEL).write_bytes(data)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    notes = (base_files.read_base(str(tmp_path), name="x", has_values=one).notes for one in (True, False))
    assert [*map(len, notes)] == [1, 0]


def test_a_base_that_is_quantized_while_it_is_loaded_is_streamed(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo(BASE, FILES)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q"]}')
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(safetensors(b""))
    (tmp_path / "gate.yml").write_text(
        f"version: 1\nbase: {{model: {BASE}, quantization: bnb-4bit}}\nadapters: [./one]\n"
    )
    config = load_config(str(tmp_path / "gate.yml"))
    (spec,) = config.adapters
    entry = Inputs(config, streaming(tmp_path)).prepare(spec)
    assert entry.problem is None
    assert entry.base_files.is_streamed
    assert weights_in_cache(tmp_path) == []
