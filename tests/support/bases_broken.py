"""Bases that no adapter may be judged on: in each, the model in memory would not be the model in the files."""

from collections.abc import Callable
from typing import Any

import torch

from tests.support import bases
from tests.support.bases import DOWN_PROJ, O_PROJ, Q_PROJ, STEP, TERNARY, WEIGHTS, Case, Draft, by_name, llama

FORMAT, INCOMPLETE, INCONSISTENT = "base-format", "base-incomplete", "base-inconsistent"
UNREADABLE, LACKING, ANY = (FORMAT, INCONSISTENT), (INCOMPLETE, INCONSISTENT), (FORMAT, INCOMPLETE, INCONSISTENT)
MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
NVFP4 = MODELOPT | {"quant_algo": "NVFP4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
BY_ROWS = bases.compressed("float-quantized", strategy="channel")
INT4 = bases.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
SHARD, SHARD_OF_QWEN = "model-00002-of-00003.safetensors", "model.safetensors-00002-of-00003.safetensors"
QWEN_NAMES = "model.safetensors-{number:05d}-of-{count:05d}.safetensors"


# --- drafts ----------------------------------------------------------------------------------------------------------


def fp8(**changes: Any) -> Draft:
    return llama(**changes).packed(bases.fp8_blocks()).declared(bases.FP8_CONFIG)


def fp8_experts() -> Draft:
    """Each expert of Mixtral has scales of its own; transformers dequantizes them before it stacks the experts."""
    draft = bases.mixtral()
    for name in [name for name in draft.stored if name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))]:
        values = draft.stored.pop(name).double()
        draft.plus(bases.fp8_blocks()(name.removesuffix(".weight"), values))
    return draft.packed(bases.fp8_blocks()).declared(bases.FP8_CONFIG)


def bnb_4bit(*, nested: bool = False) -> Draft:
    return llama(values=TERNARY).packed(bases.bnb_4bit(nested=nested)).declared(bases.BNB_4BIT_CONFIG)


def bnb_8bit() -> Draft:
    return llama().packed(bases.bnb_8bit).declared(bases.BNB_8BIT_CONFIG)


def mxfp4_experts() -> Draft:
    draft = bases.gpt_oss().packed(bases.mxfp4, only="experts.gate_up_proj")
    return draft.packed(bases.mxfp4, only="experts.down_proj")


def _quanto() -> Draft:
    qmap = {name.removesuffix(".weight"): {"weights": "qint8", "activations": "none"} for name in llama().truth}
    return llama().packed(bases.quanto).with_json("quanto_qmap.json", qmap)


def _without(draft: Draft, end: str) -> Draft:
    return draft.without(*[name for name in draft.stored if name.endswith(end)])


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Draft:
    """One tensor is what `change` makes of its true values."""
    draft = llama()
    return draft.plus({name: change(draft.truth[name])})


def _codes_in(dtype: torch.dtype) -> Draft:
    return _changed(f"{O_PROJ}.weight", lambda values: (values / STEP * 2).to(torch.int64).to(dtype))


def _float8_of_one_layer() -> Draft:
    draft = llama()
    return draft.plus(bases.fp8_tensor(O_PROJ, draft.truth[f"{O_PROJ}.weight"]))


def _lost_of_its_shard() -> Draft:
    draft = llama().sharded()
    draft.shards[draft.listed[f"{O_PROJ}.weight"]].remove(f"{O_PROJ}.weight")
    return draft


def _next_to_shards() -> Draft:
    draft = llama().sharded()
    draft.shards[WEIGHTS] = [name for name in draft.stored if name != f"{DOWN_PROJ}.weight"]
    return draft


def _unlisted_shard() -> Draft:
    draft = llama().sharded(3)
    draft.listed = {name: file for name, file in draft.listed.items() if file != SHARD}
    return draft


def _absent_shard(draft: Draft, shard: str) -> Draft:
    del draft.shards[shard]
    return draft


def _another_prefix() -> Draft:
    draft = llama()
    draft.stored = {f"module.{name}": tensor for name, tensor in draft.stored.items()}
    return draft


def _no_weights() -> Draft:
    draft = llama()
    return draft.without(*draft.stored)


def _truncated() -> Draft:
    draft = llama()
    return draft.with_files({WEIGHTS: bases.save(draft.stored)[:-1000]})


def _two_values() -> Draft:
    draft = llama().sharded()
    first, second = draft.shards
    twice = draft.shards[first][0]
    others = {name: draft.stored[name] for name in draft.shards[second]}
    content = bases.save(others | {twice: torch.ones_like(draft.stored[twice])}, {"format": "pt"})
    return draft.with_files({second: content})


