"""Bases that no adapter may be judged on: in each, the model in memory would not be the model in the files."""

from __future__ import annotations

from functools import partial

import torch

from tests.support import bases
from tests.support.base_cases import FORMAT, INCOMPLETE, INCONSISTENT, Cases
from tests.support.bases import DOWN_PROJ, O_PROJ, Q_PROJ, TERNARY, WEIGHTS, Draft, llama

BROKEN = Cases()
broken = BROKEN.add


# --- layers that transformers initializes at random -------------------------------------------------------------------


@broken(FORMAT, names=("GPTQ", "quantize_config.json"))
def gptq_with_quantize_config_json_alone() -> Draft:
    return llama().packed(bases.gptq).with_json("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True})


@broken(FORMAT, names=("GPTQ", "qweight"))
def gptq_that_nothing_declares() -> Draft:
    return llama().packed(bases.gptq)


@broken(FORMAT, names=("AWQ",))
def awq_that_nothing_declares() -> Draft:
    return llama().packed(bases.awq)


@broken(FORMAT, names=("EXL2",))
def exl2_that_nothing_declares() -> Draft:
    return llama().packed(bases.exl2)


@broken(FORMAT, names=("EXL2",))
def exl2_declared() -> Draft:
    return llama().packed(bases.exl2).configured(quantization_config={"quant_method": "exl2", "bits": 4.0})


@broken(FORMAT, names=("quanto",))
def quanto_saved_by_itself() -> Draft:
    qmap = {name.removesuffix(".weight"): {"weights": "qint8", "activations": "none"} for name in llama().truth}
    return llama().packed(bases.quanto).with_json("quanto_qmap.json", qmap)


@broken(FORMAT, names=("compressed-tensors",))
def w4a16_without_its_key() -> Draft:
    return llama().packed(bases.w4a16)


@broken((FORMAT, INCONSISTENT), names=("MXFP4",), adapter="one-layer")
def mxfp4_without_its_key() -> Draft:
    return (
        bases.gpt_oss().packed(bases.mxfp4, only="experts.gate_up_proj").packed(bases.mxfp4, only="experts.down_proj")
    )


# --- scales that transformers drops -----------------------------------------------------------------------------------


@broken((FORMAT, INCONSISTENT), names=("weight_scale",))
def autofp8() -> Draft:
    declared = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    return llama().packed(bases.fp8_tensor).configured(quantization_config=declared)


MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


@broken(FORMAT, names=("ModelOpt",))
def modelopt_fp8_declared() -> Draft:
    return llama().packed(bases.fp8_tensor).configured(quantization_config={"quant_method": "modelopt"} | MODELOPT)


@broken(FORMAT, names=("ModelOpt", "hf_quant_config.json"))
def modelopt_fp8_with_hf_quant_config_json_alone() -> Draft:
    declared = {"producer": {"name": "modelopt", "version": "0.33"}, "quantization": MODELOPT}
    return llama().packed(bases.fp8_tensor).with_json("hf_quant_config.json", declared)


@broken(FORMAT, names=("NVFP4",))
def nvfp4_declared() -> Draft:
    declared = {"quant_method": "modelopt"} | MODELOPT | {"quant_algo": "NVFP4"}
    return llama().packed(bases.nvfp4).configured(quantization_config=declared)


@broken(FORMAT, names=("NVFP4",))
def nvfp4_with_hf_quant_config_json_alone() -> Draft:
    declared = {"producer": {"name": "modelopt"}, "quantization": MODELOPT | {"quant_algo": "NVFP4"}}
    return llama().packed(bases.nvfp4).with_json("hf_quant_config.json", declared)


@broken((FORMAT, INCONSISTENT), names=("weight_scale_inv",))
def fp8_blocks_without_their_key() -> Draft:
    return llama().packed(bases.fp8_blocks())


@broken((FORMAT, INCONSISTENT), names=("weight_scale",))
def compressed_tensors_fp8_without_its_key() -> Draft:
    return llama().packed(bases.fp8_channel)


@broken(FORMAT, names=("compressed-tensors", "compression_config"))
def compressed_tensors_fp8_under_its_old_key() -> Draft:
    return (
        llama()
        .packed(bases.fp8_channel)
        .configured(compression_config=bases.compressed("float-quantized", strategy="channel"))
    )


@broken((FORMAT, INCONSISTENT), names=("SCB",))
def bnb_8bit_without_its_key() -> Draft:
    return llama().packed(bases.bnb_8bit)


@broken((FORMAT, INCONSISTENT), names=("absmax",))
def bnb_4bit_without_its_key() -> Draft:
    return llama(values=TERNARY).packed(bases.bnb_4bit())


# --- a scale that is missing, codes without a meaning -----------------------------------------------------------------


def fp8() -> Draft:
    return llama().packed(bases.fp8_blocks()).configured(quantization_config=bases.FP8_CONFIG)


@broken(INCONSISTENT, names=(f"{O_PROJ}.weight",))
def fp8_without_the_scale_of_one_layer() -> Draft:
    return fp8().without(f"{O_PROJ}.weight_scale_inv")


@broken(INCONSISTENT, names=("_proj.weight",))
def fp8_without_any_scale() -> Draft:
    draft = fp8()
    return draft.without(*[name for name in draft.stored if name.endswith("scale_inv")])


def fp8_experts() -> Draft:
    """Each expert of Mixtral has scales of its own; transformers dequantizes them before it stacks the experts."""
    draft = bases.mixtral()
    for name in [name for name in draft.stored if name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))]:
        values = draft.stored.pop(name).double()
        draft.plus(bases.fp8_blocks()(name.removesuffix(".weight"), values))
    return draft.packed(bases.fp8_blocks()).configured(quantization_config=bases.FP8_CONFIG)


