"""Adapters that are not PEFT's are known by names of files, keys or tensors, and each is told what to do with it."""

from __future__ import annotations

import pytest

from merge_gate.judging.foreign_formats import FORMATS, RENAMED, SINGLE_FILE, by_files, by_keys, by_tensors

EXAMPLES = (
    ("pytorch_lora_weights.safetensors", "", "unet.down_blocks.0.attentions.0.to_q.lora_A.weight"),
    ("", "", "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight"),
    ("0000100_adapters.safetensors", "lora_parameters", "model.layers.0.self_attn.q_proj.lora_a"),
    ("adapter-q8_0.gguf", "", ""),
    ("pytorch_adapter.bin", "config_id", "bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight"),
    ("adapter_config (1).json", "", ""),
    ("adapter_model-00001-of-00002.safetensors", "", ""),
    ("mp_rank_00_model_states.pt", "", ""),
    ("model-00001-of-00003.safetensors", "", ""),
)
MEGATRON = "iter_0000100"


def place(hint: str | None) -> int:
    return next(number for number, one in enumerate(FORMATS) if one.hint == hint)


def test_every_format_is_known_by_each_of_its_marks() -> None:
    known = [
        {place(found) for found in (by_files([file]), by_keys([key]), by_tensors([tensor])) if found}
        for file, key, tensor in EXAMPLES
    ]
    assert all(len(one) == 1 for one in known), "the marks of one format do not mean two"
    assert sorted({place(by_files([MEGATRON])), *(number for one in known for number in one)}) == [*range(len(FORMATS))]


def test_the_first_row_that_fits_counts() -> None:
    assert by_files(["model.safetensors", "pytorch_lora_weights.safetensors"]) == FORMATS[0].hint


@pytest.mark.parametrize(
    ("names", "has_config", "hint"),
    [
        ([], False, None),
        (["README.md"], False, None),
        (["detail.safetensors"], False, SINGLE_FILE),
        (["detail.safetensors"], True, RENAMED),
        (["final.ckpt", "optimizer.pt"], True, RENAMED),
        (["final.ckpt"], False, None),
        (["optimizer.pt", "training_args.bin"], True, None),
    ],
)
def test_weights_of_another_name(names: list[str], has_config: bool, hint: str | None) -> None:
    assert by_files(names, has_config=has_config) == hint


def test_what_is_pefts_is_not_taken_for_anothers() -> None:
    assert by_keys(["r", "lora_alpha", "target_modules"]) is None
    assert by_tensors(["base_model.model.unet.q.lora_A.weight", "unet.q.lora_A.weight"]) is None
    assert by_tensors(["q_proj.lora_A.weight"]) is None
