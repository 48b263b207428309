"""Finished models, right and wrong, made by PEFT or by hand: what `merge-gate verify` has to name.

In: a `Scene`, which makes each base, adapter, and merge once. Out: `RIGHT` and `WRONG`, recipes that each write one
directory. It does not know merge_gate: the names are facts about how a directory was made.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.support.models import (
    VARIANTS,
    Shelf,
    Tensors,
    load_for_training,
    make_adapter,
    read_config,
    read_tensors,
    write_config,
)
from tests.support.verify.file_changes import Change, added, both, edited, removed

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
VARIANT = "bfloat16-base"
MTP = {f"mtp.layers.0.{name}.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "norm", "head")}


# --- reading and writing ---------------------------------------------------------------------------------------------


def weights_of(directory: Path) -> Tensors:
    """All tensors of the files that the index names, or of the one file."""
    if (directory / WEIGHTS).exists():
        return load_file(directory / WEIGHTS)
    files = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in sorted(files) for name, tensor in load_file(directory / file).items()}


def write_weights(directory: Path, tensors: Tensors) -> None:
    """The tensors in one file, and no others."""
    for old in directory.glob("*.safetensors"):
        old.unlink()
    (directory / INDEX).unlink(missing_ok=True)
    save_file({name: one.contiguous().clone() for name, one in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def write_shards(directory: Path, tensors: Tensors, count: int = 2) -> None:
    """The tensors in several files with an index."""
    for old in directory.glob("*.safetensors"):
        old.unlink()
    names, shard_of = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name].contiguous().clone() for name in names[number::count]}
        save_file(part, directory / file, {"format": "pt"})
        shard_of |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


# --- the scene -------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """Bases, adapters, and merges of one session. What it hands out is shared: copy before editing."""

    shelf: Shelf
    root: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._made:
            directory = self.root / name
            make(directory)
            self._made[name] = directory
        return self._made[name]

    def base(self, variant: str) -> Path:
        return self.shelf.base(VARIANTS[variant].base)

    def adapter(self, variant: str) -> Path:
        return self.shelf.adapter(variant)

    def merge(self, variant: str, **how: Any) -> Path:
        """PEFT's merge of a variant into its base."""
        name = "-".join(["merge", variant, *(f"{key}-{value}".rpartition(".")[2] for key, value in how.items())])
        return self.once(name, lambda out: peft_merge(self.base(variant), self.adapter(variant), out, **how))


def peft_merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: Any = "auto",
    safe_merge: bool = True,
    max_shard_size: str = "1GB",
    autocast: bool = True,
    times: int = 1,
) -> None:
    """What most scripts do: load, merge, save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name, settings = adapter.name, {"num_labels": 6} if adapter.name == "six-labels" else {}
        model = load_for_training(base, read_config(adapter).get("task_type"), dtype=dtype, **settings)
        if name.startswith("resized"):
            model.resize_token_embeddings(VARIANTS[name].save["rows"], mean_resizing=False)
        for _ in range(times):
            wrapped = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=autocast)
            model = wrapped.merge_and_unload(safe_merge=safe_merge)
        model.save_pretrained(out, max_shard_size=max_shard_size)


def deltas(adapter: Path, scaling: float | None = None) -> Tensors:
    """B @ A of each layer of a LoRA adapter, in float32, under the name of the base's weight."""
    config, tensors = read_config(adapter), read_tensors(adapter)
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    factor = config["lora_alpha"] / divisor if scaling is None else scaling
    found: Tensors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{path}.weight"] = b.float() @ a.float() * factor
    return found


def by_hand(
    base: Path, adapter: Path, out: Path, *, factor: float = 1.0, scaling: float | None = None, part: str = ""
) -> None:
    """The base's own files, with a delta added in float32 and rounded once. `part` selects layers."""
    shutil.copytree(base, out)
    tensors = weights_of(base)
    for name, delta in deltas(adapter, scaling).items():
        if part in name:
            tensors[name] = (tensors[name].float() + factor * delta).to(tensors[name].dtype)
    write_weights(out, tensors)


SHARD, BODY, F16 = "model-00001-of-00002.safetensors", "feature-extraction", "float16-base"
POSITIONS = {"embeddings.position_ids": torch.arange(32)[None]}
MASKS = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool) for layer in range(2)}
FREQUENCIES = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
"""Buffers that earlier releases of transformers stored, and that it now computes."""


