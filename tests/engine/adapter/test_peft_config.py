"""What PEFT reads of an adapter's own files: misspelled settings, and what safetensors and torch refuse."""

import json
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.engine.adapter.peft_config import read_config, read_weights
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterConfig, AdapterFiles
from merge_gate.records.refusals import Refusal, Refused
from tests.support.files.pickles import Call


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"lora_alfa": 64}, (("lora_alfa", "lora_alpha"),)),
        ({"Lora_Alpha": 64, "odd": 1}, (("Lora_Alpha", "lora_alpha"),)),
        ({"lora_alfa": 64, "lora_alpha": 16}, ()),
        ({"alpha": 64}, ()),
        ({"lora_alph" + "a" * 200: 64}, ()),
    ],
    ids=["a letter", "capitals", "the known one is set too", "another trainer's", "long"],
)
def test_a_misspelled_key_is_told_from_an_unknown_one(tmp_path, settings, near) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused) as caught:
        read_config(preflight(str(tmp_path), allow_pickle=False))
    assert caught.value.refusal.kind == "ignored_settings"
    assert caught.value.refusal.fields["near"] == near


def test_a_file_with_many_unknown_keys_does_not_cost_time(tmp_path: Path) -> None:
    misspelled = {f"lora_alph{first}{second}": 1 for first in ascii_lowercase for second in ascii_lowercase}
    config = {"peft_type": "LORA", "r": 4, **misspelled}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused) as caught:
        read_config(preflight(str(tmp_path), allow_pickle=False))
    assert caught.value.refusal.kind == "ignored_settings"
    assert len(caught.value.refusal.fields["near"]) == 20


TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(2)}


def files(directory: Path, weights: str | None) -> AdapterFiles:
    return AdapterFiles(
        directory=str(directory), config=AdapterConfig(), weights=weights, tensors=(), files=(), findings=()
    )


def refused(directory: Path, weights: str) -> Refusal:
    with pytest.raises(Refused) as raised:
        read_weights(files(directory, weights))
    return raised.value.refusal


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
        refusal = refused(tmp_path, "a.bin")
        assert (refusal.kind, refusal.fields["name"]) == ("tensor_unreadable", "odd")
        assert refusal.fields["is_meta"] == ("meta" in why)
        assert refusal.fields["is_meta"] or why == f"of {refusal.fields['dtype']}"


def test_a_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    refusal = refused(tmp_path, "a.safetensors")
    assert refusal.kind == "tensor_unreadable"
    assert "F6_E2M3" in refusal.fields["text"]


def test_a_header_that_safetensors_refuses_is_the_files(tmp_path: Path) -> None:
    """Where the preflight has let it pass: another release of safetensors, say."""
    save_file(TENSORS, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": {"step": 100}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    refusal = refused(tmp_path, "a.safetensors")
    assert refusal.kind == "tensor_unreadable"
    assert "invalid type: integer `100`" in refusal.fields["text"]


def test_what_torch_refuses_is_named(tmp_path: Path) -> None:
    """A function of torch's own, which the preflight leaves to it."""
    torch.save(TENSORS | {"more": Call(torch.hub.load, "acme/x", "y")}, tmp_path / "a.bin")
    refusal = refused(tmp_path, "a.bin")
    assert (refusal.kind, refusal.fields["names"]) == ("pickle_unreadable", "torch.hub.load")


def test_what_is_cut_off_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-40])
    assert refused(tmp_path, "a.bin") == Refused("pickle_unreadable", error="RuntimeError", names=None).refusal
