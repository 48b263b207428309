"""Every way PEFT has of adapting a layer, each on a real transformers model that has such a layer.

In: nothing. Out: `BASES` (minuscule models, saved by `save_bases`), `CASES` (one per method, variant and kind of
layer, saved by `save_adapter`), and `truth`, which merges with plain PEFT and looks at the merged tensors itself.
May not know merge_gate: what stands here is what the gate is held against.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes
import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# --- bases: one or two layers, sixteen wide ------------------------------------------------------------------------

TEXT = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
VISION = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def _llama_tall() -> nn.Module:
    """Weights of several times as many elements as the gate's fast way samples."""
    large = {"hidden_size": 128, "intermediate_size": 4096}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | large))


def _llama_bias() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True))


def _llama_tied() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"tie_word_embeddings": True}))


def _t5() -> nn.Module:
    """In float16 transformers keeps `wo` in float32: the final dtype is each tensor's own."""
    config = transformers.T5Config(
        vocab_size=24,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    config.tie_word_embeddings = False
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT))


def _bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config)


def _qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_channels=2
    )
    return transformers.ResNetModel(config)


def _convnext() -> nn.Module:
    return transformers.ConvNextModel(
        transformers.ConvNextConfig(num_channels=2, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    )


def _siglip() -> nn.Module:
    config = transformers.SiglipVisionConfig(**VISION, image_size=8, patch_size=4, num_channels=2)
    return transformers.SiglipVisionModel(config)


def _wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **TEXT,
        conv_dim=[4, 4],
        conv_stride=[2, 2],
        conv_kernel=[3, 2],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return transformers.Wav2Vec2Model(config)


def _videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(
        **VISION, image_size=4, patch_size=2, num_channels=2, num_frames=2, tubelet_size=2
    )
    return transformers.VideoMAEModel(config)


def _xlm_roberta() -> nn.Module:
    """Its head is tied to the embedding, and has a bias."""
    return transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**TEXT))


BASES: Mapping[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-tall": _llama_tall,
    "llama-bias": _llama_bias,
    "llama-tied": _llama_tied,
    "gpt2": _gpt2,
    "t5": _t5,
    "bert": _bert,
    "bert-classifier": _bert_classifier,
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "resnet": _resnet,
    "convnext": _convnext,
    "siglip": _siglip,
    "wav2vec2": _wav2vec2,
    "videomae": _videomae,
    "xlm-roberta": _xlm_roberta,
}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and torch warn about much that is meant here; what the gate says of it is tested by the gate's tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_base(name: str, directory: Path, dtype: str = "float32") -> Path:
    """Builds base `name` and saves it. Weights are spread (standard deviation 0.1), so that no row is idle."""
    torch.manual_seed(sorted(BASES).index(name))
    with quiet():
        model = BASES[name]()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.to(DTYPES[dtype]).save_pretrained(directory)
    return directory


QUANTIZATIONS = {
    "bnb-8bit": {"load_in_8bit": True},
    "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def load_base(name: str, directory: Path, quantization: str | None = None, *, dtype: str = "auto") -> nn.Module:
    """The saved base as a user loads it. By default it has the dtype that it was saved in, and is not quantized."""
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    with quiet():
        model: nn.Module = type(BASES[name]()).from_pretrained(directory, **options).eval()
    return model


def make_input(name: str) -> dict[str, Tensor]:
    """A small batch that base `name` accepts."""
    kind = next((kind for kind in INPUT_SHAPES if name.startswith(kind)), None)
    if kind is None:
        tokens = torch.arange(16).reshape(2, 8)
        return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "t5" else {})
    argument, shape = INPUT_SHAPES[kind]
    return {argument: torch.randn(shape, generator=torch.Generator().manual_seed(3))}


INPUT_SHAPES = {
    "resnet": ("pixel_values", (2, 2, 32, 32)),
    "convnext": ("pixel_values", (2, 2, 32, 32)),
    "siglip": ("pixel_values", (2, 2, 8, 8)),
    "videomae": ("pixel_values", (2, 2, 2, 4, 4)),
    "wav2vec2": ("input_values", (2, 64)),
}


