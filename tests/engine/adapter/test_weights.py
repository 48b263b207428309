"""The tensors of an adapter's own file, and what safetensors and torch's restricted loader refuse of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.records.files import AdapterConfig, AdapterFiles
from merge_gate.records.refusals import Refused
from tests.support.files.pickles import Call

TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(2)}


def files(directory: Path, weights: str | None) -> AdapterFiles:
    return AdapterFiles(
        directory=str(directory), config=AdapterConfig(), weights=weights, tensors=(), files=(), findings=()
    )


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS | {"more": {1, 2}}, tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        found = read_weights(files(tmp_path, name))
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)
    assert read_weights(files(tmp_path, None)) == {}


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int8", "bool", "float8_e4m3fn", "complex64"])
def test_numbers_of_every_kind_that_torch_copies_are_read(dtype: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3).to(getattr(torch, dtype))}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_weights(files(tmp_path, "a.safetensors"))["a"].dtype is tensors["a"].dtype


def test_what_is_no_numbers_is_refused(tmp_path: Path) -> None:
    unreadable = {"without values (meta device)": torch.ones(2, 3, device="meta")}
    if hasattr(torch, "float4_e2m1fn_x2"):  # torch 2.6 lacks it
        unreadable["of float4_e2m1fn_x2"] = torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for why, tensor in unreadable.items():
        torch.save(TENSORS | {"odd": tensor}, tmp_path / "a.bin")
        with pytest.raises(Refused) as raised:
            read_weights(files(tmp_path, "a.bin"))
        refusal = raised.value.refusal
        assert (refusal.kind, refusal.fields["name"]) == ("tensor_unreadable", "odd")
        assert refusal.fields["is_meta"] == ("meta" in why)
        assert refusal.fields["is_meta"] or why == f"of {refusal.fields['dtype']}"


def test_a_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.safetensors"))
    assert raised.value.refusal.kind == "tensor_unreadable"
    assert "F6_E2M3" in raised.value.refusal.fields["text"]


def test_a_header_that_safetensors_refuses_is_the_files(tmp_path: Path) -> None:
    """Where the preflight has let it pass: another release of safetensors, say."""
    save_file(TENSORS, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": {"step": 100}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.safetensors"))
    assert raised.value.refusal.kind == "tensor_unreadable"
    assert "invalid type: integer `100`" in raised.value.refusal.fields["text"]


def test_what_torch_refuses_is_named(tmp_path: Path) -> None:
    """A function of torch's own, which the preflight leaves to it."""
    torch.save(TENSORS | {"more": Call(torch.hub.load, "acme/x", "y")}, tmp_path / "a.bin")
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.bin"))
    assert raised.value.refusal.kind == "pickle_unreadable"
    assert raised.value.refusal.fields["names"] == "torch.hub.load"


def test_what_is_cut_off_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-40])
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.bin"))
    assert raised.value.refusal == Refused("pickle_unreadable", error="RuntimeError", names=None).refusal
