"""Bases written tensor by tensor, whose true weights are known exactly, and adapters on them.

In: what a case wants. Out: `Draft`, and its directory on disk; `Case`. Every weight is a small code times a power of
two, so that each format stores it without rounding, and what a loader returns is either the truth or wrong.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors.torch import save

Tensors = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1. bfloat16, float16 and float8 hold them too, and int8 holds twice each."""
STEP = 2.0**-4
"""What a code of `FP4` is multiplied by."""

HIDDEN, HEAD, INNER, VOCABULARY, LAYERS = 32, 8, 64, 48, 2
Q_PROJ = "model.layers.0.self_attn.q_proj"
O_PROJ = "model.layers.1.self_attn.o_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"


def codes(name: str, shape: Iterable[int], values: Iterable[float] = FP4) -> torch.Tensor:
    """Seeded by the name: no two tensors are alike."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    table = torch.tensor(tuple(values), dtype=torch.float64)
    return table[torch.randint(len(table), tuple(shape), generator=generator)]


@dataclass(kw_only=True)
class Draft:
    """A base before it is written. `truth` has its weights by the names of the model, `stored` what its files hold.

    `shards` maps a file to the names in it (by default `model.safetensors` holds all). `listed` is the index's map of
    names to files. `files` are written as they are, last. `linked`: as the Hub's cache has it, links into `blobs`.
    """

    config: dict[str, Any]
    truth: Tensors
    stored: Tensors
    shards: dict[str, list[str]] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    linked: bool = False

    # --- what a case does to it ---

    def without(self, *names: str) -> Self:
        """The files lack these."""
        for name in names:
            del self.stored[name]
        return self

    def plus(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The files have these as well."""
        self.stored.update(tensors)
        return self

    def renamed(self, old: str, new: str) -> Self:
        self.stored = {name.replace(old, new): tensor for name, tensor in self.stored.items()}
        return self

    def configured(self, **changes: Any) -> Self:
        self.config.update(changes)
        return self

    def declared(self, quantization: Mapping[str, Any], **changes: Any) -> Self:
        return self.configured(quantization_config=dict(quantization) | changes)

    def with_files(self, files: Mapping[str, bytes]) -> Self:
        self.files.update(files)
        return self

    def with_json(self, name: str, content: Mapping[str, Any]) -> Self:
        return self.with_files({name: json.dumps(content).encode()})

    def as_links(self) -> Self:
        self.linked = True
        return self

    def packed(self, pack: Callable[[str, torch.Tensor], Tensors], *, only: str = "_proj.weight") -> Self:
        """Every linear layer's weight gives way to what `pack` makes of its name (without `.weight`) and values."""
        for name in [name for name in self.stored if name.endswith(only)]:
            del self.stored[name]
            self.stored.update(pack(name.removesuffix(".weight"), self.truth[name]))
        return self

    def sharded(self, count: int = 2, pattern: str = "model-{number:05d}-of-{count:05d}.safetensors") -> Self:
        names = sorted(self.stored)
        self.shards = {
            pattern.format(number=number + 1, at=number, count=count): names[number::count] for number in range(count)
        }
        self.listed = {name: file for file, names in self.shards.items() for name in names}
        return self

    # --- on disk ---

    def write(self, directory: Path) -> None:
        shards = self.shards or ({WEIGHTS: list(self.stored)} if self.stored else {})
        content = {"config.json": json.dumps(self.config, indent=1).encode()}
        for file, names in shards.items():
            content[file] = save({name: self.stored[name].contiguous() for name in names}, {"format": "pt"})
        if self.listed:
            content[INDEX] = json.dumps({"metadata": {}, "weight_map": self.listed}).encode()
        for name, data in (content | self.files).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.linked:
                self._link(path, data, directory)
            else:
                path.write_bytes(data)

    @staticmethod
    def _link(path: Path, data: bytes, directory: Path) -> None:
        blob = directory.parent.parent / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        path.symlink_to(blob)


# --- models ----------------------------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HIDDEN // HEAD,
    "max_position_embeddings": 32,
}
DECODER = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}
EXPERTS = DECODER | {"num_local_experts": 2}


