"""Writes the files of tests/features/quantized/written with the tools whose formats they are.

    pip install compressed-tensors mlx-cpu autoawq auto-round llmcompressor
    python -m tests.tools.write_quantized

Each file has the parts of one weight, `layer.…`, and the values that the tool makes of them (`expected`). Its metadata
has the tool, and the settings of config.json. The files of tests/features/quantized/folded have a small model (`base`)
and its release, into which llm-compressor has moved scales.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WRITTEN = Path(__file__).resolve().parents[1] / "features" / "quantized" / "written"
FOLDED = WRITTEN.with_name("folded")
ROWS, COLUMNS, GROUP = 32, 64, 32

Parts = dict[str, torch.Tensor]
Made = tuple[str, str, dict[str, Any], Parts, torch.Tensor]
"""The name of the file, the tool, its settings, the parts, and the tool's own values."""


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


def with_mlx() -> Iterator[Made]:
    mx: Any = importlib.import_module("mlx.core")
    numpy: Any = importlib.import_module("numpy")
    for bits in (3, 4, 6):
        options = {"group_size": GROUP, "bits": bits}
        parts = mx.quantize(mx.array(weight().float().numpy()), **options)
        values = torch.from_numpy(numpy.array(mx.dequantize(*parts, **options)))
        tensors = [torch.from_numpy(numpy.array(part)) for part in parts]
        yield f"mlx-{bits}", "mlx", options, dict(zip(("weight", "scales", "biases"), tensors, strict=True)), values


def with_compressed_tensors() -> Iterator[Made]:
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    utils: Any = importlib.import_module("compressed_tensors.quantization.utils")
    grouped = {"strategy": "group", "group_size": GROUP}
    block = {"strategy": "block", "block_structure": [16, 32]}
    cases = {
        "pack-quantized-4": {"num_bits": 4, **grouped},
        "pack-quantized-4-zeros": {"num_bits": 4, "symmetric": False, **grouped},
        "pack-quantized-3": {"num_bits": 3, "strategy": "channel"},
        "int-quantized-8": {"num_bits": 8, "strategy": "channel"},
        "int-quantized-8-zeros": {"num_bits": 8, "symmetric": False, "strategy": "channel"},
        "float-quantized-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "float-quantized-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "float-quantized-block": {"num_bits": 8, "type": "float", **block},
    }
    for name, options in cases.items():
        kind = "-".join(name.split("-")[:2])
        args = quantization.QuantizationArgs(**options)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        scale, zero = utils.calculate_qparams(*extremes(options), args)
        state = {"weight": weight(), "weight_scale": scale, "weight_zero_point": zero}
        compressor = compressors.BaseCompressor.get_value_from_registry(kind)
        parts = compressor.compress(state, scheme)
        settings = {"quant_method": "compressed-tensors", "format": kind}
        settings["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": options}}
        exact = {**parts, "weight_scale": parts["weight_scale"].float()}
        yield name, "compressed-tensors", settings, parts, compressor.decompress(exact, scheme)["weight"]