@broken(INCONSISTENT, names=("experts.1.w2.weight",), adapter="one-layer")
def fp8_without_the_scale_of_one_expert() -> Draft:
    return fp8_experts().without("model.layers.0.block_sparse_moe.experts.1.w2.weight_scale_inv")


@broken(INCONSISTENT, names=("nested_absmax",))
def bnb_4bit_without_one_nested_absmax() -> Draft:
    draft = llama(values=TERNARY).packed(bases.bnb_4bit(nested=True))
    return draft.without(f"{O_PROJ}.weight.nested_absmax").configured(quantization_config=bases.BNB_4BIT_CONFIG)


@broken(INCONSISTENT, names=("absmax",))
def bnb_4bit_without_one_absmax() -> Draft:
    draft = llama(values=TERNARY).packed(bases.bnb_4bit())
    return draft.without(f"{O_PROJ}.weight.absmax").configured(quantization_config=bases.BNB_4BIT_CONFIG)


@broken(INCONSISTENT, names=("SCB",))
def bnb_8bit_without_one_scb() -> Draft:
    draft = llama().packed(bases.bnb_8bit)
    return draft.without(f"{O_PROJ}.SCB").configured(quantization_config=bases.BNB_8BIT_CONFIG)


@broken((INCONSISTENT, INCOMPLETE), names=("down_proj",), adapter="one-layer")
def mxfp4_without_the_scales_of_one_parameter() -> Draft:
    draft = (
        bases.gpt_oss().packed(bases.mxfp4, only="experts.gate_up_proj").packed(bases.mxfp4, only="experts.down_proj")
    )
    draft.configured(quantization_config=bases.MXFP4_CONFIG)
    return draft.without("model.layers.0.mlp.experts.down_proj_scales")


def _codes_in(dtype: torch.dtype) -> Draft:
    draft = llama()
    values = draft.truth[f"{O_PROJ}.weight"] / bases.STEP * 2
    return draft.plus({f"{O_PROJ}.weight": values.to(torch.int64).to(dtype)})


for _dtype in (torch.int8, torch.int32, torch.uint8, torch.bool):
    _name = str(_dtype).removeprefix("torch.")
    broken(INCONSISTENT, name=f"{_name}-for-a-float-parameter", names=(f"{O_PROJ}.weight", _name))(
        partial(_codes_in, _dtype)
    )