def _with_buffers(name: str, variant: str, buffers: Tensors) -> Callable[[Scene], Path]:
    """A variant's base as an earlier release of transformers has saved it."""

    def make(scene: Scene, out: Path) -> None:
        _copy(scene.base(variant), out)
        write_weights(out, weights_of(out) | buffers)

    return lambda scene: scene.once(f"base of {name}", lambda out: make(scene, out))


@dataclass(frozen=True)
class Recipe:
    """A finished directory: `kind` names what it is, `also` the other findings.

    `base` and `adapter` replace those of the variant.
    """

    name: str
    kind: str
    make: Callable[[Scene, Path], None]
    variant: str = VARIANT
    also: tuple[str, ...] = ()
    base: Callable[[Scene], Path] | None = None
    adapter: Callable[[Scene], Path] | None = None
    candidates: Callable[[Scene], tuple[Path, ...]] = lambda _: ()

    def base_of(self, scene: Scene) -> Path:
        return self.base(scene) if self.base is not None else scene.base(self.variant)

    def adapter_of(self, scene: Scene) -> Path:
        return self.adapter(scene) if self.adapter is not None else scene.adapter(self.variant)

    def __str__(self) -> str:
        return self.name


def _of_buffers(name: str, kind: str, variant: str, buffers: Tensors, carried: Tensors | None = None) -> Recipe:
    """PEFT's merge into such a base, with these tensors added to what transformers saves."""
    base = _with_buffers(name, variant, buffers)

    def make(scene: Scene, out: Path) -> None:
        peft_merge(base(scene), scene.adapter(variant), out)
        saved = weights_of(out)
        assert saved.keys().isdisjoint(buffers)
        write_weights(out, saved | (carried or {}))

    return Recipe(name, kind, make, variant, base=base)


# --- recipes ---------------------------------------------------------------------------------------------------------


def _merged(variant: str, **how: Any) -> Callable[[Scene, Path], None]:
    return lambda scene, out: _copy(scene.merge(variant, **how), out)


def _copy(source: Path, out: Path) -> None:
    shutil.copytree(source, out, dirs_exist_ok=True)


def _changed(source: Callable[[Scene], Path], change: Change) -> Callable[[Scene, Path], None]:
    def make(scene: Scene, out: Path) -> None:
        _copy(source(scene), out)
        change(out)

    return make


def on_tensors(change: Callable[[Tensors], Tensors]) -> Change:
    return lambda out: write_weights(out, change(weights_of(out)))


def _hand(variant: str = VARIANT, **how: Any) -> Callable[[Scene, Path], None]:
    return lambda scene, out: by_hand(scene.base(variant), scene.adapter(variant), out, **how)


def _tensors(name: str, kind: str, change: Callable[[Tensors], Tensors], variant: str = VARIANT) -> Recipe:
    """PEFT's merge with some tensors changed."""
    return _files(name, kind, on_tensors(change), variant)


def _files(name: str, kind: str, change: Change, variant: str = VARIANT, also: tuple[str, ...] = ()) -> Recipe:
    """PEFT's merge with some files changed."""
    return Recipe(name, kind, _changed(lambda scene: scene.merge(variant), change), variant, also)


# --- a base with a tokenizer, a chat template, and MTP heads ---------------------------------------------------------

TOKENS = {f"t{number}": number for number in range(60)} | {"<s>": 60, "</s>": 61, "<end>": 62, "<unk>": 63}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def dressed(base: Path, out: Path) -> None:
    """A base with all that a model directory has."""
    _copy(base, out)
    tensors = weights_of(base)
    generator = torch.Generator().manual_seed(5)
    mtp = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in MTP.items()}
    write_weights(out, tensors | mtp)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 62, "content": "<end>", "special": True} | FLAGS],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<unk>"},
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    edited("tokenizer_config.json", eos_token="</s>", bos_token="<s>", chat_template=TEMPLATE)(out)
    edited("generation_config.json", eos_token_id=[61, 62], bos_token_id=60)(out)


def _dressed_base(scene: Scene) -> Path:
    return scene.once("dressed", lambda out: dressed(scene.base(VARIANT), out))


