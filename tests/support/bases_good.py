"""Bases that a good adapter must pass on: what is unusual about each does not touch the model in memory."""

from collections.abc import Callable
from typing import Any

import torch

from tests.support import bases
from tests.support.bases import INNER, O_PROJ, TERNARY, VOCABULARY, WEIGHTS, Case, Draft, by_name, llama
from tests.support.bases_broken import BY_ROWS, INT4, QWEN_NAMES, bnb_4bit, bnb_8bit, fp8, fp8_experts, mxfp4_experts

FP8 = bases.FP8_CONFIG
Tensors = dict[str, torch.Tensor]


# --- drafts ----------------------------------------------------------------------------------------------------------


def _ones(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: torch.ones(shape, dtype=dtype)}


def _cast(draft: Draft, part: str, dtype: torch.dtype) -> Draft:
    return draft.plus({name: one.to(dtype) for name, one in draft.stored.items() if part in name})


def _scales_in(draft: Draft, change: Callable[[torch.Tensor], torch.Tensor]) -> Draft:
    return draft.plus({name: change(one) for name, one in draft.stored.items() if name.endswith("scale_inv")})


def _next_layer(draft: Draft) -> Draft:
    """One layer after the last, as DeepSeek-V3 stores its multi-token prediction."""
    copied = {name.replace("layers.0.", "layers.2."): one.clone() for name, one in draft.stored.items()}
    return draft.plus({name: one for name, one in copied.items() if "layers.2." in name})


def _listed(name: str) -> Draft:
    """The index names what its shard lacks, and no parameter needs."""
    draft = llama().sharded()
    draft.listed[name] = next(iter(draft.shards))
    return draft


def _unlisted() -> Draft:
    """Transformers reads whole shards: the tensor is loaded."""
    draft = llama().sharded()
    del draft.listed[f"{O_PROJ}.weight"]
    return draft


def _next_to_shards() -> Draft:
    draft = llama().sharded()
    draft.shards[WEIGHTS] = list(draft.stored)
    return draft


def _stale_index() -> Draft:
    draft = llama()
    listed = dict.fromkeys(draft.stored, "model-00001-of-00001.safetensors")
    return draft.with_json("model.safetensors.index.json", {"metadata": {}, "weight_map": listed})


def _second_set() -> Draft:
    draft = llama()
    return draft.with_files({"consolidated.safetensors": bases.save(draft.stored, {"format": "pt"})})


def _in_two_shards() -> Draft:
    draft = llama().sharded()
    for names in draft.shards.values():
        if f"{O_PROJ}.weight" not in names:
            names.append(f"{O_PROJ}.weight")
    return draft


def _without_key(draft: Draft, key: str, **changes: Any) -> Draft:
    del draft.config[key]
    return draft.configured(**changes)


def _no_pooler() -> Draft:
    draft = bases.bert()
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        del draft.truth[name]
        del draft.stored[name]
    return draft


def _tied_twice() -> Draft:
    draft = llama(tie_word_embeddings=True)
    return draft.plus({"lm_head.weight": draft.stored["model.embed_tokens.weight"].clone()})


def _tied_in_the_config_alone() -> Draft:
    """Transformers then ties nothing: the file counts."""
    draft = llama(tie_word_embeddings=True)
    draft.truth["lm_head.weight"] = torch.ones(48, 32, dtype=torch.float64)
    return draft.plus(_ones("lm_head.weight", 48, 32))


def _float8() -> Draft:
    """Plain values in eight bits: they are what they say."""
    draft = llama()
    return draft.plus({f"{O_PROJ}.weight": draft.truth[f"{O_PROJ}.weight"].to(torch.float8_e4m3fn)})


def _some_layers_alone() -> Draft:
    """The layers that `modules_to_not_convert` names are stored plain."""
    left = ["lm_head", *(f"model.layers.{layer}.self_attn" for layer in range(2)), "gate_proj", "up_proj"]
    draft = llama().packed(bases.fp8_blocks(), only="mlp.down_proj.weight")
    return draft.declared(FP8, modules_to_not_convert=left)


def _in_blocks(rows: int, columns: int, block: list[int] | None) -> Draft:
    return llama().packed(bases.fp8_blocks(rows, columns)).declared(FP8, weight_block_size=block)


def _static_scales() -> Draft:
    draft = fp8()
    names = [name for name in draft.stored if name.endswith("scale_inv")]
    draft.plus({name.replace("weight_scale_inv", "activation_scale"): torch.tensor(0.5) for name in names})
    return draft.declared(FP8, activation_scheme="static")


def _mxfp8() -> Draft:
    """Blocks of 32 values, whose scales are exponents in bytes."""
    draft = _in_blocks(1, 32, [1, 32]).declared(FP8, quant_method="mxfp8", weight_block_size=[1, 32])
    return _scales_in(draft, lambda one: (one.log2() + 127).to(torch.uint8))


