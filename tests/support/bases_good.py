"""Bases that a good adapter must pass on: what is unusual about each does not touch the model in memory."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import bases
from tests.support.base_cases import Cases
from tests.support.bases import INNER, O_PROJ, TERNARY, VOCABULARY, WEIGHTS, Draft, llama
from tests.support.bases_broken import bnb_4bit, bnb_8bit, fp8, fp8_experts

GOOD = Cases()
good = GOOD.add

PLAIN: dict[str, Any] = {"quantization": "none"}


# --- files and names --------------------------------------------------------------------------------------------------


@good(dtype="bfloat16", **PLAIN)
def one_file() -> Draft:
    return llama()


@good(dtype="bfloat16", **PLAIN)
def shards() -> Draft:
    return llama().sharded(3)


@good()
def shards_as_qwen3_5_names_them() -> Draft:
    return llama().sharded(3, "model.safetensors-{number:05d}-of-{count:05d}.safetensors")


@good()
def shards_with_names_of_their_own() -> Draft:
    return llama().sharded(2, "part-{number}.safetensors")


@good()
def shards_in_folders() -> Draft:
    return llama().sharded(2, "weights/{number}/model.safetensors")


@good()
def shards_counted_from_zero() -> Draft:
    draft = llama().sharded(2)
    assert draft.shards is not None
    draft.shards = {f"model-{at:05d}-of-00001.safetensors": names for at, names in enumerate(draft.shards.values())}
    return draft


@good()
def links_of_the_hub_cache() -> Draft:
    draft = llama().sharded(2)
    draft.linked = True
    return draft


@good()
def links_of_the_hub_cache_to_one_file() -> Draft:
    draft = llama()
    draft.linked = True
    return draft


@good(notes=("model.layers.9.self_attn.q_proj.weight",))
def a_ghost_in_the_index() -> Draft:
    """The index names what its shard lacks, and no parameter needs."""
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    draft.listed["model.layers.9.self_attn.q_proj.weight"] = next(iter(draft.shards))
    return draft


@good(notes=("rotary_emb.inv_freq",))
def a_ghost_of_a_buffer_in_the_index() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    draft.listed["model.layers.0.self_attn.rotary_emb.inv_freq"] = next(iter(draft.shards))
    return draft


@good(notes=(f"{O_PROJ}.weight",))
def a_tensor_that_the_index_does_not_list() -> Draft:
    """Transformers reads whole shards: the tensor is loaded."""
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    del draft.listed[f"{O_PROJ}.weight"]
    return draft


@good(notes=("model.safetensors.index.json",))
def model_safetensors_next_to_a_whole_set_of_shards() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    draft.shards[WEIGHTS] = list(draft.stored)
    return draft


@good(notes=("model.safetensors.index.json",))
def a_stale_index_next_to_model_safetensors() -> Draft:
    draft = llama()
    listed = dict.fromkeys(draft.stored, "model-00001-of-00001.safetensors")
    return draft.with_json("model.safetensors.index.json", {"metadata": {}, "weight_map": listed})


@good(notes=("consolidated.safetensors",))
def a_second_complete_set() -> Draft:
    draft = llama()
    draft.files["consolidated.safetensors"] = bases.save(draft.stored, {"format": "pt"})
    return draft


@good()
def a_second_set_in_a_folder() -> Draft:
    draft = llama()
    draft.files["original/consolidated.00.pth"] = b"not read"
    return draft


@good(notes=(f"{O_PROJ}.weight",))
def one_name_in_two_shards_with_the_same_bytes() -> Draft:
    draft = llama().sharded()
    assert draft.shards is not None
    draft.listed = {name: file for file, names in draft.shards.items() for name in names}
    for names in draft.shards.values():
        if f"{O_PROJ}.weight" not in names:
            names.append(f"{O_PROJ}.weight")
    return draft


@good()
def a_pickled_copy_next_to_safetensors() -> Draft:
    draft = llama()
    draft.files["pytorch_model.bin"] = b"not read"
    return draft


@good()
def files_of_a_tokenizer() -> Draft:
    draft = llama()
    draft.files |= {"tokenizer.json": b"{}", "README.md": b"# Model", "generation_config.json": b"{}"}
    return draft


@good()
def names_without_the_prefix_of_the_body() -> Draft:
    """Saved from the bare model, without a head, which is tied."""
    return llama(tie_word_embeddings=True).renamed("model.", "")


@good()
def no_architectures() -> Draft:
    draft = llama()
    del draft.config["architectures"]
    return draft


@good()
def the_old_key_of_the_dtype() -> Draft:
    draft = llama(dtype=torch.float16)
    del draft.config["dtype"]
    return draft.configured(torch_dtype="float16")


@good(dtype="bfloat16", **PLAIN)
def a_shard_for_almost_every_tensor() -> Draft:
    return llama().sharded(12)


@good()
def links_of_the_hub_cache_to_shards_in_folders() -> Draft:
    draft = llama().sharded(2, "weights/{number}/model.safetensors")
    draft.linked = True
    return draft


@good()
def what_a_training_run_leaves_behind() -> Draft:
    draft = llama()
    draft.files |= {"training_args.bin": b"not read", "optimizer.pt": b"not read", "trainer_state.json": b"{}"}
    return draft


@good()
def a_pickled_index_next_to_safetensors() -> Draft:
    return llama().with_json("pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {}})


@good()
def files_of_a_repository() -> Draft:
    draft = llama()
    draft.files |= {".gitattributes": b"*.safetensors filter=lfs", "LICENSE": b"", "chat_template.jinja": b""}
    return draft


@good(dtype="bfloat16", **PLAIN)
def tied_and_sharded() -> Draft:
    return llama(tie_word_embeddings=True).sharded(2)


@good(adapter="bert")
def bert_in_shards() -> Draft:
    return bases.bert().sharded(3)


@good(notes=("medusa_head.",))
def heads_of_medusa() -> Draft:
    return llama().plus({f"medusa_head.{at}.0.linear.weight": torch.ones(32, 32) for at in range(2)})


@good(notes=("eagle_layer.",))
def a_layer_of_eagle() -> Draft:
    return llama().plus({"eagle_layer.fc.weight": torch.ones(32, 64)})


@good()
def the_embedding_in_float32() -> Draft:
    draft = llama()
    return draft.plus({name: one.float() for name, one in draft.stored.items() if "embed_tokens" in name})


@good(dtype="float32", **PLAIN)
def stored_in_float64_and_configured_as_float32() -> Draft:
    return llama(dtype=torch.float64).configured(dtype="float32")


@good(asked={"dtype": "float32"}, dtype="float32", **PLAIN)
def float16_asked_for_as_float32() -> Draft:
    return llama(dtype=torch.float16)


@good(asked={"dtype": "bfloat16"}, dtype="bfloat16", **PLAIN)
def float64_asked_for_as_bfloat16() -> Draft:
    return llama(dtype=torch.float64)


# --- tensors that are not part of the model ---------------------------------------------------------------------------


@good(notes=("mtp.",))
def heads_of_multi_token_prediction() -> Draft:
    draft = llama()
    extra = {f"mtp.layers.0.{name}.weight": torch.ones(32, 32, dtype=torch.bfloat16) for name in ("q_proj", "fc")}
    return draft.plus(extra)


@good(notes=("model.layers.2.",))
def a_layer_of_multi_token_prediction() -> Draft:
    """As DeepSeek-V3 stores it: one layer after the last."""
    draft = llama()
    copied = {
        name.replace("layers.0.", "layers.2."): one.clone() for name, one in draft.stored.items() if "layers.0." in name
    }
    return draft.plus(copied | {"model.layers.2.eh_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16)})


@good(notes=("k_scale",))
def scales_of_the_kv_cache() -> Draft:
    draft = llama()
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"]
    return draft.plus({name: torch.tensor([0.5]) for name in names})


@good(notes=("k_proj.k_scale",))
def scales_of_the_kv_cache_in_the_projections() -> Draft:
    draft = llama()
    names = [f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale" for layer in range(2) for part in "kv"]
    return draft.plus({name: torch.tensor(0.5) for name in names})


@good()
def stale_frequencies() -> Draft:
    draft = llama()
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    return draft.plus({name: torch.ones(4) for name in names})


@good(notes=("value_head",))
def a_head_of_another_task() -> Draft:
    return llama().plus({"value_head.weight": torch.ones(1, 32, dtype=torch.bfloat16)})


@good(notes=("visual.",))
def a_tower_that_the_text_model_lacks() -> Draft:
    return llama().plus({"visual.patch_embed.proj.weight": torch.ones(32, 12, dtype=torch.bfloat16)})


# --- heads and poolers ------------------------------------------------------------------------------------------------


@good(adapter="bert")
def bert() -> Draft:
    return bases.bert()


@good(adapter="bert")
def bert_without_a_pooler() -> Draft:
    draft = bases.bert()
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        del draft.truth[name]
    return draft.without("pooler.dense.weight", "pooler.dense.bias")


@good(adapter="bert")
def bert_saved_with_its_masked_lm_head() -> Draft:
    return bases.bert("BertForMaskedLM")


@good(adapter="bert-classifier")
def bert_classifier_on_a_masked_lm() -> Draft:
    return bases.bert("BertForMaskedLM")


@good(adapter="bert")
def bert_with_old_names_of_norms() -> Draft:
    draft = bases.bert()
    return draft.renamed("LayerNorm.weight", "LayerNorm.gamma").renamed("LayerNorm.bias", "LayerNorm.beta")


@good(adapter="bert")
def bert_with_stored_position_ids() -> Draft:
    return bases.bert().plus({"embeddings.position_ids": torch.arange(32).unsqueeze(0)})


@good(adapter="classifier")
def a_classifier_on_a_language_model() -> Draft:
    return llama()


# --- ties -------------------------------------------------------------------------------------------------------------


@good()
def tied_and_stored_once() -> Draft:
    return llama(tie_word_embeddings=True)


@good()
def tied_and_stored_twice() -> Draft:
    draft = llama(tie_word_embeddings=True)
    return draft.plus({"lm_head.weight": draft.stored["model.embed_tokens.weight"].clone()})


@good()
def tied_and_stored_as_the_head() -> Draft:
    return llama(tie_word_embeddings=True).renamed("model.embed_tokens.weight", "lm_head.weight")


@good(notes=("lm_head.weight",))
def tied_in_the_config_and_different_in_the_file() -> Draft:
    """Transformers then ties nothing: the file counts."""
    draft = llama(tie_word_embeddings=True)
    draft.truth["lm_head.weight"] = torch.ones(48, 32, dtype=torch.float64)
    return draft.plus({"lm_head.weight": torch.ones(48, 32, dtype=torch.bfloat16)})


# --- dtypes -----------------------------------------------------------------------------------------------------------


@good(dtype="float32", **PLAIN)
def float32() -> Draft:
    return llama(dtype=torch.float32)


@good(dtype="float16", **PLAIN)
def float16() -> Draft:
    return llama(dtype=torch.float16)


@good(dtype="float64", **PLAIN)
def float64() -> Draft:
    return llama(dtype=torch.float64)


@good()
def norms_in_float32() -> Draft:
    draft = llama()
    return draft.plus({name: one.float() for name, one in draft.stored.items() if "norm" in name})


@good()
def stored_in_float32_and_configured_as_bfloat16() -> Draft:
    return llama(dtype=torch.float32).configured(dtype="bfloat16")


@good(asked={"dtype": "float32"}, dtype="float32", **PLAIN)
def bfloat16_asked_for_as_float32() -> Draft:
    return llama()


@good(asked={"dtype": "float16"}, dtype="float16", **PLAIN)
def bfloat16_asked_for_as_float16() -> Draft:
    return llama()


@good(dtype="bfloat16", **PLAIN)
def float8_without_any_scale() -> Draft:
    """Plain values in eight bits: they are what they say."""
    draft = llama()
    return draft.plus({f"{O_PROJ}.weight": draft.truth[f"{O_PROJ}.weight"].to(torch.float8_e4m3fn)})


# --- quantized, and declared so ---------------------------------------------------------------------------------------


good(name="fp8-blocks", dtype="bfloat16", quantization="fp8")(fp8)


@good(quantization="fp8")
def fp8_blocks_in_shards() -> Draft:
    return fp8().sharded(3)


@good(quantization="fp8")
def fp8_with_scales_in_bfloat16() -> Draft:
    draft = fp8()
    return draft.plus({name: one.bfloat16() for name, one in draft.stored.items() if name.endswith("scale_inv")})


@good(quantization="fp8")
def fp8_with_layers_left_alone() -> Draft:
    """The layers that `modules_to_not_convert` names are stored plain."""
    draft = llama().packed(bases.fp8_blocks(), only="mlp.down_proj.weight")
    left = ["lm_head", *(f"model.layers.{layer}.self_attn" for layer in range(2)), "gate_proj", "up_proj"]
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"modules_to_not_convert": left})


@good(quantization="fp8")
def fp8_blocks_of_rows_and_scales_of_the_kv_cache() -> Draft:
    draft = llama().packed(bases.fp8_blocks(8, 32)).plus({"model.layers.0.self_attn.k_scale": torch.tensor([0.5])})
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"weight_block_size": [8, 32]})


@good(quantization="fp8")
def fp8_with_one_scale_for_each_weight() -> Draft:
    draft = llama().packed(bases.fp8_blocks(VOCABULARY + INNER, INNER))
    draft.plus({name: one.reshape(()) for name, one in draft.stored.items() if name.endswith("scale_inv")})
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"weight_block_size": None})


@good(quantization="fp8")
def fp8_with_one_scale_for_each_row() -> Draft:
    draft = llama().packed(bases.fp8_blocks(1, INNER))
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"weight_block_size": None})


@good(quantization="fp8")
def fp8_with_static_scales_of_activations() -> Draft:
    draft = fp8()
    names = [name for name in draft.stored if name.endswith("scale_inv")]
    draft.plus({name.replace("weight_scale_inv", "activation_scale"): torch.tensor(0.5) for name in names})
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"activation_scheme": "static"})


@good(quantization="fp8", notes=("model.layers.2.",))
def fp8_with_a_layer_of_multi_token_prediction() -> Draft:
    draft = fp8()
    copied = {name.replace("layers.0.", "layers.2."): one.clone() for name, one in draft.stored.items()}
    return draft.plus({name: one for name, one in copied.items() if "layers.2." in name})


good(name="fp8-experts", quantization="fp8", adapter="one-layer")(fp8_experts)


@good(quantization="fp8", adapter="second-layer")
def fp8_of_qwen3_5() -> Draft:
    draft = bases.qwen3_5().packed(bases.fp8_blocks(8, 8))
    return draft.configured(quantization_config=bases.FP8_CONFIG | {"weight_block_size": [8, 8]})


@good(quantization="mxfp8")
def mxfp8() -> Draft:
    """Blocks of 32 values, whose scales are exponents in bytes."""
    draft = llama().packed(bases.fp8_blocks(1, 32))
    scales = {name: one for name, one in draft.stored.items() if name.endswith("scale_inv")}
    draft.plus({name: (one.log2() + 127).to(torch.uint8) for name, one in scales.items()})
    return draft.configured(
        quantization_config=bases.FP8_CONFIG | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    )


good(name="bnb-8bit", quantization="bnb-8bit")(bnb_8bit)
good(name="bnb-4bit", quantization="bnb-4bit")(bnb_4bit)
good(name="bnb-8bit-asked-for-as-it-is", asked={"quantization": "bnb-8bit"}, quantization="bnb-8bit")(bnb_8bit)
good(name="bnb-4bit-asked-for-as-it-is", asked={"quantization": "bnb-4bit"}, quantization="bnb-4bit")(bnb_4bit)


@good(quantization="bnb-4bit")
def bnb_4bit_nested() -> Draft:
    draft = llama(values=TERNARY).packed(bases.bnb_4bit(nested=True))
    return draft.configured(quantization_config=bases.BNB_4BIT_CONFIG | {"bnb_4bit_use_double_quant": True})


@good(asked={"quantization": "bnb-8bit"}, quantization="bnb-8bit")
def bnb_8bit_asked_for() -> Draft:
    return llama(values=(-127, 127), step=2.0**-8)


@good(asked={"quantization": "bnb-4bit"}, quantization="bnb-4bit")
def bnb_4bit_asked_for() -> Draft:
    return llama(values=TERNARY)


@good(adapter="one-layer", quantization="mxfp4")
def mxfp4_experts() -> Draft:
    draft = bases.gpt_oss().packed(bases.mxfp4, only="experts.gate_up_proj")
    draft.packed(bases.mxfp4, only="experts.down_proj")
    return draft.configured(quantization_config=bases.MXFP4_CONFIG)


@good(adapter="one-layer", quantization="mxfp4")
def mxfp4_experts_in_shards() -> Draft:
    return mxfp4_experts().sharded(2)


# --- quantized by a package that the project does not depend on -------------------------------------------------------

PACKAGED = Cases()
packaged = PACKAGED.add


@packaged(quantization="compressed-tensors", dtype="bfloat16")
def compressed_tensors_fp8_by_rows() -> Draft:
    declared = bases.compressed("float-quantized", strategy="channel")
    return llama().packed(bases.fp8_channel).configured(quantization_config=declared)


@packaged(quantization="compressed-tensors", dtype="bfloat16")
def compressed_tensors_fp8_by_tensors() -> Draft:
    def pack(name: str, values: torch.Tensor) -> bases.Tensors:
        scale = torch.tensor([bases.FLOAT8_SCALE], dtype=torch.bfloat16)
        return {f"{name}.weight": bases.float8(values), f"{name}.weight_scale": scale}

    return llama().packed(pack).configured(quantization_config=bases.compressed("float-quantized", strategy="tensor"))


@packaged(quantization="compressed-tensors", dtype="bfloat16")
def compressed_tensors_int8() -> Draft:
    declared = bases.compressed("int-quantized", type="int", strategy="channel")
    return llama().packed(bases.int8_channel).configured(quantization_config=declared)


@packaged(quantization="compressed-tensors", dtype="bfloat16")
def compressed_tensors_int4() -> Draft:
    declared = bases.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    return llama(values=TERNARY).packed(bases.w4a16).configured(quantization_config=declared)


@packaged(quantization="compressed-tensors", dtype="bfloat16")
def compressed_tensors_int4_in_shards() -> Draft:
    return compressed_tensors_int4().sharded(3)


# --- other model types ------------------------------------------------------------------------------------------------


@good(adapter="one-layer")
def mixtral_with_a_module_for_each_expert() -> Draft:
    return bases.mixtral()


@good(adapter="one-layer")
def gpt_oss_in_bfloat16() -> Draft:
    return bases.gpt_oss()


@good(adapter="second-layer")
def qwen3_5() -> Draft:
    return bases.qwen3_5()


@good(adapter="second-layer", notes=("mtp.",))
def qwen3_5_with_its_head_of_multi_token_prediction() -> Draft:
    return (
        bases.qwen3_5()
        .plus({"mtp.fc.weight": torch.ones(32, 64, dtype=torch.bfloat16)})
        .sharded(2, "model.safetensors-{number:05d}-of-{count:05d}.safetensors")
    )


# --- adapters that do not fit a good base -----------------------------------------------------------------------------


UNFIT = Cases()
unfit = UNFIT.add


@unfit("keys-missing", adapter="foreign-prefix")
def an_adapter_whose_prefix_belongs_to_another_class() -> Draft:
    """`transformer.` is the prefix of LlamaForQuestionAnswering, whose names this base does not have.

    What the model lacks comes before what the file has too much of: both are in the report.
    """
    return llama()


@unfit("keys-missing", adapter="language-model", names=("language_model.", "text and images"))
def an_adapter_of_a_model_for_text_and_images() -> Draft:
    return llama()
