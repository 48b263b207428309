"""Quantized directories: values as the formats' own tools make them, and clear refusals of everything else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from merge_gate._internal.errors import EngineError
from merge_gate.features.quantized.checkpoint import Checkpoint
from tests.support.quantized.checkpoints import WRITTEN, Tensors, opened, read, requantized, written

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 64]}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def unlike(release: Checkpoint, weight: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of our quantized weight from the tool's, in units of the noise."""
    again = requantized(release, "layer.weight", weight)
    assert again is not None
    return float((again - expected).norm() / (expected - weight).norm())


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.iterdir()))
def test_values_are_those_of_the_tool(name: str, tmp_path: Path) -> None:
    parts, expected, settings = written(name)
    release = opened(tmp_path, parts, {"layer.weight": expected}, settings)
    values = read(release, "layer.weight")
    assert values.dtype == torch.float32
    assert torch.allclose(values, expected, rtol=1e-3, atol=1e-6)  # some tools compute in float16


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.iterdir()))
def test_values_are_quantized_as_the_tool_does(name: str, tmp_path: Path) -> None:
    parts, expected, settings = written(name)
    release = opened(tmp_path, parts, {"layer.weight": expected}, settings)
    is_exact = not name.startswith(("int-", "float-")) and "ordered" not in name  # else in bfloat16, or calibrated
    assert unlike(release, random(32, 64).bfloat16().float(), expected) < (0.45 if is_exact else 1.3)


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(kind: str, is_nested: bool, tmp_path: Path) -> None:
    layer = bitsandbytes.nn.Linear4bit(192, 96, bias=False, compress_statistics=is_nested, quant_type=kind)
    weight = random(96, 192)
    layer.weight = bitsandbytes.nn.Params4bit(weight, False, quant_type=kind, compress_statistics=is_nested)
    layer.to("cpu")
    tensors = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    release = opened(tmp_path, tensors, {"layer.weight": weight}, BITSANDBYTES)
    assert torch.allclose(read(release, "layer.weight"), expected, atol=1e-6)
    assert release.format == "bitsandbytes (4 bits in groups of 64)"
    assert unlike(release, weight, expected) < (0.1 if is_nested else 1e-3)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    weight = random(32, 64)
    layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False)
    layer.to("cpu")
    tensors = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    expected = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    release = opened(tmp_path, tensors, {"layer.weight": weight}, {"load_in_8bit": True})
    assert torch.allclose(read(release, "layer.weight"), expected, atol=1e-5)
    assert release.kind("layer.weight") == "8 bits"


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_fp8_of_transformers(scale_format: str, tmp_path: Path) -> None:
    config = FineGrainedFP8Config(weight_block_size=(32, 64), scale_fmt=scale_format)
    quantizer = SimpleNamespace(quantization_config=config)
    weight = random(96, 128)
    made = Fp8Quantize(quantizer).convert({"layer.weight": weight})
    scale = made["layer.weight_scale_inv"]
    expected = Fp8Dequantize(quantizer)._dequantize_one(made["layer.weight"], scale, torch.float32)
    release = opened(tmp_path, made, {"layer.weight": weight}, FP8)
    assert torch.equal(read(release, "layer.weight"), expected)
    assert unlike(release, weight, expected) < 0.1
    assert release.format == "FP8 (FP8)"


def test_a_last_block_of_fp8_may_be_smaller(tmp_path: Path) -> None:
    codes, scales = random(80, 100).to(torch.float8_e4m3fn), 1 + random(3, 2).abs()
    tensors = {"layer.weight": codes, "layer.weight_scale_inv": scales}
    expected = codes.float() * scales.repeat_interleave(32, 0)[:80].repeat_interleave(64, 1)[:, :100]
    assert torch.equal(read(opened(tmp_path, tensors, {"layer.weight": codes}, FP8), "layer.weight"), expected)


def test_fp8_of_fbgemm_has_a_scale_for_each_row(tmp_path: Path) -> None:
    codes, scales = random(8, 16).to(torch.float8_e4m3fn), 1 + random(8, 1).abs()
    tensors = {"layer.weight": codes, "layer.weight_scale": scales, "layer.input_scale_ub": torch.ones(1)}
    release = opened(tmp_path, tensors, {"layer.weight": codes}, {"quant_method": "fbgemm_fp8"})
    assert torch.equal(read(release, "layer.weight"), codes.float() * scales)


def test_columns_in_the_order_of_activations(tmp_path: Path) -> None:
    """compressed-tensors wrote such files until it removed `actorder: group`; the index is that of GPTQ."""
    parts, expected, _ = written("pack-quantized-4")
    index = torch.arange(64).flip(0) // 32
    codes = expected.view(32, 2, 32) / parts["layer.weight_scale"].float()[..., None]
    scales = parts["layer.weight_scale"].float()[:, index]
    parts |= {"layer.weight_g_idx": index.int()}
    ordered = opened(tmp_path, parts, {"layer.weight": expected}, COMPRESSED)
    assert torch.allclose(read(ordered, "layer.weight"), codes.round().view(32, 64) * scales, atol=1e-3)