def extremes(options: dict[str, Any]) -> list[torch.Tensor]:
    """The least and the largest value of each group, channel, or block, in the shape of the scales."""
    rows, columns = {
        "group": (1, GROUP),
        "channel": (1, COLUMNS),
        "tensor": (ROWS, COLUMNS),
        "block": tuple(options.get("block_structure", ())),
    }[options["strategy"]]
    blocks = weight().view(ROWS // rows, rows, COLUMNS // columns, columns)
    return [values.flatten() if options["strategy"] == "tensor" else values for values in (
        blocks.amin((1, 3)), blocks.amax((1, 3)))]  # fmt: skip


def scales_and_zeros(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in float16 and zero points from 1, (rows, groups), as quantizers of this kind choose them."""
    groups = weight().float().view(ROWS, -1, GROUP)
    scales = ((groups.amax(2) - groups.amin(2)) / (2**bits - 1)).half()
    return scales, (-groups.amin(2) / scales).round().clamp(1, 2**bits - 1)


def with_autoawq() -> Iterator[Made]:
    gemm: Any = importlib.import_module("awq.modules.linear.gemm")
    packing: Any = importlib.import_module("awq.utils.packing_utils")
    scales, zeros = scales_and_zeros(4)
    linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16)
    linear.weight.data = ((weight().half().view(ROWS, -1, GROUP) / scales[..., None] + zeros[..., None]).round().clamp(
        0, 15) - zeros[..., None]).half().mul(scales[..., None]).view(ROWS, COLUMNS)  # fmt: skip
    made = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    values = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    yield "awq-4", "autoawq", settings, dict(made.state_dict()), values


def with_auto_round() -> Iterator[Made]:
    for version, module in (("gptq", "qlinear_torch_zp"), ("gptq_v2", "qlinear_torch")):
        layers: Any = importlib.import_module(f"auto_round_extension.torch.{module}")
        cases = ((2, False), (3, False), (4, True), (8, False)) if version == "gptq" else ((4, False),)
        for bits, is_ordered in cases:
            scales, zeros = scales_and_zeros(bits)
            linear = nn.Linear(COLUMNS, ROWS, bias=False)
            linear.weight.data = weight().float()
            layer = layers.QuantLinear(bits, GROUP, COLUMNS, ROWS, bias=False, g_idx=is_ordered)
            layer.device = "cpu"
            layer.pack(linear, scales.float(), zeros)
            if is_ordered:  # by activations
                layer.g_idx = layer.g_idx[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
            settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
            name = f"{version}-{bits}{'-ordered' if is_ordered else ''}"
            yield name, "auto-round", settings, dict(layer.state_dict()), layer(torch.eye(COLUMNS)).T


def moved_by_llm_compressor() -> None:
    """Releases of a block of Llama with shared heads, of which each has scales in its norms."""
    llmcompressor: Any = importlib.import_module("llmcompressor")
    transform: Any = importlib.import_module("llmcompressor.modifiers.awq")
    quantization: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    smooth: Any = importlib.import_module("llmcompressor.modifiers.transform.smoothquant")
    arguments = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    recipes = {
        "awq": [transform.AWQModifier(ignore=["lm_head"], config_groups=groups)],
        "smoothquant": [
            smooth.SmoothQuantModifier(smoothing_strength=0.8),
            quantization.QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
    }
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign] # there is no accelerator
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()
        for key, tensor in model.named_parameters():
            if "norm" in key or "embed" in key:  # some channels are larger than others
                tensor.data = (tensor.float() * (0.5 * torch.randn(64)).exp()).bfloat16()
        tensors = {f"base.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
        words = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="0"))
        rows = [{"input_ids": torch.randint(0, 64, (32,)).tolist(), "attention_mask": [1] * 32} for _ in range(16)]
        with TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
            llmcompressor.oneshot(
                model=model,
                dataset=importlib.import_module("datasets").Dataset.from_list(rows),
                recipe=recipe,
                processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0"),
                max_seq_length=32,
                num_calibration_samples=16,
            )
            model.save_pretrained(directory, save_compressed=True)
            settings = json.loads(Path(directory, "config.json").read_bytes())["quantization_config"]
            stored = load_file(Path(directory, "model.safetensors"))
        tensors |= {f"release.{key}": tensor for key, tensor in stored.items()}
        facts = {"tool": f"llmcompressor {metadata.version('llmcompressor')}", "settings": json.dumps(settings)}
        save_file(tensors, FOLDED / f"{name}.safetensors", metadata=facts)


WRITERS: tuple[Callable[[], Iterator[Made]], ...] = (with_mlx, with_compressed_tensors, with_autoawq, with_auto_round)


def main() -> None:
    for writer in WRITERS:
        for name, tool, settings, parts, values in writer():
            tensors = {f"layer.{part}": tensor.contiguous() for part, tensor in parts.items()}
            tensors["expected"] = values.detach().float().contiguous()
            facts = {"tool": f"{tool} {metadata.version(tool)}", "settings": json.dumps(settings)}
            save_file(tensors, WRITTEN / f"{name}.safetensors", metadata=facts)
    moved_by_llm_compressor()


if __name__ == "__main__":
    main()
