"""Every way PEFT has of adapting a layer, each on a real transformers model that has such a layer.

In: nothing. Out: `BASES` (minuscule models, saved by `save_bases`), `CASES` (one per method, variant and kind of
layer, saved by `save_adapter`), and `truth`, which merges with plain PEFT and looks at the merged tensors itself.
May not know merge_gate: what stands here is what the gate is held against.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


_Build = Callable[[], nn.Module]


def _of(model: str, config: str, **settings: Any) -> _Build:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def _llama(**changes: Any) -> _Build:
    return _of("LlamaForCausalLM", "LlamaConfig", **DECODER | changes)


_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "tie_word_embeddings": False}
_EXPERTS = {"num_experts_per_tok": 1}
_QWEN2_MOE = _EXPERTS | {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_channels": 2}
_CONVNEXT = {"num_channels": 2, "patch_size": 2, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
_SIGLIP = VISION | {"image_size": 8, "patch_size": 4, "num_channels": 2}
_VIDEOMAE = VISION | {"image_size": 4, "patch_size": 2, "num_channels": 2, "num_frames": 2, "tubelet_size": 2}
_CONVOLUTIONS = {"conv_dim": [4, 4], "conv_stride": [2, 2], "conv_kernel": [3, 2], "num_feat_extract_layers": 2}
_WAV2VEC2 = TEXT | _CONVOLUTIONS | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

BASES: Mapping[str, _Build] = {
    "llama": _llama(),
    # weights of several times as many elements as the gate's fast way samples
    "llama-tall": _llama(hidden_size=128, intermediate_size=4096),
    "llama-bias": _llama(attention_bias=True, mlp_bias=True),
    "llama-tied": _llama(tie_word_embeddings=True),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=24, **_GPT2),
    # in float16 transformers keeps `wo` in float32: the final dtype is each tensor's own
    "t5": _of("T5ForConditionalGeneration", "T5Config", vocab_size=24, decoder_start_token_id=0, **_T5),
    "bert": _of("BertModel", "BertConfig", **TEXT),
    "bert-classifier": _of("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=3),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", **DECODER, **_EXPERTS, num_local_experts=2),
    "qwen2-moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **DECODER, **_QWEN2_MOE),
    "resnet": _of("ResNetModel", "ResNetConfig", **_RESNET),
    "convnext": _of("ConvNextModel", "ConvNextConfig", **_CONVNEXT),
    "siglip": _of("SiglipVisionModel", "SiglipVisionConfig", **_SIGLIP),
    "wav2vec2": _of("Wav2Vec2Model", "Wav2Vec2Config", **_WAV2VEC2),
    "videomae": _of("VideoMAEModel", "VideoMAEConfig", **_VIDEOMAE),
    # its head is tied to the embedding, and has a bias
    "xlm-roberta": _of("XLMRobertaForMaskedLM", "XLMRobertaConfig", **TEXT),
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


def _case(name: str, base: str, kind: str, targets: Any = ("q_proj",), **kwargs: Any) -> Case:
    return make_case(name, base, kind, target_modules=targets if targets == "all-linear" else list(targets), **kwargs)


def _lora(name: str, base: str = "llama", targets: Any = ("q_proj",), **kwargs: Any) -> Case:
    return _case(name, base, "LoraConfig", targets, r=2, **kwargs)


def _experts_one_by_one() -> dict[str, Tensor]:
    """A Mixtral adapter as transformers 4 wrote it: one pair of factors per expert and matrix."""
    state = {}
    for expert in range(2):
        for matrix, (rows, columns) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            name = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{matrix}"
            state[f"{name}.lora_A.weight"] = torch.zeros(2, columns)
            state[f"{name}.lora_B.weight"] = torch.zeros(rows, 2)
    return state


def _glora(a_to_e: str, c: str) -> dict[str, str]:
    return {"config_A_B": a_to_e, "config_C": c, "config_D_E": a_to_e}


CONV = ["layer.0.convolution"]
VBLORA = {"r": 2, "num_vectors": 6, "topk": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

LORA_CASES = (
    _lora("lora-linear", "llama", ["q_proj", "v_proj"]),
    _lora("lora-all-linear", "llama", "all-linear"),
    _lora("lora-tall", "llama-tall", ["up_proj", "gate_proj"]),
    _lora("lora-bert", "bert", ["query"]),
    _lora("lora-rslora", use_rslora=True, lora_alpha=4),
    _lora("lora-patterns", "llama", ["q_proj", "k_proj"], rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 5}),
    _lora("lora-bias-term", "llama-bias", lora_bias=True),
    _lora("lora-bias-only", "llama-bias", bias="lora_only"),
    _lora("lora-bias-all", "bert", ["query"], bias="all"),
    _lora("lora-modules-to-save", "bert-classifier", ["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    _lora("lora-lm-head-saved", modules_to_save=["lm_head"]),
    _lora("lora-tokens", trainable_token_indices=[1, 5]),
    _lora("lora-dora", use_dora=True),
    _lora("lora-pissa", init_lora_weights="pissa"),
    _lora("lora-olora", init_lora_weights="olora"),
    _lora("lora-orthogonal", init_lora_weights="orthogonal"),
    _lora("lora-kasa", kasa_config=KasaConfig()),
    _lora("lora-mica", init_lora_weights="mica"),
    _lora("lora-velora", velora_config=VeloraConfig(num_groups=4)),
    _lora("lora-monteclora", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=4)),
    _lora(
        "lora-bdlora",
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    ),
    _lora("lora-conv1d-gpt2", "gpt2", ["c_attn"], fan_in_fan_out=True),
    _lora("lora-conv1d-gpt2-dora", "gpt2", ["attn.c_proj"], fan_in_fan_out=True, use_dora=True),
    _lora("lora-conv1d", "wav2vec2", ["conv_layers.1.conv"]),
    _lora("lora-conv1d-dora", "wav2vec2", ["conv_layers.1.conv"], use_dora=True),
    _lora("lora-conv2d", "resnet", CONV),
    _lora("lora-conv2d-dora", "resnet", CONV, use_dora=True),
    _lora("lora-conv2d-bias-term", "convnext", ["patch_embeddings"], lora_bias=True),
    _lora("lora-conv3d", "videomae", ["projection"]),
    _lora("lora-conv3d-dora", "videomae", ["projection"], use_dora=True),
    _lora("lora-embedding", "llama", ["embed_tokens"]),
    _lora("lora-embedding-dora", "llama", ["embed_tokens"], use_dora=True),
    _lora("lora-embedding-position", "bert", ["position_embeddings"]),
    _lora("lora-lm-head", "llama", ["lm_head"]),
    _lora("lora-experts", "mixtral", [], target_parameters=EXPERTS),
    _lora("lora-experts-one", "mixtral", [], target_parameters=EXPERTS[:1]),
    _lora("lora-experts-qwen", "qwen2-moe", target_parameters=EXPERTS),
    _lora("lora-experts-one-by-one", "mixtral", ["w1", "w2", "w3"], state=_experts_one_by_one),
    _lora("lora-mha", "siglip", ["head.attention"]),
    _lora("lora-mha-bias-term", "siglip", ["head.attention"], lora_bias=True),
    _lora("lora-mha-linear", "siglip"),
    _lora("lora-t5", "t5", ["wo"]),
    _lora("lora-tied-linear", "llama-tied"),
    _lora("lora-tied-tokens", "llama-tied", trainable_token_indices=[1, 5]),
    _lora("lora-tied-saved", "llama-tied", modules_to_save=["embed_tokens"]),
    _lora("lora-pissa-niter", init_lora_weights="pissa_niter_4"),
    _lora("lora-eva", init_lora_weights="eva"),
    _lora("lora-norm-saved", "bert", ["query"], modules_to_save=["LayerNorm"]),
    _lora("lora-parameter-2d", "llama", [], target_parameters=["q_proj.weight"]),
)

LINEAR_CASES = (
    _case("adalora-linear", "llama", "AdaLoraConfig", init_r=3, target_r=2, total_step=10),
    _case("adalora-conv2d", "resnet", "AdaLoraConfig", CONV, init_r=3, target_r=2, total_step=10),
    _case("adamss-linear", "llama-bias", "AdamssConfig", r=4, num_subspaces=2, subspace_rank=1),
    _case("boft-linear", "llama", "BOFTConfig", boft_block_size=4),
    _case("boft-factor", "llama-bias", "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2),
    _case("boft-conv2d", "resnet", "BOFTConfig", CONV, boft_block_size=4),
    _case("oft-linear", "llama", "OFTConfig", oft_block_size=4, use_cayley_neumann=False),
    _case("oft-neumann", "llama", "OFTConfig", oft_block_size=4, use_cayley_neumann=True),
    _case("oft-share", "llama", "OFTConfig", oft_block_size=4, block_share=True, coft=True, eps=0.5),
    _case("oft-embedding", "llama", "OFTConfig", ["embed_tokens"], oft_block_size=4),
    _case("ia3-linear", "llama", "IA3Config", feedforward_modules=[]),
    _case("ia3-bias", "llama-bias", "IA3Config", feedforward_modules=[]),
    _case("ia3-feedforward", "llama", "IA3Config", ["down_proj"], feedforward_modules=["down_proj"]),
    _case("ia3-conv1d-gpt2", "gpt2", "IA3Config", ["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    _case("ia3-conv2d", "resnet", "IA3Config", CONV, feedforward_modules=[]),
    _case("ia3-conv3d", "videomae", "IA3Config", ["projection"], feedforward_modules=[]),
    _case("beft-linear", "llama-bias", "BeftConfig"),
    _case("loha-linear", "llama", "LoHaConfig", r=2),
    _case("loha-conv1d", "wav2vec2", "LoHaConfig", ["conv_layers.1.conv"], r=2),
    _case("loha-conv2d", "resnet", "LoHaConfig", CONV, r=2),
    _case("loha-conv2d-effective", "resnet", "LoHaConfig", CONV, r=2, use_effective_conv2d=True),
    _case("lokr-linear", "llama", "LoKrConfig", r=2),
    _case("lokr-both", "llama", "LoKrConfig", r=1, decompose_both=True),
    _case("lokr-conv1d", "wav2vec2", "LoKrConfig", ["conv_layers.1.conv"], r=2),
    _case("lokr-conv2d", "resnet", "LoKrConfig", CONV, r=2),
    _case("ln-norm", "bert", "LNTuningConfig", ["attention.output.LayerNorm"]),
    _case("ln-rmsnorm", "llama", "LNTuningConfig", ["input_layernorm"]),
    _case("ln-linear", "llama-bias", "LNTuningConfig"),
    _case("vera-linear", "llama", "VeraConfig", r=4),
    _case("vera-two", "llama", "VeraConfig", ["q_proj", "v_proj"], r=4, save_projection=False),
    _case("vera-shapes", "llama", "VeraConfig", ["q_proj", "down_proj"], r=4),
    _case("pvera-linear", "llama", "PveraConfig", r=4),
    _case("frod-linear", "llama", "FrodConfig", sparse_rate=0.2, progressbar=False),
    _case("fourierft-linear", "llama", "FourierFTConfig", n_frequency=8),
    _case("glora-lora", "llama-bias", "GloraConfig", r=2),
    _case("glora-vector", "llama-bias", "GloraConfig", r=2, **_glora("vector", "vector")),
    _case("glora-constant", "llama-bias", "GloraConfig", r=2, **_glora("constant", "none")),
    _case("hra-linear", "llama", "HRAConfig", r=2),
    _case("hra-gram-schmidt", "llama", "HRAConfig", r=2, apply_GS=True),
    _case("hra-conv2d", "resnet", "HRAConfig", CONV, r=2),
    _case("vblora-linear", "llama", "VBLoRAConfig", **VBLORA, vector_length=4),
    _case("vblora-topk-only", "llama", "VBLoRAConfig", **VBLORA, vector_length=4, save_only_topk_weights=True),
    _case("vblora-shapes", "llama", "VBLoRAConfig", ["q_proj", "down_proj"], **VBLORA, vector_length=8),
    _case("unilora-shapes", "llama", "UniLoraConfig", ["q_proj", "down_proj"], r=2, theta_d_length=16),
    _case("unilora-linear", "llama", "UniLoraConfig", r=2, theta_d_length=16),
    _case("miss-linear", "llama", "MissConfig", r=4),
    _case("miss-bat", "llama", "MissConfig", r=4, init_weights="bat"),
    _case("miss-mini", "llama", "MissConfig", r=4, mini_r=4, init_weights="mini"),
    _case("randlora-linear", "llama", "RandLoraConfig", r=4),
    _case("randlora-shapes", "llama", "RandLoraConfig", ["q_proj", "down_proj"], r=4),
    _case("randlora-sparse", "llama", "RandLoraConfig", r=4, sparse=True),
    _case("road-linear", "llama-bias", "RoadConfig", group_size=4),
    _case("road-4", "llama", "RoadConfig", group_size=4, variant="road_4"),
    _case("trainable-tokens", "llama", "TrainableTokensConfig", ["embed_tokens"], token_indices=[1, 5]),
    _case("hira-linear", "llama", "HiraConfig", r=2),
    _case("hira-conv1d-gpt2", "gpt2", "HiraConfig", ["c_attn"], r=2, fan_in_fan_out=True),
    _case("hira-conv2d", "resnet", "HiraConfig", CONV, r=2),
    _case("hira-conv1d", "wav2vec2", "HiraConfig", ["conv_layers.1.conv"], r=2),
    _case("hira-conv3d", "videomae", "HiraConfig", ["projection"], r=2),
    _case("hira-embedding", "llama", "HiraConfig", ["embed_tokens"], r=2),
    _case("shira-linear", "llama", "ShiraConfig", r=1, random_seed=3),
    _case("c3a-linear", "llama", "C3AConfig", block_size=4),
    _case("waveft-linear", "llama", "WaveFTConfig", n_frequency=8),
    _case("osf-linear", "llama", "OSFConfig", effective_rank=4),
    _case("delora-linear", "llama", "DeloraConfig", r=2),
    _case("gralora-linear", "llama", "GraloraConfig", r=4, gralora_k=2),
    _case("gralora-hybrid", "llama", "GraloraConfig", r=4, hybrid_r=2, gralora_k=2),
    _case("tinylora-linear", "llama", "TinyLoraConfig", r=2, u=4),
    _case("tinylora-tying", "llama", "TinyLoraConfig", ["q_proj", "down_proj"], r=2, u=4, weight_tying=1.0),
    _case("tinylora-embedding", "llama", "TinyLoraConfig", ["embed_tokens"], r=2, u=4),
    _case("psoft-linear", "llama", "PsoftConfig", r=4),
    _case("psoft-neumann", "llama", "PsoftConfig", r=4, use_cayley_neumann=True),
    _case("peanut-linear", "llama", "PeanutConfig", r=2),
    _case("peanut-deep", "llama", "PeanutConfig", r=2, depth=2),
    _case("supertuning-linear", "llama", "SupertuningConfig", sparsity=0.9),
    _case("deft-linear", "llama", "DeftConfig", r=2),
    _case("deft-qr", "llama", "DeftConfig", r=2, decomposition_method="qr"),
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