@broken(INCONSISTENT, names=("model.norm.weight", "int32"))
def an_integer_norm() -> Draft:
    draft = llama()
    return draft.plus({"model.norm.weight": (draft.truth["model.norm.weight"] / bases.STEP).to(torch.int32)})


@broken(INCONSISTENT, names=(f"{O_PROJ}.weight",))
def int8_with_a_weight_scale() -> Draft:
    """W8A8 of one layer, which nothing declares."""
    draft = llama()
    values = draft.truth[f"{O_PROJ}.weight"] / bases.STEP * 2
    return draft.plus({f"{O_PROJ}.weight": values.to(torch.int8), f"{O_PROJ}.weight_scale": torch.tensor([[2.0**-5]])})


@broken(INCONSISTENT, names=(f"{O_PROJ}.weight",))
def one_float8_weight_with_a_scale() -> Draft:
    draft = llama()
    return draft.plus(bases.fp8_tensor(O_PROJ, draft.truth[f"{O_PROJ}.weight"]))


# --- weights that the files lack --------------------------------------------------------------------------------------


@broken(INCOMPLETE, names=(f"{O_PROJ}.weight",))
def no_weight_of_the_body() -> Draft:
    return llama().without(f"{O_PROJ}.weight")


@broken(INCOMPLETE, names=(f"{Q_PROJ}.weight",))
def no_weight_of_a_target() -> Draft:
    return llama().without(f"{Q_PROJ}.weight")


@broken(INCOMPLETE, names=("model.embed_tokens.weight",))
def no_embedding() -> Draft:
    return llama().without("model.embed_tokens.weight")


@broken(INCOMPLETE, names=("lm_head.weight",))
def no_untied_head() -> Draft:
    return llama().without("lm_head.weight")


@broken(INCOMPLETE, names=("model.norm.weight",))
def no_norm() -> Draft:
    return llama().without("model.norm.weight")


@broken(INCOMPLETE, names=("self_attn.q_proj.bias",))
def biases_that_the_config_promises() -> Draft:
    return llama().configured(attention_bias=True)


@broken(INCOMPLETE, names=("model.layers.2.",))
def one_layer_too_many_in_the_config() -> Draft:
    return llama().configured(num_hidden_layers=3)


@broken(INCOMPLETE, names=("experts",), adapter="one-layer")
def one_expert_of_mixtral_missing() -> Draft:
    return bases.mixtral().without("model.layers.0.block_sparse_moe.experts.1.w2.weight")


@broken((INCOMPLETE, INCONSISTENT), names=(f"{O_PROJ}.weight",))
def an_index_that_names_what_its_shard_lacks() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    draft.shards[draft.listed[f"{O_PROJ}.weight"]].remove(f"{O_PROJ}.weight")
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=(f"{DOWN_PROJ}.weight", WEIGHTS))
def a_partial_model_safetensors_next_to_complete_shards() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    whole = [name for names in draft.shards.values() for name in names]
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    draft.shards[WEIGHTS] = [name for name in whole if name != f"{DOWN_PROJ}.weight"]
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=("model-00002-of-00003.safetensors",))
def a_shard_that_the_index_does_not_list() -> Draft:
    draft = llama().sharded(3)
    assert draft.shards is not None
    lost = "model-00002-of-00003.safetensors"
    draft.listed = {name: file for file, names in draft.shards.items() for name in names if file != lost}
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=("model-00002-of-00003.safetensors",))
def a_shard_that_is_absent() -> Draft:
    draft = llama().sharded(3)
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    del draft.shards["model-00002-of-00003.safetensors"]
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=("model.safetensors-00002-of-00003.safetensors",))
def a_shard_of_qwen3_5_that_is_absent() -> Draft:
    draft = llama().sharded(3, "model.safetensors-{number:05d}-of-{count:05d}.safetensors")
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    del draft.shards["model.safetensors-00002-of-00003.safetensors"]
    return draft


