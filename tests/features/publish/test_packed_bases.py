"""Bases that bitsandbytes has packed in their files: the plain headers of the published model, and its tensors."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_gate._internal.errors import NotPublishedError
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.one_publication import Publication
from merge_gate.features.publish.packed_weights import packed_weights
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.stored_layout import plain_headers
from merge_gate.features.publish.weight_files import base_layout
from merge_gate.files.feed import LocalFeed
from merge_gate.records.config import PublishSpec
from tests.support import bases, bases_broken, bases_good, methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.published import different, sent_by, stored

DRAFTS = {"nf4": bases_broken.bnb_4bit, "nested": bases_good.bnb_4bit_nested, "int8": bases_broken.bnb_8bit}


@pytest.fixture(params=DRAFTS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    DRAFTS[request.param]().write(tmp_path / "base")
    bases.ADAPTERS["second-layer"](tmp_path / "adapter")
    return tmp_path / "base"


def publication(base: Path, max_shard_bytes: int | None = None) -> Publication:
    spec = PublishSpec(directory="", label="", dtype="bfloat16", max_shard_bytes=max_shard_bytes)
    return Publication(base.parent / "one", spec, base_layout(str(base)), str(base))


def dequantized_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What transformers and PEFT make of the base."""
    with methods.quiet():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu")
        merged = PeftModel.from_pretrained(plain.dequantize(torch.bfloat16), adapter).merge_and_unload(safe_merge=True)
    return dict(merged.state_dict())


def test_the_published_files_have_plain_weights_and_nothing_else(base: Path) -> None:
    sent = sent_by(base, base.parent / "adapter", publish="bfloat16", dtype="bfloat16", dequantized=True)
    assert sent.refusal is None, sent.refusal
    is_resharded = packed_weights(stored_tensors(base)).states == {}
    model = publication(base, max_shard_bytes=20_000 if is_resharded else None)
    expected_bytes = model.expected.size_bytes
    with contextlib.closing(PlannedFiles(model.plan(sent.planned))) as written:
        for name, content in sent.data.items():
            written.write(name, 0, memoryview(content))
    model.written(PublicationWritten(task=0, checksums=tuple(sent.checksums.items())))
    model.complete()
    files = [*(base.parent / ".one.partial" / "model").glob("*.safetensors")]
    tensors = stored(base.parent / ".one.partial" / "model")
    assert len(files) > 1 or not is_resharded
    assert abs(sum(file.stat().st_size for file in files) - expected_bytes) < 10_000, "the disk was asked for enough"
    theirs = dequantized_merge(base, base.parent / "adapter")
    assert different(tensors, theirs) == []
    model.discard()


def test_packed_weights_must_all_be_written(base: Path) -> None:
    model = publication(base)
    PlannedFiles(model.plan(())).close()
    with pytest.raises(NotPublishedError):
        model.written(PublicationWritten(task=0))
    model.discard()


def test_preserve_is_refused_with_the_reason(base: Path) -> None:
    sent = sent_by(base, base.parent / "adapter")
    assert "bnb-" in sent.refusal.message
    assert "publish.dtype" in (sent.refusal.hint or "")
    assert sent.data == {}


def test_fp8_stays_refused(tmp_path: Path) -> None:
    bases_broken.fp8().write(tmp_path / "base")
    bases.ADAPTERS["second-layer"](tmp_path / "adapter")
    sent = sent_by(tmp_path / "base", tmp_path / "adapter", publish="bfloat16", dtype="bfloat16")
    assert "fp8" in sent.refusal.message
    assert "unquantized base" in (sent.refusal.hint or "")


# --- headers ---------------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def with_state(base: Path, state: bytes) -> Path:
    file = base / "model.safetensors"
    tensors = load_file(file) | {STATE: torch.tensor(list(state), dtype=torch.uint8)}
    save_file(tensors, file, {"format": "pt"})
    return base


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"x",
        b"[]",
        b'{"shape": 3}',
        b'{"shape": [-1, -64]}',
        b'{"shape": [7, 3]}',
        b'{"shape": [true]}',
        b" " * 70_000 + b"{}",
        b"[" * 60_000,
    ],
)
def test_a_state_of_a_stranger_is_refused(state: bytes, tmp_path: Path) -> None:
    bases_broken.bnb_4bit().write(tmp_path)
    with_state(tmp_path, state)
    with pytest.raises(NotPublishedError):
        plain_headers(str(tmp_path), stored_tensors(tmp_path), LocalFeed(str(tmp_path)), "BF16")


def test_plain_headers_have_the_shapes_of_the_layers(tmp_path: Path) -> None:
    bases_broken.bnb_4bit().write(tmp_path)
    stored = stored_tensors(tmp_path)
    shape = json.loads(bytes(load_file(tmp_path / "model.safetensors")[STATE].tolist()))["shape"]
    headers = {one.name: one for one in plain_headers(str(tmp_path), stored, LocalFeed(str(tmp_path)), "F16")}
    assert (headers[WEIGHT].dtype, headers[WEIGHT].shape) == ("F16", tuple(shape))
    assert not [name for name in headers if "absmax" in name or "quant_" in name]
    plain = [one for one in stored if one.name in headers and one.name not in packed_weights(stored)]
    assert all(headers[one.name] == one for one in plain)


def test_a_plain_base_has_no_packed_weights(tmp_path: Path) -> None:
    bases.llama().write(tmp_path)
    packed = packed_weights(stored_tensors(tmp_path))
    assert (packed.counts, packed.others) == ({}, frozenset())


def test_a_packed_tensor_that_is_not_loaded_has_no_plain_values(tmp_path: Path) -> None:
    bases_broken.bnb_4bit().write(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    more = {f"mtp.{name}": one.clone() for name, one in tensors.items() if WEIGHT in name}
    save_file(tensors | more, file, {"format": "pt"})
    bases.ADAPTERS["second-layer"](tmp_path / "adapter")
    sent = sent_by(tmp_path, tmp_path / "adapter", publish="bfloat16", dtype="bfloat16", dequantized=True)
    assert f"mtp.{WEIGHT}" in sent.refusal.message