def bnb_4bit_nested() -> Draft:
    return bnb_4bit(nested=True).declared(bases.BNB_4BIT_CONFIG, bnb_4bit_use_double_quant=True)


def _by_tensors() -> Draft:
    def pack(name: str, values: torch.Tensor) -> Tensors:
        scale = torch.tensor([bases.FLOAT8_SCALE], dtype=torch.bfloat16)
        return {f"{name}.weight": bases.float8(values), f"{name}.weight_scale": scale}

    return llama().packed(pack).declared(bases.compressed("float-quantized", strategy="tensor"))


def _int4() -> Draft:
    return llama(values=TERNARY).packed(bases.w4a16).declared(INT4)


# --- cases -----------------------------------------------------------------------------------------------------------


def case(name: str, draft: Callable[[], Draft], dtype: str | None = None, *notes: str, **settings: Any) -> Case:
    """With a dtype and no quantization, the report must state that there is none."""
    settings = {"quantization": "none" if dtype else None} | settings
    return Case(name=name, draft=draft, dtype=dtype, notes=notes, **settings)


def _files_and_names() -> tuple[Case, ...]:
    folders, index = "weights/{number}/model.safetensors", "model.safetensors.index.json"
    ghost, buffer = "model.layers.9.self_attn.q_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    beside = {
        "a-second-set-in-a-folder": {"original/consolidated.00.pth": b"not read"},
        "a-pickled-copy-next-to-safetensors": {"pytorch_model.bin": b"not read"},
        "files-of-a-tokenizer": {"tokenizer.json": b"{}", "README.md": b"# Model", "generation_config.json": b"{}"},
        "what-a-training-run-leaves-behind": {
            "training_args.bin": b"not read", "optimizer.pt": b"not read", "trainer_state.json": b"{}"
        },
        "files-of-a-repository": {
            ".gitattributes": b"*.safetensors filter=lfs", "LICENSE": b"", "chat_template.jinja": b""
        },
        "a-pickled-index-next-to-safetensors": {"pytorch_model.bin.index.json": b'{"metadata": {}, "weight_map": {}}'},
    }  # fmt: skip
    return (
        case("one-file", llama, "bfloat16"),
        case("shards", lambda: llama().sharded(3), "bfloat16"),
        case("shards-as-qwen3-5-names-them", lambda: llama().sharded(3, QWEN_NAMES)),
        case("shards-with-names-of-their-own", lambda: llama().sharded(2, "part-{number}.safetensors")),
        case("shards-in-folders", lambda: llama().sharded(2, folders)),
        case("shards-counted-from-zero", lambda: llama().sharded(2, "model-{at:05d}-of-00001.safetensors")),
        case("links-of-the-hub-cache", lambda: llama().sharded(2).as_links()),
        case("links-of-the-hub-cache-to-one-file", lambda: llama().as_links()),
        case("links-of-the-hub-cache-to-shards-in-folders", lambda: llama().sharded(2, folders).as_links()),
        case("a-ghost-in-the-index", lambda: _listed(ghost), None, ghost),
        case("a-ghost-of-a-buffer-in-the-index", lambda: _listed(buffer), None, "rotary_emb.inv_freq"),
        case("a-tensor-that-the-index-does-not-list", _unlisted, None, f"{O_PROJ}.weight"),
        case("model-safetensors-next-to-a-whole-set-of-shards", _next_to_shards, None, index),
        case("a-stale-index-next-to-model-safetensors", _stale_index, None, index),
        case("a-second-complete-set", _second_set, None, "consolidated.safetensors"),
        case("one-name-in-two-shards-with-the-same-bytes", _in_two_shards, None, f"{O_PROJ}.weight"),
        *(case(name, lambda files=files: llama().with_files(files)) for name, files in beside.items()),
        # saved from the bare model, without a head, which is tied
        case("names-without-the-prefix-of-the-body", lambda: llama(tie_word_embeddings=True).renamed("model.", "")),
        case("no-architectures", lambda: _without_key(llama(), "architectures")),
        case("the-old-key-of-the-dtype",
             lambda: _without_key(llama(dtype=torch.float16), "dtype", torch_dtype="float16")),
        case("a-shard-for-almost-every-tensor", lambda: llama().sharded(12), "bfloat16"),
        case("tied-and-sharded", lambda: llama(tie_word_embeddings=True).sharded(2), "bfloat16"),
        case("bert-in-shards", lambda: bases.bert().sharded(3), adapter="bert"),
    )  # fmt: skip