@broken(INCONSISTENT, names=("base_layer.weight",))
def weights_of_a_base_layer() -> Draft:
    """Saved from a model that PEFT had wrapped."""
    return llama().renamed("q_proj.weight", "q_proj.base_layer.weight")


@broken(INCOMPLETE, names=("model.",))
def another_prefix_on_every_name() -> Draft:
    draft = llama()
    draft.stored = {f"module.{name}": tensor for name, tensor in draft.stored.items()}
    return draft


@broken(INCONSISTENT, names=(f"{Q_PROJ}.weight", "48"))
def a_shape_that_the_config_contradicts() -> Draft:
    return llama().plus({f"{Q_PROJ}.weight": torch.zeros(48, 32, dtype=torch.bfloat16)})


@broken((INCOMPLETE, INCONSISTENT), names=("no weights",))
def no_weight_files() -> Draft:
    draft = llama()
    draft.stored = {}
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=("Git LFS",))
def a_git_lfs_pointer() -> Draft:
    draft = llama()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
    draft.files[WEIGHTS] = pointer
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=(WEIGHTS,))
def a_truncated_file() -> Draft:
    draft = llama()
    draft.files[WEIGHTS] = bases.save(draft.stored)[:-1000]
    return draft


@broken((INCOMPLETE, INCONSISTENT), names=(WEIGHTS,))
def an_empty_file() -> Draft:
    draft = llama()
    draft.files[WEIGHTS] = b""
    return draft


@broken(INCONSISTENT, names=("lm_head.weight", "different"))
def one_name_with_two_values() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    first, second = draft.shards
    twice = draft.shards[first][0]
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    others = {name: draft.stored[name] for name in draft.shards[second]}
    draft.files[second] = bases.save(others | {twice: torch.ones_like(draft.stored[twice])}, {"format": "pt"})
    return draft


# --- blocks that do not divide the rows -------------------------------------------------------------------------------


@broken(INCONSISTENT, names=("_proj.weight", "16", "24"))
def fp8_rows_that_are_no_multiple_of_the_block() -> Draft:
    draft = llama(intermediate_size=24).packed(bases.fp8_blocks())
    return draft.configured(quantization_config=bases.FP8_CONFIG)


@broken((INCONSISTENT, FORMAT), names=("_proj.weight",))
def fp8_rows_that_transformers_refuses() -> Draft:
    draft = llama(intermediate_size=40).packed(bases.fp8_blocks())
    return draft.configured(quantization_config=bases.FP8_CONFIG)


# --- declared formats that cannot be judged, and declarations that are not so -----------------------------------------


@broken(INCONSISTENT, names=("quantization_config",))
def fp8_declared_over_plain_weights() -> Draft:
    return llama().configured(quantization_config=bases.FP8_CONFIG)


@broken(INCONSISTENT, names=("quantization_config",))
def bnb_4bit_declared_over_plain_weights() -> Draft:
    return llama().configured(quantization_config=bases.BNB_4BIT_CONFIG)


@broken(INCONSISTENT, names=("quantization_config",))
def bnb_8bit_declared_over_plain_weights() -> Draft:
    return llama().configured(quantization_config=bases.BNB_8BIT_CONFIG)


@broken((INCONSISTENT, FORMAT), names=("GPTQ",))
def gptq_declared_over_plain_weights() -> Draft:
    return llama().configured(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})


@broken(FORMAT, names=("GPTQ", "unquantized"))
def gptq_declared() -> Draft:
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return llama().packed(bases.gptq).configured(quantization_config=declared)


@broken(FORMAT, names=("AWQ", "unquantized"))
def awq_declared() -> Draft:
    declared = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return llama().packed(bases.awq).configured(quantization_config=declared)


@broken(FORMAT, names=("HQQ", "unquantized"))
def hqq_declared() -> Draft:
    declared = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    return llama().packed(bases.hqq).configured(quantization_config=declared)


@broken(FORMAT, names=("torchao", "unquantized"))
def torchao_declared() -> Draft:
    declared = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    return llama().packed(bases.torchao).configured(quantization_config=declared)