def llama(
    *, dtype: torch.dtype = torch.bfloat16, values: Iterable[float] = FP4, step: float = STEP, **changes: Any
) -> Draft:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
    config = kind | DECODER | {"num_hidden_layers": LAYERS} | changes
    inner, hidden, key = config["intermediate_size"], HIDDEN, config["num_key_value_heads"] * HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    truth = {name: codes(name, shape, values) * step for name, shape in shapes.items()}
    return Draft(config=config, truth=truth, stored={name: tensor.to(dtype) for name, tensor in truth.items()})


def of_class(model_type: str, class_name: str, **kind: Any) -> Draft:
    """A base of any other model type: names and shapes are those of transformers' own class, on the meta device."""
    import transformers  # noqa: PLC0415 - few cases need it

    with torch.device("meta"):
        model = getattr(transformers, class_name)(transformers.AutoConfig.for_model(model_type, **kind))
    tied = set(model.all_tied_weights_keys)
    truth = {name: codes(name, one.shape) * STEP for name, one in model.named_parameters() if name not in tied}
    config = {"architectures": [class_name], "model_type": model_type, "dtype": "bfloat16"} | kind
    return Draft(config=config, truth=truth, stored={name: tensor.bfloat16() for name, tensor in truth.items()})


def bert(class_name: str = "BertModel") -> Draft:
    return of_class("bert", class_name, **SIZES)


def mixtral() -> Draft:
    """As its files have been since transformers 4: one module for each expert. Transformers 5 stacks them."""
    draft = of_class("mixtral", "MixtralForCausalLM", **EXPERTS)
    for name in [name for name in draft.stored if ".mlp." in name]:
        tensor = draft.stored.pop(name)
        prefix, _, rest = name.replace(".mlp.", ".block_sparse_moe.").partition("experts.")
        for expert, matrix in enumerate(tensor if rest else ()):
            parts = {"w1": matrix[:INNER], "w3": matrix[INNER:]} if "gate_up" in rest else {"w2": matrix}
            draft.plus({f"{prefix}experts.{expert}.{part}.weight": values.clone() for part, values in parts.items()})
        if not rest:
            draft.stored[prefix] = tensor
    return draft


def gpt_oss() -> Draft:
    sizes = {"intermediate_size": 32, "head_dim": HEAD, "num_experts_per_tok": 1}
    return of_class("gpt_oss", "GptOssForCausalLM", **EXPERTS | sizes)