def _tensors_that_are_not_part_of_the_model() -> tuple[Case, ...]:
    plain = torch.float32
    mtp = _ones("mtp.layers.0.q_proj.weight", 32, 32) | _ones("mtp.layers.0.fc.weight", 32, 32)
    places = [(f"model.layers.{layer}.self_attn", part) for layer in range(2) for part in "kv"]
    surplus = {
        "heads-of-medusa": (
            "medusa_head.", {f"medusa_head.{at}.0.linear.weight": torch.ones(32, 32) for at in range(2)}
        ),
        "a-layer-of-eagle": ("eagle_layer.", _ones("eagle_layer.fc.weight", 32, 64, dtype=plain)),
        "heads-of-multi-token-prediction": ("mtp.", mtp),
        "scales-of-the-kv-cache": ("k_scale", {f"{at}.{part}_scale": torch.tensor([0.5]) for at, part in places}),
        "scales-of-the-kv-cache-in-the-projections": (
            "k_proj.k_scale", {f"{at}.{part}_proj.{part}_scale": torch.tensor(0.5) for at, part in places}
        ),
        "a-head-of-another-task": ("value_head", _ones("value_head.weight", 1, 32)),
        "a-tower-that-the-text-model-lacks": ("visual.", _ones("visual.patch_embed.proj.weight", 32, 12)),
    }  # fmt: skip
    frequencies = {f"{at}.rotary_emb.inv_freq": torch.ones(4) for at, _ in places}
    return (
        *(case(name, lambda tensors=tensors: llama().plus(tensors), None, note)
          for name, (note, tensors) in surplus.items()),
        case("a-layer-of-multi-token-prediction",
             lambda: _next_layer(llama()).plus(_ones("model.layers.2.eh_proj.weight", 32, 64)),
             None, "model.layers.2."),
        case("stale-frequencies", lambda: llama().plus(frequencies)),
    )  # fmt: skip


def _heads_poolers_and_ties() -> tuple[Case, ...]:
    masked = lambda: bases.bert("BertForMaskedLM")  # noqa: E731
    return (
        case("bert", bases.bert, adapter="bert"),
        case("bert-without-a-pooler", _no_pooler, adapter="bert"),
        case("bert-saved-with-its-masked-lm-head", masked, adapter="bert"),
        case("bert-classifier-on-a-masked-lm", masked, adapter="bert-classifier"),
        case("bert-with-old-names-of-norms",
             lambda: bases.bert().renamed("LayerNorm.weight", "LayerNorm.gamma").renamed(
                 "LayerNorm.bias", "LayerNorm.beta"),
             adapter="bert"),
        case("bert-with-stored-position-ids",
             lambda: bases.bert().plus({"embeddings.position_ids": torch.arange(32).unsqueeze(0)}), adapter="bert"),
        case("a-classifier-on-a-language-model", llama, adapter="classifier"),
        case("tied-and-stored-once", lambda: llama(tie_word_embeddings=True)),
        case("tied-and-stored-twice", _tied_twice),
        case("tied-and-stored-as-the-head",
             lambda: llama(tie_word_embeddings=True).renamed("model.embed_tokens.weight", "lm_head.weight")),
        case("tied-in-the-config-and-different-in-the-file", _tied_in_the_config_alone, None, "lm_head.weight"),
    )  # fmt: skip