@broken(FORMAT, names=("quanto", "unquantized"))
def quanto_declared() -> Draft:
    return llama().packed(bases.quanto).configured(quantization_config={"quant_method": "quanto", "weights": "int8"})


@broken(FORMAT, names=("BitNet", "unquantized"))
def bitnet_declared() -> Draft:
    declared = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    return llama(values=TERNARY).packed(bases.bitnet).configured(quantization_config=declared)


@broken(FORMAT, names=("fbgemm", "unquantized"))
def fbgemm_declared() -> Draft:
    declared = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return llama().packed(bases.fp8_channel).configured(quantization_config=declared)


@broken(FORMAT, names=("GGUF", "unquantized"))
def gguf_alone() -> Draft:
    draft = llama()
    draft.stored = {}
    draft.files["model-q4_0.gguf"] = b"GGUF\x03\x00\x00\x00" + bytes(64)
    return draft


@broken((FORMAT, INCONSISTENT), names=("compressed-tensors",))
def compressed_tensors_fp8_without_one_scale() -> Draft:
    declared = bases.compressed("float-quantized", strategy="channel")
    return llama().packed(bases.fp8_channel).without(f"{O_PROJ}.weight_scale").configured(quantization_config=declared)


@broken(INCONSISTENT, names=("quantization_config", "compressed-tensors"))
def compressed_tensors_declared_over_plain_weights() -> Draft:
    return llama().configured(quantization_config=bases.compressed("float-quantized", strategy="channel"))


@broken((FORMAT, INCONSISTENT), names=("compressed-tensors",))
def w4a16_without_one_scale() -> Draft:
    declared = bases.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    draft = llama(values=TERNARY).packed(bases.w4a16).without(f"{O_PROJ}.weight_scale")
    return draft.configured(quantization_config=declared)


@broken(FORMAT, names=("no_such_method",))
def a_method_that_nobody_knows() -> Draft:
    return llama().configured(quantization_config={"quant_method": "no_such_method"})


# --- another packing than the config asks for -------------------------------------------------------------------------


def bnb_4bit() -> Draft:
    draft = llama(values=TERNARY).packed(bases.bnb_4bit())
    return draft.configured(quantization_config=bases.BNB_4BIT_CONFIG)


def bnb_8bit() -> Draft:
    return llama().packed(bases.bnb_8bit).configured(quantization_config=bases.BNB_8BIT_CONFIG)


broken(FORMAT, name="bnb-4bit-asked-for-as-bnb-8bit", asked={"quantization": "bnb-8bit"}, names=("bnb-4bit",))(bnb_4bit)
broken(FORMAT, name="bnb-8bit-asked-for-as-bnb-4bit", asked={"quantization": "bnb-4bit"}, names=("bnb-8bit",))(bnb_8bit)
broken(FORMAT, name="fp8-asked-for-as-bnb-4bit", asked={"quantization": "bnb-4bit"}, names=("fp8",))(fp8)
broken(FORMAT, name="fp8-asked-for-as-bnb-8bit", asked={"quantization": "bnb-8bit"}, names=("fp8",))(fp8)


# --- directories that hold something else -----------------------------------------------------------------------------


@broken((FORMAT, INCOMPLETE, INCONSISTENT), names=("diffusers",))
def a_diffusers_directory() -> Draft:
    draft = llama()
    draft.files = {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'}
    for part in ("unet", "vae"):
        draft.files[f"{part}/config.json"] = b'{"_class_name": "UNet2DConditionModel"}'
        draft.files[f"{part}/diffusion_pytorch_model.safetensors"] = bases.save(draft.stored)
    draft.stored, draft.config = {}, {}
    return draft


@broken((FORMAT, INCOMPLETE, INCONSISTENT), names=("fp16", "float16"))
def a_dtype_that_torch_does_not_know() -> Draft:
    draft = llama(dtype=torch.float16)
    del draft.config["dtype"]
    return draft.configured(torch_dtype="fp16")