def _dressed_merge(scene: Scene) -> Path:
    def make(out: Path) -> None:
        base = _dressed_base(scene)
        by_hand(base, scene.adapter(VARIANT), out)
        tensors = weights_of(base) | weights_of(scene.merge(VARIANT))
        write_weights(out, tensors)

    return scene.once("dressed-merge", make)


def _of_dressed(name: str, kind: str, change: Change, *also: str) -> Recipe:
    return Recipe(name, kind, _changed(_dressed_merge, change), base=_dressed_base, also=also)


def _resaved(out: Path) -> None:
    """As transformers writes the same tokenizer: with its defaults, and the template in a file of its own."""
    AutoTokenizer.from_pretrained(out).save_pretrained(out)
    assert (out / "chat_template.jinja").read_text() == TEMPLATE


def _other_vocabulary(out: Path) -> None:
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"t3": 4, "t4": 3}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))


# --- bases and adapters of their own ---------------------------------------------------------------------------------


def _other_adapter(scene: Scene) -> Path:
    return scene.once("another", lambda out: make_adapter(scene.base(VARIANT), out, seed=9))


def _merge_of_another(scene: Scene, out: Path) -> None:
    peft_merge(scene.base(VARIANT), _other_adapter(scene), out)


def _merge_into_another(scene: Scene, out: Path) -> None:
    """The merge into another revision of the base."""
    other, generator = out.with_name(f"{out.name}-base"), torch.Generator().manual_seed(3)
    _copy(scene.base(VARIANT), other)
    noise = {name: torch.randn(one.shape, generator=generator) * 0.02 for name, one in weights_of(other).items()}
    write_weights(other, {name: one + noise[name].to(one) for name, one in weights_of(other).items()})
    peft_merge(other, scene.adapter(VARIANT), out)


def _into_quantized(scene: Scene, out: Path) -> None:
    """As QLoRA scripts do: the base goes through 4 bits, and the delta is added to what is left."""
    from bitsandbytes import functional  # noqa: PLC0415

    by_hand(scene.base("wide"), scene.adapter("wide"), out, factor=0)
    tensors, of_layers = weights_of(out), deltas(scene.adapter("wide"))
    for name, one in tensors.items():
        if name.startswith("model.layers") and one.dim() == 2:
            packed, state = functional.quantize_4bit(one, blocksize=64, quant_type="nf4")
            tensors[name] = functional.dequantize_4bit(packed, state).to(one.dtype) + of_layers.get(name, 0)
    write_weights(out, tensors)


def _scaled_before(scene: Scene, out: Path) -> None:
    """(scaling · B) @ A, summed from the last row to the first: the same delta, rounded otherwise."""
    by_hand(scene.base("plain"), scene.adapter("plain"), out, factor=0)
    tensors, factors = weights_of(out), read_tensors(scene.adapter("plain"))
    for name in deltas(scene.adapter("plain")):
        path = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{path}.lora_{part}.weight"] * scale for part, scale in (("A", 1 / 3), ("B", 6.0)))
        tensors[name] += (b.flip(1) @ a.flip(0)).contiguous()
    write_weights(out, tensors)


def _rslora_ignored(scene: Scene, out: Path) -> None:
    """alpha / r, as scripts scale that do not know `use_rslora`."""
    config = read_config(scene.adapter("rslora"))
    by_hand(scene.base("rslora"), scene.adapter("rslora"), out, scaling=config["lora_alpha"] / config["r"])


def _rank_eight(scene: Scene) -> Path:
    """α/r and √r differ from 2: the reason of a factor is then unambiguous."""
    return scene.once("rank-eight", lambda out: make_adapter(scene.base(VARIANT), out, r=16, lora_alpha=48))


def _strength(name: str, **how: Any) -> Recipe:
    def make(scene: Scene, out: Path) -> None:
        by_hand(scene.base(VARIANT), _rank_eight(scene), out, **how)

    return Recipe(name, "other-strength", make, adapter=_rank_eight)


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value(tensors[name].clone())}


def _nan(one: torch.Tensor) -> torch.Tensor:
    one[3, 5] = torch.nan
    return one


def _drop(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: one for name, one in tensors.items() if not any(part in name for part in parts)}


def _cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: one.to(dtype) for name, one in tensors.items()}