def compute(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """All the numbers a forward pass gives, in a row."""
    with torch.no_grad(), quiet():
        output = model(**inputs).to_tuple()
    return torch.cat([part.flatten() for part in output if isinstance(part, torch.Tensor)])


# --- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one kind of layer. `config` makes the PeftConfig; `base` is a name of `BASES`.

    `state` makes the tensors of a file that today's PEFT reads but does not write.
    """

    name: str
    base: str
    config: Callable[[], peft.PeftConfig]
    state: Callable[[], dict[str, Tensor]] | None = None


def make_case(name: str, base: str, kind: str, **kwargs: Any) -> Case:
    state = kwargs.pop("state", None)
    make = getattr(peft, kind)
    return Case(name=name, base=base, config=lambda: make(**copy.deepcopy(kwargs)), state=state)


def _experts_one_by_one() -> dict[str, Tensor]:
    """A Mixtral adapter as transformers 4 wrote it: one pair of factors per expert and matrix."""
    state = {}
    for expert in range(2):
        for matrix, (rows, columns) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            name = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{matrix}"
            state[f"{name}.lora_A.weight"] = torch.zeros(2, columns)
            state[f"{name}.lora_B.weight"] = torch.zeros(rows, 2)
    return state


Q = ["q_proj"]
CONV = ["layer.0.convolution"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

LORA_CASES = (
    make_case("lora-linear", "llama", "LoraConfig", r=2, target_modules=["q_proj", "v_proj"]),
    make_case("lora-all-linear", "llama", "LoraConfig", r=2, target_modules="all-linear"),
    make_case("lora-tall", "llama-tall", "LoraConfig", r=2, target_modules=["up_proj", "gate_proj"]),
    make_case("lora-bert", "bert", "LoraConfig", r=2, target_modules=["query"]),
    make_case("lora-rslora", "llama", "LoraConfig", r=2, target_modules=Q, use_rslora=True, lora_alpha=4),
    make_case(
        "lora-patterns",
        "llama",
        "LoraConfig",
        r=2,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 3},
        alpha_pattern={"q_proj": 5},
    ),
    make_case("lora-bias-term", "llama-bias", "LoraConfig", r=2, target_modules=Q, lora_bias=True),
    make_case("lora-bias-only", "llama-bias", "LoraConfig", r=2, target_modules=Q, bias="lora_only"),
    make_case("lora-bias-all", "bert", "LoraConfig", r=2, target_modules=["query"], bias="all"),
    make_case(
        "lora-modules-to-save",
        "bert-classifier",
        "LoraConfig",
        r=2,
        target_modules=["query"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    ),
    make_case("lora-lm-head-saved", "llama", "LoraConfig", r=2, target_modules=Q, modules_to_save=["lm_head"]),
    make_case("lora-tokens", "llama", "LoraConfig", r=2, target_modules=Q, trainable_token_indices=[1, 5]),
    make_case("lora-dora", "llama", "LoraConfig", r=2, target_modules=Q, use_dora=True),
    make_case("lora-pissa", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="pissa"),
    make_case("lora-olora", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="olora"),
    make_case("lora-orthogonal", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="orthogonal"),
    make_case("lora-kasa", "llama", "LoraConfig", r=2, target_modules=Q, kasa_config=KasaConfig()),
    make_case("lora-mica", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="mica"),
    make_case("lora-velora", "llama", "LoraConfig", r=2, target_modules=Q, velora_config=VeloraConfig(num_groups=4)),
    make_case(
        "lora-monteclora",
        "llama",
        "LoraConfig",
        r=2,
        target_modules=Q,
        monteclora_config=MontecloraConfig(num_samples=2, buffer_size=4),
    ),
    make_case(
        "lora-bdlora",
        "llama",
        "LoraConfig",
        r=2,
        target_modules=Q,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    ),
    make_case("lora-conv1d-gpt2", "gpt2", "LoraConfig", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    make_case(
        "lora-conv1d-gpt2-dora",
        "gpt2",
        "LoraConfig",
        r=2,
        target_modules=["attn.c_proj"],
        fan_in_fan_out=True,
        use_dora=True,
    ),
    make_case("lora-conv1d", "wav2vec2", "LoraConfig", r=2, target_modules=["conv_layers.1.conv"]),
    make_case("lora-conv1d-dora", "wav2vec2", "LoraConfig", r=2, target_modules=["conv_layers.1.conv"], use_dora=True),
    make_case("lora-conv2d", "resnet", "LoraConfig", r=2, target_modules=CONV),
    make_case("lora-conv2d-dora", "resnet", "LoraConfig", r=2, target_modules=CONV, use_dora=True),
    make_case(
        "lora-conv2d-bias-term", "convnext", "LoraConfig", r=2, target_modules=["patch_embeddings"], lora_bias=True
    ),
    make_case("lora-conv3d", "videomae", "LoraConfig", r=2, target_modules=["projection"]),
    make_case("lora-conv3d-dora", "videomae", "LoraConfig", r=2, target_modules=["projection"], use_dora=True),
    make_case("lora-embedding", "llama", "LoraConfig", r=2, target_modules=["embed_tokens"]),
    make_case("lora-embedding-dora", "llama", "LoraConfig", r=2, target_modules=["embed_tokens"], use_dora=True),
    make_case("lora-embedding-position", "bert", "LoraConfig", r=2, target_modules=["position_embeddings"]),
    make_case("lora-lm-head", "llama", "LoraConfig", r=2, target_modules=["lm_head"]),
    make_case("lora-experts", "mixtral", "LoraConfig", r=2, target_modules=[], target_parameters=EXPERTS),
    make_case("lora-experts-one", "mixtral", "LoraConfig", r=2, target_modules=[], target_parameters=EXPERTS[:1]),
    make_case("lora-experts-qwen", "qwen2-moe", "LoraConfig", r=2, target_modules=Q, target_parameters=EXPERTS),
    make_case(
        "lora-experts-one-by-one",
        "mixtral",
        "LoraConfig",
        r=2,
        target_modules=["w1", "w2", "w3"],
        state=_experts_one_by_one,
    ),
    make_case("lora-mha", "siglip", "LoraConfig", r=2, target_modules=["head.attention"]),
    make_case("lora-mha-bias-term", "siglip", "LoraConfig", r=2, target_modules=["head.attention"], lora_bias=True),
    make_case("lora-mha-linear", "siglip", "LoraConfig", r=2, target_modules=["q_proj"]),
    make_case("lora-t5", "t5", "LoraConfig", r=2, target_modules=["wo"]),
    make_case("lora-tied-linear", "llama-tied", "LoraConfig", r=2, target_modules=Q),
    make_case("lora-tied-tokens", "llama-tied", "LoraConfig", r=2, target_modules=Q, trainable_token_indices=[1, 5]),
    make_case("lora-tied-saved", "llama-tied", "LoraConfig", r=2, target_modules=Q, modules_to_save=["embed_tokens"]),
    make_case("lora-pissa-niter", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="pissa_niter_4"),
    make_case("lora-eva", "llama", "LoraConfig", r=2, target_modules=Q, init_lora_weights="eva"),
    make_case("lora-norm-saved", "bert", "LoraConfig", r=2, target_modules=["query"], modules_to_save=["LayerNorm"]),
    make_case("lora-parameter-2d", "llama", "LoraConfig", r=2, target_modules=[], target_parameters=["q_proj.weight"]),
)

LINEAR_CASES = (
    make_case("adalora-linear", "llama", "AdaLoraConfig", init_r=3, target_r=2, total_step=10, target_modules=Q),
    make_case("adalora-conv2d", "resnet", "AdaLoraConfig", init_r=3, target_r=2, total_step=10, target_modules=CONV),
    make_case("adamss-linear", "llama-bias", "AdamssConfig", r=4, num_subspaces=2, subspace_rank=1, target_modules=Q),
    make_case("boft-linear", "llama", "BOFTConfig", boft_block_size=4, target_modules=Q),
    make_case(
        "boft-factor", "llama-bias", "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2, target_modules=Q
    ),
    make_case("boft-conv2d", "resnet", "BOFTConfig", boft_block_size=4, target_modules=CONV),
    make_case("oft-linear", "llama", "OFTConfig", oft_block_size=4, target_modules=Q, use_cayley_neumann=False),
    make_case("oft-neumann", "llama", "OFTConfig", oft_block_size=4, target_modules=Q, use_cayley_neumann=True),
    make_case(
        "oft-share", "llama", "OFTConfig", oft_block_size=4, target_modules=Q, block_share=True, coft=True, eps=0.5
    ),
    make_case("oft-embedding", "llama", "OFTConfig", oft_block_size=4, target_modules=["embed_tokens"]),
    make_case("ia3-linear", "llama", "IA3Config", target_modules=Q, feedforward_modules=[]),
    make_case("ia3-bias", "llama-bias", "IA3Config", target_modules=Q, feedforward_modules=[]),
    make_case("ia3-feedforward", "llama", "IA3Config", target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    make_case(
        "ia3-conv1d-gpt2", "gpt2", "IA3Config", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
    ),
    make_case("ia3-conv2d", "resnet", "IA3Config", target_modules=CONV, feedforward_modules=[]),
    make_case("ia3-conv3d", "videomae", "IA3Config", target_modules=["projection"], feedforward_modules=[]),
    make_case("beft-linear", "llama-bias", "BeftConfig", target_modules=Q),
    make_case("loha-linear", "llama", "LoHaConfig", r=2, target_modules=Q),
    make_case("loha-conv1d", "wav2vec2", "LoHaConfig", r=2, target_modules=["conv_layers.1.conv"]),
    make_case("loha-conv2d", "resnet", "LoHaConfig", r=2, target_modules=CONV),
    make_case("loha-conv2d-effective", "resnet", "LoHaConfig", r=2, target_modules=CONV, use_effective_conv2d=True),
    make_case("lokr-linear", "llama", "LoKrConfig", r=2, target_modules=Q),
    make_case("lokr-both", "llama", "LoKrConfig", r=1, target_modules=Q, decompose_both=True),
    make_case("lokr-conv1d", "wav2vec2", "LoKrConfig", r=2, target_modules=["conv_layers.1.conv"]),
    make_case("lokr-conv2d", "resnet", "LoKrConfig", r=2, target_modules=CONV),
    make_case("ln-norm", "bert", "LNTuningConfig", target_modules=["attention.output.LayerNorm"]),
    make_case("ln-rmsnorm", "llama", "LNTuningConfig", target_modules=["input_layernorm"]),
    make_case("ln-linear", "llama-bias", "LNTuningConfig", target_modules=Q),
    make_case("vera-linear", "llama", "VeraConfig", r=4, target_modules=Q),
    make_case("vera-two", "llama", "VeraConfig", r=4, target_modules=["q_proj", "v_proj"], save_projection=False),
    make_case("vera-shapes", "llama", "VeraConfig", r=4, target_modules=["q_proj", "down_proj"]),
    make_case("pvera-linear", "llama", "PveraConfig", r=4, target_modules=Q),
    make_case("frod-linear", "llama", "FrodConfig", target_modules=Q, sparse_rate=0.2, progressbar=False),
    make_case("fourierft-linear", "llama", "FourierFTConfig", n_frequency=8, target_modules=Q),
    make_case("glora-lora", "llama-bias", "GloraConfig", r=2, target_modules=Q),
    make_case(
        "glora-vector",
        "llama-bias",
        "GloraConfig",
        r=2,
        target_modules=Q,
        config_A_B="vector",
        config_C="vector",
        config_D_E="vector",
    ),
    make_case(
        "glora-constant",
        "llama-bias",
        "GloraConfig",
        r=2,
        target_modules=Q,
        config_A_B="constant",
        config_C="none",
        config_D_E="constant",
    ),
    make_case("hra-linear", "llama", "HRAConfig", r=2, target_modules=Q),
    make_case("hra-gram-schmidt", "llama", "HRAConfig", r=2, target_modules=Q, apply_GS=True),
    make_case("hra-conv2d", "resnet", "HRAConfig", r=2, target_modules=CONV),
    make_case("vblora-linear", "llama", "VBLoRAConfig", r=2, num_vectors=6, vector_length=4, topk=2, target_modules=Q),
    make_case(
        "vblora-topk-only",
        "llama",
        "VBLoRAConfig",
        r=2,
        num_vectors=6,
        vector_length=4,
        topk=2,
        target_modules=Q,
        save_only_topk_weights=True,
    ),
    make_case(
        "vblora-shapes",
        "llama",
        "VBLoRAConfig",
        r=2,
        num_vectors=6,
        vector_length=8,
        topk=2,
        target_modules=["q_proj", "down_proj"],
    ),
    make_case(
        "unilora-shapes", "llama", "UniLoraConfig", r=2, theta_d_length=16, target_modules=["q_proj", "down_proj"]
    ),
    make_case("unilora-linear", "llama", "UniLoraConfig", r=2, theta_d_length=16, target_modules=Q),
    make_case("miss-linear", "llama", "MissConfig", r=4, target_modules=Q),
    make_case("miss-bat", "llama", "MissConfig", r=4, target_modules=Q, init_weights="bat"),
    make_case("miss-mini", "llama", "MissConfig", r=4, mini_r=4, target_modules=Q, init_weights="mini"),
    make_case("randlora-linear", "llama", "RandLoraConfig", r=4, target_modules=Q),
    make_case("randlora-shapes", "llama", "RandLoraConfig", r=4, target_modules=["q_proj", "down_proj"]),
    make_case("randlora-sparse", "llama", "RandLoraConfig", r=4, target_modules=Q, sparse=True),
    make_case("road-linear", "llama-bias", "RoadConfig", group_size=4, target_modules=Q),
    make_case("road-4", "llama", "RoadConfig", group_size=4, target_modules=Q, variant="road_4"),
    make_case(
        "trainable-tokens", "llama", "TrainableTokensConfig", token_indices=[1, 5], target_modules=["embed_tokens"]
    ),
    make_case("hira-linear", "llama", "HiraConfig", r=2, target_modules=Q),
    make_case("hira-conv1d-gpt2", "gpt2", "HiraConfig", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    make_case("hira-conv2d", "resnet", "HiraConfig", r=2, target_modules=CONV),
    make_case("hira-conv1d", "wav2vec2", "HiraConfig", r=2, target_modules=["conv_layers.1.conv"]),
    make_case("hira-conv3d", "videomae", "HiraConfig", r=2, target_modules=["projection"]),
    make_case("hira-embedding", "llama", "HiraConfig", r=2, target_modules=["embed_tokens"]),
    make_case("shira-linear", "llama", "ShiraConfig", r=1, target_modules=Q, random_seed=3),
    make_case("c3a-linear", "llama", "C3AConfig", block_size=4, target_modules=Q),
    make_case("waveft-linear", "llama", "WaveFTConfig", n_frequency=8, target_modules=Q),
    make_case("osf-linear", "llama", "OSFConfig", effective_rank=4, target_modules=Q),
    make_case("delora-linear", "llama", "DeloraConfig", r=2, target_modules=Q),
    make_case("gralora-linear", "llama", "GraloraConfig", r=4, gralora_k=2, target_modules=Q),
    make_case("gralora-hybrid", "llama", "GraloraConfig", r=4, hybrid_r=2, gralora_k=2, target_modules=Q),
    make_case("tinylora-linear", "llama", "TinyLoraConfig", r=2, u=4, target_modules=Q),
    make_case(
        "tinylora-tying", "llama", "TinyLoraConfig", r=2, u=4, target_modules=["q_proj", "down_proj"], weight_tying=1.0
    ),
    make_case("tinylora-embedding", "llama", "TinyLoraConfig", r=2, u=4, target_modules=["embed_tokens"]),
    make_case("psoft-linear", "llama", "PsoftConfig", r=4, target_modules=Q),
    make_case("psoft-neumann", "llama", "PsoftConfig", r=4, target_modules=Q, use_cayley_neumann=True),
    make_case("peanut-linear", "llama", "PeanutConfig", r=2, target_modules=Q),
    make_case("peanut-deep", "llama", "PeanutConfig", r=2, depth=2, target_modules=Q),
    make_case("supertuning-linear", "llama", "SupertuningConfig", sparsity=0.9, target_modules=Q),
    make_case("deft-linear", "llama", "DeftConfig", r=2, target_modules=Q),
    make_case("deft-qr", "llama", "DeftConfig", r=2, target_modules=Q, decomposition_method="qr"),
)
CASES = LORA_CASES + LINEAR_CASES


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# --- adapters ------------------------------------------------------------------------------------------------------


def save_adapter(case: Case, base: nn.Module, directory: Path, *, base_directory: Path | str = "") -> Path:
    """Puts the adapter on a copy of `base`, moves every tensor off its initial value, saves it like a trainer does."""
    torch.manual_seed(1)
    with quiet():
        config = case.config()
        config.base_model_name_or_path = str(base_directory)
        if case.state is None:
            get_peft_model(copy.deepcopy(base), config).save_pretrained(directory)
        else:
            config.save_pretrained(directory)
    write_tensors(directory, jitter(case.state() if case.state else load_file(directory / WEIGHTS)))
    return directory


def jitter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with seeded noise on every floating-point tensor; indices and masks stay."""
    generator = torch.Generator().manual_seed(7)
    moved = {}
    for name, tensor in sorted(state.items()):
        noise = torch.randn(tensor.shape, generator=generator) * 0.1
        moved[name] = (tensor + noise).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
    return moved


def write_tensors(directory: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def write_variant(source: Path, directory: Path, state: Mapping[str, Tensor]) -> Path:
    """The adapter of `source` with other tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    write_tensors(directory, state)
    return directory


# --- truth ---------------------------------------------------------------------------------------------------------


def load_adapter(base: nn.Module, directory: Path) -> PeftModel:
    """The adapter on a copy of `base`, loaded with PEFT's defaults."""
    torch.manual_seed(0)
    with quiet():
        return PeftModel.from_pretrained(copy.deepcopy(base), directory)


def merge(base: nn.Module, directory: Path, *, safe: bool = False) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that PEFT's own merge leaves, in its final dtype.

    `base` is not written. Raises what PEFT raises.
    """
    with torch.sparse.check_sparse_tensor_invariants():  # else PEFT writes where an index of the file points
        model = load_adapter(base, directory)
        with quiet():
            return values(model.merge_and_unload(safe_merge=safe))


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer; a quantised weight as the values it stands for, and its scales."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found |= {f"{prefix}{name}{suffix}": value for suffix, value in _plain(parameter).items()}
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}{name}"] = buffer
    return found


def _plain(parameter: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(parameter, bitsandbytes.nn.Params4bit):
        state = parameter.quant_state
        nested = {".nested": state.state2.absmax, ".offset": state.offset} if state.nested else {}
        return {"": bitsandbytes.functional.dequantize_4bit(parameter.data, state), ".absmax": state.absmax} | nested
    if isinstance(parameter, bitsandbytes.nn.Int8Params):
        return {"": parameter.data * parameter.SCB.view(-1, 1) / 127, ".SCB": parameter.SCB}
    return {"": parameter.data}


def nonfinite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit in value; NaN is equal to NaN."""
    return left.keys() == right.keys() and all(same_tensor(left[name], right[name]) for name in left)


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """As `same`, of one tensor."""
    return torch.equal(torch.isnan(left), torch.isnan(right)) and torch.equal(
        torch.nan_to_num(left), torch.nan_to_num(right)
    )