def _diffusers() -> Draft:
    draft = llama()
    draft.with_files({"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'})
    for part in ("unet", "vae"):
        weights = bases.save(draft.stored)
        draft.with_files({f"{part}/config.json": b'{"_class_name": "UNet2DConditionModel"}'})
        draft.with_files({f"{part}/diffusion_pytorch_model.safetensors": weights})
    draft.stored, draft.config = {}, {}
    return draft


def unknown_dtype() -> Draft:
    draft = llama(dtype=torch.float16).configured(torch_dtype="fp16")
    del draft.config["dtype"]
    return draft


# --- cases -----------------------------------------------------------------------------------------------------------


def case(name: str, cause: str | tuple[str, ...], draft: Callable[[], Draft], *names: str, **settings: Any) -> Case:
    return Case(name=name, cause=cause, draft=draft, names=names, **settings)


def _layers_initialized_at_random() -> tuple[Case, ...]:
    alone = {"bits": 4, "group_size": 32, "sym": True}
    return (
        case("gptq-with-quantize-config-json-alone", FORMAT,
             lambda: llama().packed(bases.gptq).with_json("quantize_config.json", alone),
             "GPTQ", "quantize_config.json"),
        case("gptq-that-nothing-declares", FORMAT, lambda: llama().packed(bases.gptq), "GPTQ", "qweight"),
        case("awq-that-nothing-declares", FORMAT, lambda: llama().packed(bases.awq), "AWQ"),
        case("exl2-that-nothing-declares", FORMAT, lambda: llama().packed(bases.exl2), "EXL2"),
        case("exl2-declared", FORMAT,
             lambda: llama().packed(bases.exl2).declared({"quant_method": "exl2", "bits": 4.0}), "EXL2"),
        case("quanto-saved-by-itself", FORMAT, _quanto, "quanto"),
        case("w4a16-without-its-key", FORMAT, lambda: llama().packed(bases.w4a16), "compressed-tensors"),
        case("mxfp4-without-its-key", UNREADABLE, mxfp4_experts, "MXFP4", adapter="one-layer"),
    )  # fmt: skip


def _dropped_scales() -> tuple[Case, ...]:
    autofp8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    version = {"name": "modelopt", "version": "0.33"}
    return (
        case("autofp8", UNREADABLE, lambda: llama().packed(bases.fp8_tensor).declared(autofp8), "weight_scale"),
        case("modelopt-fp8-declared", FORMAT,
             lambda: llama().packed(bases.fp8_tensor).declared(MODELOPT, quant_method="modelopt"), "ModelOpt"),
        case("modelopt-fp8-with-hf-quant-config-json-alone", FORMAT,
             lambda: llama().packed(bases.fp8_tensor).with_json(
                 "hf_quant_config.json", {"producer": version, "quantization": MODELOPT}),
             "ModelOpt", "hf_quant_config.json"),
        case("nvfp4-declared", FORMAT,
             lambda: llama().packed(bases.nvfp4).declared(NVFP4, quant_method="modelopt"), "NVFP4"),
        case("nvfp4-with-hf-quant-config-json-alone", FORMAT,
             lambda: llama().packed(bases.nvfp4).with_json(
                 "hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": NVFP4}),
             "NVFP4"),
        case("fp8-blocks-without-their-key", UNREADABLE, lambda: llama().packed(bases.fp8_blocks()),
             "weight_scale_inv"),
        case("compressed-tensors-fp8-without-its-key", UNREADABLE, lambda: llama().packed(bases.fp8_channel),
             "weight_scale"),
        case("compressed-tensors-fp8-under-its-old-key", FORMAT,
             lambda: llama().packed(bases.fp8_channel).configured(compression_config=BY_ROWS),
             "compressed-tensors", "compression_config"),
        case("bnb-8bit-without-its-key", UNREADABLE, lambda: llama().packed(bases.bnb_8bit), "SCB"),
        case("bnb-4bit-without-its-key", UNREADABLE, lambda: llama(values=TERNARY).packed(bases.bnb_4bit()), "absmax"),
    )  # fmt: skip


def _codes_without_a_meaning() -> tuple[Case, ...]:
    """A scale is missing, or integers are in the place of floats."""
    expert, scales = (
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        "model.layers.0.mlp.experts.down_proj_scales",
    )
    return (
        case("fp8-without-the-scale-of-one-layer", INCONSISTENT,
             lambda: fp8().without(f"{O_PROJ}.weight_scale_inv"), f"{O_PROJ}.weight"),
        case("fp8-without-any-scale", INCONSISTENT, lambda: _without(fp8(), "scale_inv"), "_proj.weight"),
        case("fp8-without-the-scale-of-one-expert", INCONSISTENT,
             lambda: fp8_experts().without(f"{expert}_scale_inv"), "experts.1.w2.weight", adapter="one-layer"),
        case("bnb-4bit-without-one-nested-absmax", INCONSISTENT,
             lambda: bnb_4bit(nested=True).without(f"{O_PROJ}.weight.nested_absmax"), "nested_absmax"),
        case("bnb-4bit-without-one-absmax", INCONSISTENT,
             lambda: bnb_4bit().without(f"{O_PROJ}.weight.absmax"), "absmax"),
        case("bnb-8bit-without-one-scb", INCONSISTENT, lambda: bnb_8bit().without(f"{O_PROJ}.SCB"), "SCB"),
        case("mxfp4-without-the-scales-of-one-parameter", (INCONSISTENT, INCOMPLETE),
             lambda: mxfp4_experts().declared(bases.MXFP4_CONFIG).without(scales), "down_proj", adapter="one-layer"),
        *(case(f"{str(dtype).removeprefix('torch.')}-for-a-float-parameter", INCONSISTENT,
               lambda dtype=dtype: _codes_in(dtype), f"{O_PROJ}.weight", str(dtype).removeprefix("torch."))
          for dtype in (torch.int8, torch.int32, torch.uint8, torch.bool)),
        case("an-integer-norm", INCONSISTENT,
             lambda: _changed("model.norm.weight", lambda values: (values / STEP).to(torch.int32)),
             "model.norm.weight", "int32"),
        case("int8-with-a-weight-scale", INCONSISTENT,
             lambda: _codes_in(torch.int8).plus({f"{O_PROJ}.weight_scale": torch.tensor([[2.0**-5]])}),
             f"{O_PROJ}.weight"),
        case("one-float8-weight-with-a-scale", INCONSISTENT, _float8_of_one_layer, f"{O_PROJ}.weight"),
    )  # fmt: skip


def _lacking_weights() -> tuple[Case, ...]:
    lost = (
        ("no-weight-of-the-body", f"{O_PROJ}.weight"), ("no-weight-of-a-target", f"{Q_PROJ}.weight"),
        ("no-embedding", "model.embed_tokens.weight"), ("no-untied-head", "lm_head.weight"),
        ("no-norm", "model.norm.weight"),
    )  # fmt: skip
    return (
        *(case(name, INCOMPLETE, lambda weight=weight: llama().without(weight), weight) for name, weight in lost),
        case("biases-that-the-config-promises", INCOMPLETE, lambda: llama().configured(attention_bias=True),
             "self_attn.q_proj.bias"),
        case("one-layer-too-many-in-the-config", INCOMPLETE, lambda: llama().configured(num_hidden_layers=3),
             "model.layers.2."),
        case("one-expert-of-mixtral-missing", INCOMPLETE,
             lambda: bases.mixtral().without("model.layers.0.block_sparse_moe.experts.1.w2.weight"),
             "experts", adapter="one-layer"),
        case("an-index-that-names-what-its-shard-lacks", LACKING, _lost_of_its_shard, f"{O_PROJ}.weight"),
        case("a-partial-model-safetensors-next-to-complete-shards", LACKING, _next_to_shards,
             f"{DOWN_PROJ}.weight", WEIGHTS),
        case("a-shard-that-the-index-does-not-list", LACKING, _unlisted_shard, SHARD),
        case("a-shard-that-is-absent", LACKING, lambda: _absent_shard(llama().sharded(3), SHARD), SHARD),
        case("a-shard-of-qwen3-5-that-is-absent", LACKING,
             lambda: _absent_shard(llama().sharded(3, QWEN_NAMES), SHARD_OF_QWEN), SHARD_OF_QWEN),
        case("weights-of-a-base-layer", INCONSISTENT,  # saved from a model that PEFT had wrapped
             lambda: llama().renamed("q_proj.weight", "q_proj.base_layer.weight"), "base_layer.weight"),
        case("another-prefix-on-every-name", INCOMPLETE, _another_prefix, "model."),
        case("a-shape-that-the-config-contradicts", INCONSISTENT,
             lambda: llama().plus({f"{Q_PROJ}.weight": torch.zeros(48, 32, dtype=torch.bfloat16)}),
             f"{Q_PROJ}.weight", "48"),
        case("no-weight-files", LACKING, _no_weights, "no weights"),
        case("a-git-lfs-pointer", LACKING, lambda: llama().with_files({WEIGHTS: LFS_POINTER}), "Git LFS"),
        case("a-truncated-file", LACKING, _truncated, WEIGHTS),
        case("an-empty-file", LACKING, lambda: llama().with_files({WEIGHTS: b""}), WEIGHTS),
        case("one-name-with-two-values", INCONSISTENT, _two_values, "lm_head.weight", "different"),
    )  # fmt: skip


def _blocks_that_do_not_divide_the_rows() -> tuple[Case, ...]:
    return (
        case("fp8-rows-that-are-no-multiple-of-the-block", INCONSISTENT, lambda: fp8(intermediate_size=24),
             "_proj.weight", "16", "24"),
        case("fp8-rows-that-transformers-refuses", (INCONSISTENT, FORMAT), lambda: fp8(intermediate_size=40),
             "_proj.weight"),
    )  # fmt: skip


def _declarations() -> tuple[Case, ...]:
    """Formats that cannot be judged, and declarations that are not so."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    hqq = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    torchao = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    declared = (
        ("gptq", "GPTQ", bases.gptq, GPTQ | {"sym": True, "desc_act": False}), ("awq", "AWQ", bases.awq, awq),
        ("hqq", "HQQ", bases.hqq, hqq), ("torchao", "torchao", bases.torchao, torchao),
        ("quanto", "quanto", bases.quanto, {"quant_method": "quanto", "weights": "int8"}),
        ("fbgemm", "fbgemm", bases.fp8_channel, fbgemm),
    )  # fmt: skip
    bitnet = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    plain = {"fp8": bases.FP8_CONFIG, "bnb-4bit": bases.BNB_4BIT_CONFIG, "bnb-8bit": bases.BNB_8BIT_CONFIG}
    gguf = {"model-q4_0.gguf": b"GGUF\x03\x00\x00\x00" + bytes(64)}
    one_scale = f"{O_PROJ}.weight_scale"
    return (
        *(case(f"{name}-declared-over-plain-weights", INCONSISTENT,
               lambda config=config: llama().declared(config), "quantization_config")
          for name, config in plain.items()),
        case("gptq-declared-over-plain-weights", (INCONSISTENT, FORMAT), lambda: llama().declared(GPTQ), "GPTQ"),
        *(case(f"{name}-declared", FORMAT, lambda pack=pack, config=config: llama().packed(pack).declared(config),
               called, "unquantized")
          for name, called, pack, config in declared),
        case("bitnet-declared", FORMAT, lambda: llama(values=TERNARY).packed(bases.bitnet).declared(bitnet),
             "BitNet", "unquantized"),
        case("gguf-alone", FORMAT, lambda: _no_weights().with_files(gguf), "GGUF", "unquantized"),
        case("compressed-tensors-fp8-without-one-scale", UNREADABLE,
             lambda: llama().packed(bases.fp8_channel).without(one_scale).declared(BY_ROWS), "compressed-tensors"),
        case("compressed-tensors-declared-over-plain-weights", INCONSISTENT, lambda: llama().declared(BY_ROWS),
             "quantization_config", "compressed-tensors"),
        case("w4a16-without-one-scale", UNREADABLE,
             lambda: llama(values=TERNARY).packed(bases.w4a16).without(one_scale).declared(INT4),
             "compressed-tensors"),
        case("a-method-that-nobody-knows", FORMAT, lambda: llama().declared({"quant_method": "no_such_method"}),
             "no_such_method"),
    )  # fmt: skip


def _other_requests() -> tuple[Case, ...]:
    """Another packing than the config asks for."""
    rows = (("bnb-4bit", bnb_4bit, "bnb-8bit"), ("bnb-8bit", bnb_8bit, "bnb-4bit"),
            ("fp8", fp8, "bnb-4bit"), ("fp8", fp8, "bnb-8bit"))  # fmt: skip
    return tuple(
        case(f"{name}-asked-for-as-{asked}", FORMAT, draft, name, asked={"quantization": asked})
        for name, draft, asked in rows
    )


BROKEN = by_name(
    *_layers_initialized_at_random(),
    *_dropped_scales(),
    *_codes_without_a_meaning(),
    *_lacking_weights(),
    *_blocks_that_do_not_divide_the_rows(),
    *_declarations(),
    *_other_requests(),
    case("a-diffusers-directory", ANY, _diffusers, "diffusers"),
    case("a-dtype-that-torch-does-not-know", ANY, unknown_dtype, "fp16", "float16"),
)