def qwen3_5() -> Draft:
    """Text alone: a layer of linear attention and one of full attention."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": HEAD}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": HEAD}
    sizes = DECODER | linear | layers | {"linear_value_head_dim": HEAD}
    return of_class("qwen3_5_text", "Qwen3_5ForCausalLM", **sizes)


# --- formats ---------------------------------------------------------------------------------------------------------


def _int4(values: torch.Tensor) -> torch.Tensor:
    """Twice the values, which are whole, as 4 bits with a zero point of 8; those of FP4 that do not fit are cut."""
    return (values / STEP * 2).clamp(-8, 7).to(torch.int64) + 8


def _in_int32(nibbles: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit numbers of the last dimension in each int32, the first one lowest."""
    parts = nibbles.reshape(*nibbles.shape[:-1], -1, 8)
    packed = sum(parts[..., place] << (4 * place) for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _of(columns: int, value: float, rows: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full((rows, columns), value, dtype=dtype)


def gptq(name: str, values: torch.Tensor) -> Tensors:
    """Symmetric, 4 bits, groups of 32."""
    out, inputs = values.shape
    return {
        f"{name}.qweight": _in_int32(_int4(values)).T.contiguous(),
        f"{name}.qzeros": _in_int32(torch.full((inputs // 32, out), 7, dtype=torch.int64)),  # stored one less
        f"{name}.scales": _of(out, STEP / 2, inputs // 32),
        f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // 32,
    }


def awq(name: str, values: torch.Tensor) -> Tensors:
    out, inputs = values.shape
    return {
        f"{name}.qweight": _in_int32(_int4(values).T),
        f"{name}.qzeros": _in_int32(torch.full((inputs // 32, out), 8, dtype=torch.int64)),
        f"{name}.scales": _of(out, STEP / 2, inputs // 32),
    }


def exl2(name: str, values: torch.Tensor) -> Tensors:
    out, inputs = values.shape
    return {
        f"{name}.q_weight": _in_int32(_int4(values)).T.contiguous(),
        f"{name}.q_scale": torch.zeros(1, out // 8, dtype=torch.int32),
        f"{name}.q_scale_max": torch.full((1,), STEP, dtype=torch.float16),
        f"{name}.q_groups": torch.zeros(2, dtype=torch.int16),
        f"{name}.q_invperm": torch.arange(inputs, dtype=torch.int16),
    }


def quanto(name: str, values: torch.Tensor) -> Tensors:
    """As quanto's own `save_pretrained` writes it."""
    return {
        f"{name}.weight._data": (values / STEP * 2).to(torch.int8),
        f"{name}.weight._scale": _of(1, STEP / 2, len(values), torch.bfloat16),
        f"{name}.input_scale": torch.ones(1, dtype=torch.bfloat16),
        f"{name}.output_scale": torch.ones(1, dtype=torch.bfloat16),
    }


def w4a16(name: str, values: torch.Tensor) -> Tensors:
    """`pack-quantized` of compressed-tensors."""
    return {
        f"{name}.weight_packed": _in_int32(_int4(values)),
        f"{name}.weight_scale": _of(values.shape[1] // 32, STEP / 2, len(values), torch.bfloat16),
        f"{name}.weight_shape": torch.tensor(values.shape, dtype=torch.int64),
    }


def float8(values: torch.Tensor) -> torch.Tensor:
    return (values / STEP * 32).to(torch.float8_e4m3fn)  # 192 at most, of 448


FLOAT8_SCALE = STEP / 32


def fp8_blocks(rows: int = 16, columns: int = 16) -> Callable[[str, torch.Tensor], Tensors]:
    """As DeepSeek-V3 stores it. The last block of rows may be smaller."""

    def pack(name: str, values: torch.Tensor) -> Tensors:
        grid = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
        shifts = codes(f"{name}.scale", grid, (1, 2, 4, 8)).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        shifts = shifts[: values.shape[0], : values.shape[1]]
        return {
            f"{name}.weight": float8(values / shifts),
            f"{name}.weight_scale_inv": (shifts[::rows, ::columns] * FLOAT8_SCALE).to(torch.float32),
        }

    return pack


def fp8_tensor(name: str, values: torch.Tensor) -> Tensors:
    """One scale for a weight, and one for its inputs, as AutoFP8 and ModelOpt store them."""
    return {
        f"{name}.weight": float8(values),
        f"{name}.weight_scale": torch.tensor(FLOAT8_SCALE),
        f"{name}.input_scale": torch.tensor(0.125),
    }


def fp8_channel(name: str, values: torch.Tensor) -> Tensors:
    """One scale for each row, as compressed-tensors stores it."""
    return {f"{name}.weight": float8(values), f"{name}.weight_scale": _of(1, FLOAT8_SCALE, len(values), torch.bfloat16)}


def int8_channel(name: str, values: torch.Tensor) -> Tensors:
    scale = _of(1, STEP / 2, len(values), torch.bfloat16)
    return {f"{name}.weight": (values / STEP * 2).to(torch.int8), f"{name}.weight_scale": scale}


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(FP4, dtype=torch.float64)
    index = (values.unsqueeze(-1) == table).to(torch.uint8).argmax(-1).to(torch.uint8)
    pairs = index.reshape(*index.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def nvfp4(name: str, values: torch.Tensor) -> Tensors:
    scales = torch.ones(len(values), values.shape[1] // 16).to(torch.float8_e4m3fn)
    return {
        f"{name}.weight": _nibbles(values / STEP),
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": torch.tensor(STEP),
        f"{name}.input_scale": torch.tensor(0.125),
    }


def mxfp4(name: str, values: torch.Tensor) -> Tensors:
    """The experts of GPT-OSS: blocks of 32 values along the inputs, and the exponents of their scales."""
    rows = values.transpose(1, 2) / STEP  # experts, outputs, inputs
    blocks = _nibbles(rows).reshape(*rows.shape[:2], -1, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 127 - 4, dtype=torch.uint8)}


def bitnet(name: str, values: torch.Tensor) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(len(values) // 4, values.shape[1], dtype=torch.uint8),
        f"{name}.weight_scale": torch.tensor([STEP], dtype=torch.bfloat16),
    }


def hqq(name: str, values: torch.Tensor) -> Tensors:
    return {
        f"{name}.W_q": _int4(values).to(torch.uint8),
        f"{name}.scale": _of(1, STEP / 2, len(values)),
        f"{name}.zero": _of(1, 8, len(values)),
        f"{name}.axis": torch.tensor(1),
        f"{name}.nbits": torch.tensor(4),
    }


def torchao(name: str, values: torch.Tensor) -> Tensors:
    return {
        f"{name}._weight_qdata": (values / STEP * 2).to(torch.int8),
        f"{name}._weight_scale": _of(1, STEP / 2, len(values), torch.bfloat16),
    }


def bnb_8bit(name: str, values: torch.Tensor) -> Tensors:
    return {
        f"{name}.weight": (values / STEP * 2).to(torch.int8),
        f"{name}.SCB": torch.full((len(values),), 127 * STEP / 2, dtype=torch.float32),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


TERNARY = (-1.0, 0.0, 1.0)
"""The values that NF4 holds exactly."""


def bnb_4bit(*, nested: bool = False, kind: str = "nf4") -> Callable[[str, torch.Tensor], Tensors]:
    """Of ternary values. bitsandbytes' own packing: its state is a JSON document in bytes."""

    def pack(name: str, values: torch.Tensor) -> Tensors:
        from bitsandbytes import functional  # noqa: PLC0415 - few cases need it

        packed, state = functional.quantize_4bit(
            values.to(torch.bfloat16), blocksize=64, quant_type=kind, compress_statistics=nested
        )
        parts = {f"{name}.weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        return {f"{name}.weight": packed} | parts

    return pack


def compressed(name: str, **weights: Any) -> dict[str, Any]:
    """The declaration of one format of compressed-tensors, for all linear layers but the head."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
BNB_8BIT_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
BNB_4BIT_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["lm_head"],
}


# --- adapters --------------------------------------------------------------------------------------------------------


def write_adapter(
    directory: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    task_type: str = "CAUSAL_LM",
    saved: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """A LoRA of rank 2 on modules of these sizes (outputs, inputs); `saved` are whole tensors."""
    directory.mkdir(parents=True)
    tensors: Tensors = {}
    for name, (outputs, inputs) in modules.items():
        for part, shape in {"lora_A": (2, inputs), "lora_B": (outputs, 2)}.items():
            key = f"base_model.model.{name}.{part}.weight"
            tensors[key] = (codes(key, shape, (-1, -0.5, 0.5, 1)) * 0.25).to(torch.float32)
    for name, shape in saved.items():
        tensors[f"base_model.model.{name}"] = (codes(name, shape) * STEP).to(torch.float32)
    (directory / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "task_type": task_type, "r": 2, "lora_alpha": 2, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))


_Q_AND_V = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (2 * HEAD, HIDDEN)}
_BERT = {f"encoder.layer.0.attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "value")}


def _attention(layers: int = LAYERS, body: str = "model") -> dict[str, tuple[int, int]]:
    return {f"{body}.layers.{layer}.self_attn.{name}": _Q_AND_V[name] for layer in range(layers) for name in _Q_AND_V}


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "llama": lambda path: write_adapter(path, _attention()),
    "one-layer": lambda path: write_adapter(path, _attention(1)),
    "second-layer": lambda path: write_adapter(path, {"model.layers.1.self_attn.v_proj": _Q_AND_V["v_proj"]}),
    "foreign-prefix": lambda path: write_adapter(path, _attention(body="transformer")),
    "language-model": lambda path: write_adapter(path, _attention(body="model.language_model")),
    "bert": lambda path: write_adapter(path, _BERT, task_type="FEATURE_EXTRACTION"),
    "bert-classifier": lambda path: write_adapter(
        path,
        {f"bert.{name}": size for name, size in _BERT.items()},
        task_type="SEQ_CLS",
        saved={"classifier.weight": (2, HIDDEN), "classifier.bias": (2,)},
    ),
    "classifier": lambda path: write_adapter(
        path, _attention(), task_type="SEQ_CLS", saved={"score.weight": (2, HIDDEN)}
    ),
}


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base, an adapter on it, and what the gate must say of the two.

    `cause` is the check that decides (or those of which one must), None if the adapter must pass. Each of `names` is in
    the message or the hint of the cause, each of `notes` in a note. `asked` is what the config asks of the base.
    `dtype` and `quantization` are what the report must state.
    """

    name: str
    draft: Callable[[], Draft]
    cause: str | tuple[str, ...] | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)
    adapter: str = "llama"
    dtype: str | None = None
    quantization: str | None = None


def by_name(*cases: Case) -> dict[str, Case]:
    table = {case.name: case for case in cases}
    assert len(table) == len(cases), "a name twice"
    return table