def _dtypes() -> tuple[Case, ...]:
    stored = ("float32", "float16", "float64")
    asked = (("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "float32"), ("float64", "bfloat16"))
    return (
        *(case(name, lambda name=name: llama(dtype=getattr(torch, name)), name) for name in stored),
        *(case(f"{name}-asked-for-as-{as_}", lambda name=name: llama(dtype=getattr(torch, name)), as_,
               asked={"dtype": as_})
          for name, as_ in asked),
        case("norms-in-float32", lambda: _cast(llama(), "norm", torch.float32)),
        case("the-embedding-in-float32", lambda: _cast(llama(), "embed_tokens", torch.float32)),
        case("stored-in-float32-and-configured-as-bfloat16",
             lambda: llama(dtype=torch.float32).configured(dtype="bfloat16")),
        case("stored-in-float64-and-configured-as-float32",
             lambda: llama(dtype=torch.float64).configured(dtype="float32"), "float32"),
        case("float8-without-any-scale", _float8, "bfloat16"),
    )  # fmt: skip


def _declared_quantizations() -> tuple[Case, ...]:
    def qwen() -> Draft:
        return bases.qwen3_5().packed(bases.fp8_blocks(8, 8)).declared(FP8, weight_block_size=[8, 8])

    scale = {"model.layers.0.self_attn.k_scale": torch.tensor([0.5])}
    plain = (
        ("fp8-blocks-in-shards", lambda: fp8().sharded(3)),
        ("fp8-with-scales-in-bfloat16", lambda: _scales_in(fp8(), torch.Tensor.bfloat16)),
        ("fp8-with-layers-left-alone", _some_layers_alone),
        ("fp8-blocks-of-rows-and-scales-of-the-kv-cache", lambda: _in_blocks(8, 32, [8, 32]).plus(scale)),
        ("fp8-with-one-scale-for-each-weight",
         lambda: _scales_in(_in_blocks(VOCABULARY + INNER, INNER, None), lambda one: one.reshape(()))),
        ("fp8-with-one-scale-for-each-row", lambda: _in_blocks(1, INNER, None)),
        ("fp8-with-static-scales-of-activations", _static_scales),
    )  # fmt: skip
    packed = (("bnb-8bit", bnb_8bit), ("bnb-4bit", bnb_4bit))
    whole_bytes = lambda: llama(values=(-127, 127), step=2.0**-8)  # noqa: E731
    plain_bases = (("bnb-8bit", whole_bytes), ("bnb-4bit", lambda: llama(values=TERNARY)))
    return (
        case("fp8-blocks", fp8, "bfloat16", quantization="fp8"),
        *(case(name, draft, quantization="fp8") for name, draft in plain),
        case("fp8-with-a-layer-of-multi-token-prediction", lambda: _next_layer(fp8()), None, "model.layers.2.",
             quantization="fp8"),
        case("fp8-experts", fp8_experts, quantization="fp8", adapter="one-layer"),
        case("fp8-of-qwen3-5", qwen, quantization="fp8", adapter="second-layer"),
        case("mxfp8", _mxfp8, quantization="mxfp8"),
        *(case(name, draft, quantization=name) for name, draft in packed),
        *(case(f"{name}-asked-for-as-it-is", draft, quantization=name, asked={"quantization": name})
          for name, draft in packed),
        *(case(f"{name}-asked-for", draft, quantization=name, asked={"quantization": name})
          for name, draft in plain_bases),
        case("bnb-4bit-nested", bnb_4bit_nested, quantization="bnb-4bit"),
        case("mxfp4-experts", lambda: mxfp4_experts().declared(bases.MXFP4_CONFIG), quantization="mxfp4",
             adapter="one-layer"),
        case("mxfp4-experts-in-shards", lambda: mxfp4_experts().declared(bases.MXFP4_CONFIG).sharded(2),
             quantization="mxfp4", adapter="one-layer"),
    )  # fmt: skip


GOOD = by_name(
    *_files_and_names(),
    *_tensors_that_are_not_part_of_the_model(),
    *_heads_poolers_and_ties(),
    *_dtypes(),
    *_declared_quantizations(),
    case("mixtral-with-a-module-for-each-expert", bases.mixtral, adapter="one-layer"),
    case("gpt-oss-in-bfloat16", bases.gpt_oss, adapter="one-layer"),
    case("qwen3-5", bases.qwen3_5, adapter="second-layer"),
    case(
        "qwen3-5-with-its-head-of-multi-token-prediction",
        lambda: bases.qwen3_5().plus(_ones("mtp.fc.weight", 32, 64)).sharded(2, QWEN_NAMES),
        None,
        "mtp.",
        adapter="second-layer",
    ),
)

_BY_PACKAGE = {"quantization": "compressed-tensors"}
INT8 = bases.compressed("int-quantized", type="int", strategy="channel")
PACKAGED = by_name(
    case(
        "compressed-tensors-fp8-by-rows",
        lambda: llama().packed(bases.fp8_channel).declared(BY_ROWS),
        "bfloat16",
        **_BY_PACKAGE,
    ),
    case("compressed-tensors-fp8-by-tensors", _by_tensors, "bfloat16", **_BY_PACKAGE),
    case(
        "compressed-tensors-int8", lambda: llama().packed(bases.int8_channel).declared(INT8), "bfloat16", **_BY_PACKAGE
    ),
    case("compressed-tensors-int4", _int4, "bfloat16", **_BY_PACKAGE),
    case("compressed-tensors-int4-in-shards", lambda: _int4().sharded(3), "bfloat16", **_BY_PACKAGE),
)
"""Quantized by a package that the project does not depend on."""

UNFIT = by_name(
    # `transformer.` is the prefix of LlamaForQuestionAnswering, whose names this base does not have. What the model
    # lacks comes before what the file has too much of: both are in the report.
    Case(
        name="an-adapter-whose-prefix-belongs-to-another-class",
        draft=llama,
        cause="keys-missing",
        adapter="foreign-prefix",
    ),
    Case(
        name="an-adapter-of-a-model-for-text-and-images",
        draft=llama,
        cause="keys-missing",
        adapter="language-model",
        names=("language_model.", "text and images"),
    ),
)
"""Adapters that do not fit a good base."""