def test_other_tensors_are_plain_floats(tmp_path: Path) -> None:
    parts, expected, settings = written("gptq-8")
    plain = {"norm.weight": random(8).half(), "head.weight": random(4, 8).bfloat16()}
    release = opened(
        tmp_path, {**parts, **plain}, {"layer.weight": expected, **plain, "gone.weight": expected.clone()}, settings
    )
    assert torch.equal(read(release, "head.weight"), plain["head.weight"].float())
    assert release.kind("head.weight") == ""
    assert requantized(release, "norm.weight", plain["norm.weight"]) is None
    assert [name in release for name in ("norm.weight", "layer.weight", "gone.weight")] == [True, True, False]
    assert release.format == "GPTQ (8 bits in groups of 32)"


def test_weights_that_the_base_stores_transposed(tmp_path: Path) -> None:
    """The layers of GPT-2 are such."""
    parts, expected, settings = written("gptq-8")
    release = opened(tmp_path, parts, {"layer.weight": expected.T}, settings)
    assert torch.allclose(read(release, "layer.weight"), expected.T, atol=1e-2)
    assert unlike(release, random(32, 64).bfloat16().float().T, expected.T) < 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no quantization_config"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": ["awq"]}, "awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ: 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ: 'gemv'"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mlx"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({**COMPRESSED, "config_groups": {"a": {"format": "marlin-24"}}}, "marlin-24"),
        ({**COMPRESSED, "transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    ],
)
def test_other_formats_are_refused_by_name(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    parts, expected, _ = written("gptq-8")
    with pytest.raises(EngineError, match=words):
        opened(tmp_path, parts, {"layer.weight": expected}, settings)


def parts_of_gptq(**changed: torch.Tensor | None) -> Tensors:
    parts = {f"layer.{part}": tensor for part, tensor in changed.items()}
    return {name: tensor for name, tensor in (written("gptq-8")[0] | parts).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scales": None}, "cannot be read as gptq"),
        ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "cannot be read as gptq"),
        ({"scales": torch.zeros(3, 32)}, "make no weight"),
        ({"scales": torch.zeros(0, 32)}, "make no weight"),
        ({"scales": torch.zeros(())}, "make no weight"),
        ({"scales": torch.zeros(2, 32, 2)}, "make no weight"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, "make no weight"),
        ({"qweight": torch.zeros(0, 32, dtype=torch.int32)}, "make no weight"),
        ({"qweight": torch.zeros(5, 32, dtype=torch.int32)}, "make no weight"),
        ({"qweight": torch.zeros(128, 32, dtype=torch.int32)}, "make no weight"),
        ({"g_idx": torch.zeros(8, dtype=torch.int32)}, "make no weight"),
        ({"g_idx": None, "rotation": torch.zeros(8)}, "rotation"),
        ({"weight": torch.zeros(32, 64, dtype=torch.complex64)}, "weight"),
        ({"qzeros": torch.zeros(1 << 13, 9, dtype=torch.int32)}, "larger than the weight"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=words):
        opened(tmp_path, parts_of_gptq(**changed), {"layer.weight": random(32, 64)}, GPTQ)


def of_groups(**weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors, whose activations have other ones."""
    group = {"weights": weights, "input_activations": {"num_bits": 16, "symmetric": False}}
    return {**COMPRESSED, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gptq-8", GPTQ | {"bits": 4}, "has 8 bits, and config.json declares 4 bits"),
        ("gptq-8", GPTQ | {"group_size": 64}, "declares 8 bits, and groups of 64 columns"),
        ("gptq-8", GPTQ | {"group_size": -1}, "groups of all columns"),
        ("gptq-8", GPTQ | {"sym": True}, "declares symmetric codes"),
        ("gptq-4-ordered", GPTQ | {"bits": 4, "desc_act": False}, "g_idx"),
        ("awq-4", {"quant_method": "awq", "w_bit": 8}, "has 4 bits"),
        ("awq-4", {"quant_method": "awq", "q_group_size": 64}, "groups of 64"),
        ("awq-4", {"quant_method": "awq", "zero_point": False}, "declares symmetric codes"),
        ("mlx-4", {"bits": 3, "group_size": 32}, "has 4 bits"),
        ("mlx-4", {"bits": 4, "group_size": 64}, "groups of 64"),
        ("pack-quantized-4", of_groups(num_bits=8), "has 4 bits"),
        ("pack-quantized-4", of_groups(num_bits=4, strategy="channel"), "groups of all columns"),
        ("pack-quantized-4", of_groups(num_bits=4, symmetric=False), "no weight_zero_point"),
        ("pack-quantized-4-zeros", of_groups(num_bits=4, symmetric=True), "declares symmetric codes"),
        ("float-quantized-block", {"quant_method": "fp8", "weight_block_size": [64, 64]}, "groups of 64"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(
    name: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    parts, expected, _ = written(name)
    with pytest.raises(EngineError, match=words):
        read(opened(tmp_path, parts, {"layer.weight": expected}, settings), "layer.weight")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq-8", GPTQ | {"bits": 4, "dynamic": {"+:layer": {"bits": 8}}}),
        ("gptq-4-ordered", GPTQ | {"bits": 4, "desc_act": True, "sym": False}),
        ("mlx-4", {"bits": 6, "group_size": 64, "layer": {"bits": 4, "group_size": 32}}),
        ("pack-quantized-4", of_groups(num_bits=4, group_size=32, symmetric=True, actorder="static")),
        ("float-quantized-block", {"quant_method": "fp8", "weight_block_size": [16, 32]}),
        ("float-quantized-tensor", {"quant_method": "fp8"}),
    ],
)
def test_settings_of_some_weights_may_differ(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    parts, expected, _ = written(name)
    release = opened(tmp_path, parts, {"layer.weight": expected}, settings)
    assert torch.allclose(read(release, "layer.weight"), expected, rtol=1e-3, atol=1e-6)


def test_tensors_that_the_base_does_not_have_are_named(tmp_path: Path) -> None:
    parts, expected, settings = written("gptq-8")
    more = {"layer.bias": torch.ones(32), "other.bias": torch.zeros(32), "self_attn.k_scale": torch.ones(())}
    base = {"layer.weight": expected, "other.weight": expected.clone()}
    release = opened(tmp_path, {**parts, "other.weight": expected.clone(), **more}, base, settings)
    assert release.added == ("layer.bias",)


def test_groups_beyond_the_scales_are_refused(tmp_path: Path) -> None:
    parts = parts_of_gptq(g_idx=torch.full((64,), 2, dtype=torch.int32))
    release = opened(tmp_path, parts, {"layer.weight": random(32, 64)}, GPTQ)
    with pytest.raises(EngineError, match=r"'layer\.weight' has a g_idx beyond its 2 groups"):
        read(release, "layer.weight")


def test_other_names_than_the_base_has_are_refused(tmp_path: Path) -> None:
    tensors = {"layer.weight": random(8, 16).to(torch.float8_e4m3fn), "layer.weight_scale": torch.ones(8, 1)}
    with pytest.raises(EngineError, match="no weight of the base"):
        opened(tmp_path, tensors, {"model.layer.weight": random(8, 16)}, FP8)


def test_scaled_activations_are_refused(tmp_path: Path) -> None:
    """AWQ moves scales into an activation if nothing else is before a layer."""
    parts, expected, settings = written("awq-4")
    with pytest.raises(EngineError, match=r"act\.scales"):
        opened(tmp_path, {**parts, "mlp.act.scales": random(8)}, {"layer.weight": expected}, settings)


STATES = [
    b"",
    b"[]",
    b"{}",
    b"\xff",
    b'{"shape": [16, 8], "nested_offset": 1}',
    b'{"shape": [8, 16], "nested_offset": [1]}',
    b'{"shape": [8, 16], "nested_offset": 1e999}',
    b'{"shape": [8, 16], "nested_offset": 1, "blocksize": 1e999}',
    b'{"shape": [8, 16], "nested_offset": 1, "blocksize": 32, "nested_blocksize": 256}',
    b'{"shape": [8, 16], "nested_offset": 1, "blocksize": 64, "nested_blocksize": 1}',
    b'{"shape": [8, 16], "nested_offset": 1, "blocksize": 64, "nested_blocksize": 256, "quant_type": "fp4"}',
    b'{"shape": [8, 16], "nested_offset": 1, "blocksize": 64, "nested_blocksize": 256}',  # another quant_map
]


@pytest.mark.parametrize("state", STATES)
def test_a_hostile_state_of_bitsandbytes_is_refused(state: bytes, tmp_path: Path) -> None:
    tensors = {
        "layer.weight": torch.zeros(64, 1, dtype=torch.uint8),
        "layer.weight.absmax": torch.zeros(2, dtype=torch.uint8),
        "layer.weight.quant_map": torch.zeros(16),
        "layer.weight.nested_absmax": torch.zeros(1),
        "layer.weight.nested_quant_map": torch.zeros(256),
        "layer.weight.quant_state.bitsandbytes__nf4": torch.tensor([*state], dtype=torch.uint8),
    }
    release = opened(tmp_path, tensors, {"layer.weight": random(8, 16)}, BITSANDBYTES)
    with pytest.raises(EngineError, match=r"quant_state|another quant_map than the one of nf4"):
        read(release, "layer.weight")