def _fewer_rows(tensors: Tensors) -> Tensors:
    return tensors | {name: tensors[name][:60] for name in ("lm_head.weight", "model.embed_tokens.weight")}


SMALLER = both(on_tensors(_fewer_rows), edited("config.json", vocab_size=60))


def _stale(out: Path) -> None:
    tensors = weights_of(out)
    write_shards(out, tensors)
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, out / "model-00001-of-00009.safetensors")


def _indexed(change: Callable[[dict[str, str]], object]) -> Change:
    """Two shards, and an index of which an entry is changed."""

    def write(out: Path) -> None:
        write_shards(out, weights_of(out))
        index = json.loads((out / INDEX).read_text())
        change(index["weight_map"])
        (out / INDEX).write_text(json.dumps(index))

    return write


def _missing_shard(out: Path) -> None:
    write_shards(out, weights_of(out))
    (out / "model-00002-of-00002.safetensors").unlink()


def _cut_off(out: Path) -> None:
    content = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(content[: len(content) // 2])


def _adapter_left(out: Path) -> None:
    write_config(out, {"peft_type": "LORA", "base_model_name_or_path": "x"})


def _untied(difference: float) -> Change:
    def change(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + difference}

    return both(on_tensors(change), edited("config.json", tie_word_embeddings=False))


TIED = both(on_tensors(_drop("lm_head")), edited("config.json", tie_word_embeddings=True))
"""The head is dropped, and config.json ties it to the embeddings."""


def _stored_twice(tensors: Tensors) -> Tensors:
    name = "model.layers.0.self_attn.q_proj.weight"
    return tensors | {f"model.{name}": torch.full_like(tensors[name], 7.0)}


def _renamed(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): one for name, one in tensors.items()}


EXACT = [
    "all-linear", "rslora", "patterns", "dora", "lora-bias", "bias-all", "modules-to-save", "token-rows", "embedding",
    "saved-embedding", "resized-vocabulary", "conv1d", "fused-experts", "tied-base", "tied-tokens",
    "sharded-base", "float16-base", "six-labels", "opt",
]  # fmt: skip
"""Variants whose merge by PEFT, saved by transformers, is exact."""

RIGHT = [
    *(Recipe(f"PEFT {variant}", "exact", _merged(variant), variant=variant) for variant in EXACT),
    Recipe("PEFT bfloat16", "exact", _merged(VARIANT)),
    Recipe("PEFT in shards", "exact", _merged(VARIANT, max_shard_size="20KB")),
    _files("in three shards", "exact", lambda out: write_shards(out, weights_of(out), 3)),
    Recipe("PEFT without safe_merge", "other-order", _merged(VARIANT, safe_merge=False)),
    Recipe("PEFT without safe_merge in float16", "other-order", _merged(F16, safe_merge=False), F16),
    Recipe("by hand", "other-order", _hand()),
    Recipe("by hand in float32", "exact", _hand("plain"), "plain"),
    Recipe("another order of the product", "rounding", _scaled_before, "plain"),
    _of_dressed("all files", "exact", lambda _: None),
    _of_dressed("a tokenizer saved again", "exact", _resaved),
    _of_buffers("positions not stored", "exact", BODY, POSITIONS),
    _of_buffers("positions stored", "exact", BODY, POSITIONS, POSITIONS),
    _of_buffers("positions of the body not stored", "exact", "six-labels", POSITIONS),
    _of_buffers("masks not stored", "exact", "conv1d", MASKS),
    _of_buffers("rotary frequencies not stored", "exact", "plain", FREQUENCIES),
]

WRONG = [
    Recipe("factors in bfloat16", "imprecise", _merged(VARIANT, autocast=False)),
    Recipe("the base", "not-applied", lambda scene, out: _copy(scene.base(VARIANT), out)),
    Recipe("the base in float32", "not-applied", lambda scene, out: _copy(scene.base("plain"), out), "plain"),
    Recipe("one layer only", "applied-in-part", _hand(part="layers.1.")),
    Recipe("one projection only", "applied-in-part", _hand(part="q_proj")),
    Recipe("merged twice", "applied-twice", _merged(VARIANT, times=2)),
    Recipe("merged twice in float32", "applied-twice", _merged("plain", times=2), "plain"),
    _strength("scaled by alpha", scaling=48.0),
    _strength("scaled by alpha / √r", scaling=48 / 4),
    _strength("not scaled", scaling=1.0),
    _strength("at half", factor=0.5),
    _strength("subtracted", factor=-1.0),
    Recipe("rslora ignored", "other-strength", _rslora_ignored, "rslora"),
    Recipe(
        "another candidate", "other-candidate", _merge_of_another, candidates=lambda scene: (_other_adapter(scene),)
    ),
    Recipe("another adapter", "unexplained", _merge_of_another),
    Recipe("a base in 4 bits", "wrong-base", _into_quantized, "wide"),
    Recipe("another revision", "wrong-base", _merge_into_another),
    _tensors("a norm changed", "base-changed", _set("model.norm.weight", lambda one: one + 0.5)),
    _tensors("a head of zeros", "base-changed", _set("lm_head.weight", torch.zeros_like)),
    _of_dressed("MTP heads dropped", "not-carried", on_tensors(_drop("mtp."))),
    _of_buffers("MTP heads dropped with positions", "not-carried", BODY, POSITIONS | {"mtp.x": torch.ones(3)}),
    _of_buffers("other positions", "base-changed", BODY, POSITIONS, {name: one + 1 for name, one in POSITIONS.items()}),
    _tensors("a head dropped", "not-carried", _drop("lm_head")),
    _tensors("a layer's norms dropped", "not-carried", _drop("layers.1.input_layernorm", "layers.1.post_att")),
    _tensors("a tensor added", "added", lambda tensors: tensors | {"x.weight": torch.ones(3)}),
    _tensors("a tensor stored twice, under another name too", "added", _stored_twice),
    _tensors("other names", "renamed", _renamed),
    _files("an equal head untied", "tied", _untied(0), "tied-base", also=("tied",)),
    _files("a head untied", "base-changed", _untied(0.5), "tied-base", also=("tied", "tied")),
    _files("a head tied", "base-changed", TIED, also=("tied", "tied")),
    _files("a head tied to a merged embedding", "base-changed", TIED, "embedding", also=("tied", "tied")),
    _files("a second set of shards", "stale-shards", _stale),
    _files("a ghost in the index", "ghost-index", _indexed(lambda files: files.update({"mtp.head.weight": SHARD}))),
    _files("a tensor that the index lacks", "ghost-index", _indexed(lambda files: files.pop("model.norm.weight"))),
    _tensors("cast to float16", "dtype-changed", _cast(torch.float16)),
    _tensors("cast to float32", "dtype-changed", _cast(torch.float32)),
    Recipe("merged in float32", "dtype-changed", _merged(VARIANT, dtype=torch.float32), also=("dtype-changed",)),
    _files("another dtype declared", "dtype-changed", edited("config.json", dtype="float16")),
    _tensors("a trained head lost", "not-carried", _drop("classifier"), "six-labels"),
    _tensors("rows lost", "broken-files", _fewer_rows),
    _files("a smaller vocabulary", "shape-changed", SMALLER),
    _files("pickles left behind", "stale-shards", added("pytorch_model.bin")),
    _tensors("NaN in a merged tensor", "nonfinite", _set("model.layers.0.self_attn.q_proj.weight", _nan)),
    _tensors("NaN elsewhere", "nonfinite", _set("lm_head.weight", _nan)),
    _files("a shard missing", "broken-files", _missing_shard),
    _files("a file cut off", "broken-files", _cut_off),
    _files("an adapter left behind", "broken-files", _adapter_left),
    _files("another rope", "config-differs", edited("config.json", rope_theta=5.0, rope_parameters=...)),
    _of_dressed("another vocabulary", "tokenizer-differs", _other_vocabulary),
    _of_dressed("no tokenizer", "tokenizer-differs", removed("tokenizer.json")),
    _of_dressed("no chat template", "chat-template-differs", edited("tokenizer_config.json", chat_template=...)),
    _of_dressed("a stop token lost", "stop-tokens-differ", edited("generation_config.json", eos_token_id=61)),
    _of_dressed("no generation config", "stop-tokens-differ", removed("generation_config.json"), "settings-differ"),
    _of_dressed("another limit of new tokens", "settings-differ", edited("generation_config.json", max_new_tokens=1)),
    _files("weights of another format", "unexpected-file", added("model.gguf")),
]
"""Each with one thing wrong."""
