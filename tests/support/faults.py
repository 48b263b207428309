"""What the gate must catch, and what it must let through: one line per case.

`FAULTS` holds ways to break a LoRA adapter, its files, its config or its base, each with the verdict, cause, origin and
tensor that the report must name. `HEALTHY` holds adapters that must pass without an error finding, with the warnings
that they earn. A case is a healthy adapter of `tests.support.models`, copied and then broken by `break_`. Knows nothing
of merge_gate: the words are those of the contract.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LAYERS,
    Tensors,
    read_config,
    read_tensors,
    rewrite,
    to_pickle,
    write_config,
    write_tensors,
)


@dataclass(frozen=True)
class Case:
    """One adapter and what the gate must say of it.

    `variant` and `base` name recipes of `tests.support.models`; `base` None is the variant's own. `tensor` is part of
    the name of the tensor that the deciding finding gives. `cause` None with a verdict other than `passed` means that
    the verdict is what counts. `warnings` are checks that must be reported as warnings. `entry` and `top` are laid over
    the adapter's entry and the whole config file.
    """

    name: str
    variant: str = "plain"
    break_: Callable[[Path], object] | None = None
    base: str | None = None
    dtype: str = "auto"
    verdict: str = "failed"
    cause: str | None = None
    origin: str | None = None
    tensor: str | None = None
    warnings: tuple[str, ...] = ()
    entry: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)


# --- ways to break a file --------------------------------------------------------------------------------------------


def edit(change: Callable[[Tensors], Tensors | None]) -> Callable[[Path], None]:
    """Rewrites the weights; `change` edits the tensors in place or returns new ones."""

    def changed(tensors: Tensors) -> Tensors:
        return tensors if (made := change(tensors)) is None else made

    return rewrite(changed)


def configure(**changes: Any) -> Callable[[Path], None]:
    """Edits adapter_config.json; `...` takes a key away."""
    return lambda directory: write_config(
        directory, {key: value for key, value in (read_config(directory) | changes).items() if value is not ...}
    )


def both(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda directory: [step(directory) for step in steps]


def one_key(tensors: Tensors, part: str) -> str:
    """The last tensor whose name holds `part`: a gate that looks at the first only is found out."""
    return max(name for name in tensors if part in name)


def poison(part: str, value: float = torch.nan, where: str = "first") -> Callable[[Path], None]:
    """Sets the first, the last or every element of one tensor."""

    def change(tensors: Tensors) -> None:
        flat = tensors[one_key(tensors, part)].view(-1)
        flat[{"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[where]] = value

    return edit(change)


def poison_pickle(part: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = torch.load(directory / "adapter_model.bin", weights_only=True)
        tensors[one_key(tensors, part)][-1, -1] = torch.nan
        torch.save(tensors, directory / "adapter_model.bin")

    return apply


def halve(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v[: len(v) // 2].clone() if part in k else v for k, v in tensors.items()}


def blow_up(part: str, factor: float) -> Callable[[Path], None]:
    """Multiplies one tensor: still finite, but the merge is not in every dtype."""
    return edit(lambda tensors: tensors | {(name := one_key(tensors, part)): tensors[name] * factor})


def shrink(part: str, factor: float) -> Callable[[Path], None]:
    return edit(lambda tensors: {k: v * factor if part in k else v for k, v in tensors.items()})


def drop(*parts: str) -> Callable[[Path], None]:
    return edit(lambda tensors: {k: v for k, v in tensors.items() if not any(part in k for part in parts)})


def drop_one(part: str) -> Callable[[Path], None]:
    return edit(lambda tensors: {k: v for k, v in tensors.items() if k != one_key(tensors, part)})


def add(name: str, value: float, shape: tuple[int, ...] = (4, 32)) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors | {name: torch.full(shape, value)})


def rename(old: str, new: str) -> Callable[[Path], None]:
    return edit(lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def zero(part: str) -> Callable[[Path], None]:
    return edit(lambda tensors: {k: torch.zeros_like(v) if part in k else v for k, v in tensors.items()})


def as_in_the_base(directory: Path) -> None:
    """A tied embedding that was saved whole, and never trained."""
    base = directory.parent / read_config(directory)["base_model_name_or_path"]
    embedding = read_tensors(base, "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    write_tensors(directory, read_tensors(directory) | {name: embedding})


def save_twice(change: float = 0.0) -> Callable[[Path], None]:
    """What PEFT itself does with enlarged embeddings: a second copy, under a name that it does not load."""
    name, copy = "base_model.model.lm_head.weight", "base_model.model.lm_head.modules_to_save.weight"
    return edit(lambda tensors: tensors | {copy: tensors[name] + change})


def empty_tensors(tensors: Tensors) -> Tensors:
    """What ZeRO-3 leaves on every rank when the parameters were not gathered before saving."""
    return {name: torch.empty(0) for name in tensors}


def cast_one(part: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """What a conversion leaves that casts a tensor to whole numbers."""
    return edit(lambda tensors: tensors | {(name := one_key(tensors, part)): (tensors[name] * 100).to(dtype)})


def complex_factors(imaginary: float) -> Callable[[Path], None]:
    return edit(
        lambda tensors: {
            name: torch.complex(tensor, imaginary * tensor) if "lora_A" in name else tensor
            for name, tensor in tensors.items()
        }
    )


def overwrite(content: bytes, name: str = ADAPTER_WEIGHTS) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def cut(keep: float) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = (directory / ADAPTER_WEIGHTS).read_bytes()
        (directory / ADAPTER_WEIGHTS).write_bytes(content[: int(len(content) * keep)])

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def only_bin(content: bytes) -> Callable[[Path], None]:
    return both(remove(ADAPTER_WEIGHTS), overwrite(content, "adapter_model.bin"))


class Payload:
    """Unpickles into a call that leaves a file behind: whoever loads it without `weights_only` is seen."""

    MARK = "payload-ran"

    def __init__(self, directory: Path) -> None:
        self.target = str(directory / self.MARK)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.target, "w"))


def malicious_pickle(directory: Path) -> None:
    torch.save(read_tensors(directory) | {"payload": Payload(directory)}, directory / "adapter_model.bin")
    (directory / ADAPTER_WEIGHTS).unlink()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 150656\n"
HTML_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in.</body></html>\n"
FOREIGN_CODE = {"base_model_class": "BertModel", "parent_library": "attacker_package.modeling"}
ALLOW_PICKLE = {"allow-pickle": True}
NEGATIVE = -torch.inf
BAD = {"nan": torch.nan, "posinf": torch.inf, "neginf": NEGATIVE}
LARGE_DELTA = both(blow_up("v_proj.lora_A", 1e3), blow_up("v_proj.lora_B", 1e5))
V_PROJ = "layers.1.self_attn.v_proj"
V_B = f"{V_PROJ}.lora_B"


# --- what must fail --------------------------------------------------------------------------------------------------


UNDER_TRAINED = "base_model.model.model.embed_tokens.original_module.weight"


def nonfinite_adapters() -> tuple[Case, ...]:
    """Each bad value, in each factor, at the first, the last and every index, and in every kind of saved tensor."""
    grid = (
        (f"{value}-{factor}-{where}", "plain", poison(factor, BAD[value], where), f"v_proj.{factor}")
        for value in BAD
        for factor in ("lora_A", "lora_B")
        for where in ("first", "last", "all")
    )
    kinds = (
        ("nan-embedding-A", "embedding", poison("lora_embedding_A", where="last"), "embed_tokens.lora_embedding_A"),
        ("neginf-embedding-B", "embedding", poison("lora_embedding_B", NEGATIVE, "last"), "lora_embedding_B"),
        ("nan-magnitude", "dora", poison("lora_magnitude_vector", where="last"), "lora_magnitude_vector"),
        ("inf-magnitude", "dora", poison("lora_magnitude_vector", torch.inf), "lora_magnitude_vector"),
        ("nan-embedding-magnitude", "embedding-dora", poison("tokens.lora_magnitude"), "tokens.lora_magnitude"),
        ("nan-lora-bias", "lora-bias", poison("lora_B.bias", where="last"), "lora_B.bias"),
        ("neginf-bias-all", "bias-all", poison("o_proj.bias", NEGATIVE, "last"), "layers.1.self_attn.o_proj.bias"),
        ("nan-bias-all-target", "bias-all", poison("q_proj.base_layer.bias"), "layers.1.self_attn.q_proj"),
        ("nan-bias-lora-only", "bias-lora-only", poison("v_proj.base_layer.bias", where="last"), V_PROJ),
        ("nan-saved-weight", "modules-to-save", poison("o_proj.weight", where="last"), "o_proj.weight"),
        ("inf-saved-bias", "modules-to-save", poison("o_proj.bias", torch.inf, "last"), "o_proj.bias"),
        ("nan-saved-head", "modules-to-save", poison("lm_head.weight", where="last"), "lm_head.weight"),
        ("nan-token-rows", "token-rows", poison("tokens_delta", where="last"), "tokens_delta"),
        ("nan-saved-embedding", "saved-embedding", poison("embed_tokens", where="last"), "embed_tokens.weight"),
        ("nan-resized-embedding", "resized-vocabulary", poison("lm_head", where="last"), "lm_head.weight"),
        ("nan-classifier", "six-labels", poison("classifier.bias", where="last"), "classifier.bias"),
        ("nan-conv1d", "conv1d", poison("c_proj.lora_B", where="last"), "c_proj.lora_B"),
        ("nan-pissa", "pissa", poison("lora_B", where="last"), V_B),
        ("nan-bfloat16-file", "bfloat16-file", poison("lora_B", where="last"), V_B),
        ("nan-expert", "fused-experts", poison("experts.lora_B", where="last"), "experts"),
        ("nan-rider", "plain", add("base_model.model.model.norm.weight", torch.nan, (32,)), "norm.weight"),
        ("nan-under-tied-head", "saved-tied-embedding", add(UNDER_TRAINED, torch.nan, (64, 32)), "original_module"),
        ("nan-pickled", "pickled", poison_pickle("lora_B"), V_B),
    )
    nonfinite = {"cause": "adapter-nonfinite", "origin": "adapter"}
    return tuple(
        Case(name, variant, break_, tensor=tensor, top=ALLOW_PICKLE if variant == "pickled" else {}, **nonfinite)
        for name, variant, break_, tensor in (*grid, *kinds)
    )


def overflows() -> tuple[Case, ...]:
    """Finite in the file, finite in the base, infinite in float16."""
    rows = (
        ("overflow-weight", "plain", LARGE_DELTA, "v_proj.weight"),
        ("overflow-lora-bias", "lora-bias", poison("lora_B.bias", 1e6, "last"), "v_proj.bias"),
        ("overflow-bias", "bias-all", poison("o_proj.bias", -1e6, "last"), "o_proj.bias"),
        ("overflow-bias-lora-only", "bias-lora-only", poison("v_proj.base_layer.bias", 1e6, "last"), "v_proj.bias"),
        ("overflow-saved-weight", "modules-to-save", poison("lm_head.weight", 1e6, "last"), "lm_head.weight"),
        ("overflow-saved-bias", "modules-to-save", poison("o_proj.bias", -1e6, "last"), "o_proj.bias"),
        ("overflow-saved-embedding", "saved-embedding", poison("embed_tokens", -1e6, "last"), "embed_tokens.weight"),
        ("overflow-magnitude", "dora", poison("lora_magnitude_vector", 1e7, "last"), "v_proj.weight"),
        ("overflow-embedding", "embedding", blow_up("lora_embedding_B", 1e8), "embed_tokens.weight"),
        ("overflow-token-rows", "token-rows", poison("tokens_delta", -1e6, "last"), "embed_tokens.weight"),
        ("overflow-conv1d", "conv1d", blow_up("c_proj.lora_B", 1e8), "c_proj.weight"),
        ("overflow-pissa", "pissa", blow_up("lora_B", 1e8), "v_proj.weight"),
        ("overflow-olora", "olora", blow_up("lora_B", 1e8), "v_proj.weight"),
        ("overflow-resized", "resized-target", blow_up("lora_embedding_B", 1e8), "embed_tokens.weight"),
        ("overflow-both-biases", "both-biases", poison("lora_B.bias", 1e6, "last"), "v_proj.bias"),
        ("overflow-expert", "fused-experts", blow_up("experts.lora_B", 1e8), "experts"),
    )
    return tuple(
        Case(name, variant, break_, dtype="float16", cause="merged-nonfinite", origin="merge", tensor=tensor)
        for name, variant, break_, tensor in rows
    )


def incomplete_files() -> tuple[Case, ...]:
    """Tensors that the config promises and the file lacks: PEFT warns at best, and merges initial values."""
    rows = (
        ("half-of-the-layers", "plain", drop("layers.1."), "layers.1.self_attn"),
        ("one-lora-B", "plain", drop_one("lora_B"), V_B),
        ("all-lora-B", "every-projection", drop("lora_B"), "lora_B"),
        ("target-not-in-file", "plain", configure(target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj"),
        ("no-lora-only-bias", "bias-lora-only", drop(".bias"), "bias"),
        ("one-bias-of-all", "bias-all", drop_one("k_proj.bias"), "layers.1.self_attn.k_proj.bias"),
        ("no-lora-bias", "lora-bias", drop("lora_B.bias"), "lora_B.bias"),
        ("no-saved-bias", "modules-to-save", drop_one("o_proj.bias"), "layers.1.self_attn.o_proj.bias"),
        ("no-saved-module", "modules-to-save", drop("lm_head"), "lm_head"),
        ("no-magnitude", "dora", drop("lora_magnitude_vector"), "lora_magnitude_vector"),
        ("one-embedding-factor", "embedding", drop("lora_embedding_B"), "lora_embedding_B"),
        ("no-token-rows", "token-rows", drop("token_adapter", "tokens_delta"), "embed_tokens"),
        ("no-classifier-bias", "six-labels", drop("classifier.bias"), "classifier.bias"),
        ("compiled-keys", "plain", rename("base_model.model.", "base_model.model._orig_mod."), "self_attn"),
        ("wrong-prefix", "plain", rename("base_model.model.", "module."), "self_attn"),
        ("no-prefix", "plain", rename("base_model.model.model.", "model."), "self_attn"),
        ("no-tensors", "plain", edit(lambda _: {}), None),
    )
    return tuple(
        Case(name, variant, break_, cause="keys-missing", origin="adapter", tensor=tensor)
        for name, variant, break_, tensor in rows
    )


def unused_tensors() -> tuple[Case, ...]:
    """Tensors that PEFT drops without a word."""
    deep = f"base_model.model.model.layers.{LAYERS}.self_attn.q_proj.lora_A.weight"
    stray = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    rows = (
        ("stray-tensor", "plain", add(stray, 0.5), "o_proj.lora_A"),
        ("stray-nan", "plain", add(stray, torch.nan), "o_proj.lora_A"),
        ("stray-name", "plain", add("optimizer.state.0", 0.5), "optimizer.state.0"),
        ("layer-too-many", "plain", add(deep, 0.5), f"layers.{LAYERS}."),
        ("target-not-in-config", "plain", configure(target_modules=["q_proj"]), "v_proj"),
        ("magnitude-without-dora", "dora", configure(use_dora=False), "lora_magnitude_vector"),
        ("lora-bias-not-in-config", "lora-bias", configure(lora_bias=False), "lora_B.bias"),
        ("half-excluded", "plain", configure(exclude_modules=["v_proj"]), "v_proj"),
        ("layers-not-in-config", "plain", configure(layers_to_transform=[0], layers_pattern="layers"), "layers.1."),
        ("saved-twice-differently", "modules-to-save", save_twice(0.5), "lm_head.modules_to_save.weight"),
        ("token-rows-not-in-config", "token-rows", configure(trainable_token_indices=None), "embed_tokens"),
    )
    return tuple(
        Case(name, variant, break_, cause="keys-unexpected", origin="adapter", tensor=tensor)
        for name, variant, break_, tensor in rows
    )


def wrong_shapes() -> tuple[Case, ...]:
    cut_rows = edit(lambda tensors: {k: v[:-1] if k == one_key(tensors, "lora_B") else v for k, v in tensors.items()})
    transposed = edit(lambda tensors: {k: v.T.contiguous() for k, v in tensors.items()})
    beyond = configure(trainable_token_indices=[3, 7, 64])
    fewer_rows = configure(trainable_token_indices={"embed_tokens": [3]})
    rows = (
        ("short-lora-B", "plain", cut_rows, None, "shape-mismatch", V_B),
        ("other-size-base", "wide", None, "llama", "shape-mismatch", "lora_"),
        ("zero3-empty-tensors", "plain", edit(empty_tensors), None, "shape-mismatch", "lora_"),
        ("token-rows-beyond", "token-rows", beyond, None, "shape-mismatch", None),
        ("token-rows-short", "token-rows", fewer_rows, None, "shape-mismatch", "tokens_delta"),
        ("saved-head-short", "modules-to-save", edit(halve("lm_head")), None, "shape-mismatch", "lm_head"),
        ("wrong-rank", "plain", configure(r=8), None, "config-invalid", None),
        ("rank-pattern-lost", "patterns", configure(rank_pattern={}), None, "shape-mismatch", "v_proj.lora_A"),
        ("transposed", "plain", transposed, None, None, None),
    )
    return tuple(
        Case(name, variant, break_, base=base, cause=cause, tensor=tensor)
        for name, variant, break_, base, cause, tensor in rows
    )


def wrong_configs() -> tuple[Case, ...]:
    rows = (
        ("no-such-target", configure(target_modules=["query_key_value"]), "targets-not-found"),
        ("no-such-layer", configure(layers_to_transform=[7], layers_pattern="layers"), "targets-not-found"),
        ("regex-without-match", configure(target_modules=r"transformer\.h\..*"), "targets-not-found"),
        ("config-not-json", overwrite(b'{"peft_type": "LORA", "r": 4,', ADAPTER_CONFIG), "config-invalid"),
        ("config-a-list", overwrite(b"[]", ADAPTER_CONFIG), "config-invalid"),
        ("config-nan-alpha", configure(lora_alpha=torch.nan), "config-invalid"),
        ("config-binary", overwrite(b"\xff\xfe\x00\x01" * 8, ADAPTER_CONFIG), "config-invalid"),
        ("no-peft-type", configure(peft_type=...), "config-invalid"),
        ("unknown-key", configure(frobnicate=True), "config-invalid"),
        ("rank-a-word", configure(r="four"), "config-invalid"),
        ("rank-zero", configure(r=0), "config-invalid"),
        ("megatron", configure(megatron_config={"x": 1}, megatron_core="megatron.core"), "config-unsafe"),
        ("foreign-auto-mapping", configure(auto_mapping=FOREIGN_CODE, task_type=None), "config-unsafe"),
        ("layer-replication", configure(layer_replication=[[0, 2], [1, 2]]), "not-mergeable"),
        ("activated-lora", configure(alora_invocation_tokens=[5, 6]), "not-mergeable"),
    )
    cases = tuple(Case(name, break_=break_, cause=cause) for name, break_, cause in rows)
    # A type that this PEFT does not know: the contract leaves open whether that is `error` or `not-mergeable`.
    newer = Case("newer-type", break_=configure(peft_type="NEWLORA"), verdict="failed|error")
    prompts = Case("prompt-tuning", "prompt-tuning", cause="not-mergeable")
    return (*cases, newer, prompts)


def broken_files() -> tuple[Case, ...]:
    rows = (
        ("lfs-pointer", overwrite(LFS_POINTER), "file-lfs-pointer"),
        ("lfs-pointer-config", overwrite(LFS_POINTER, ADAPTER_CONFIG), "file-lfs-pointer"),
        ("truncated", cut(0.7), "file-corrupt"),
        ("truncated-header", cut(0.02), "file-corrupt"),
        ("zero-bytes", overwrite(b""), "file-corrupt"),
        ("garbage", overwrite(bytes(range(256)) * 8), "file-corrupt"),
        ("huge-header", overwrite((1 << 62).to_bytes(8, "little") + b"{}" * 64), "file-corrupt"),
        ("html-page", overwrite(HTML_PAGE), "file-corrupt"),
        ("no-config", remove(ADAPTER_CONFIG), "file-missing"),
        ("no-weights", remove(ADAPTER_WEIGHTS), "file-missing"),
        ("only-pickle", to_pickle, "pickle-refused"),
    )
    pickled = (
        ("malicious-pickle", malicious_pickle, "file-corrupt"),
        ("garbage-bin", only_bin(b"\x80junk" * 9), "file-corrupt"),
        ("lfs-pointer-bin", only_bin(LFS_POINTER), "file-lfs-pointer"),
    )
    return (
        *(Case(name, break_=break_, cause=cause, origin="file") for name, break_, cause in rows),
        *(Case(name, break_=break_, cause=cause, origin="file", top=ALLOW_PICKLE) for name, break_, cause in pickled),
    )


def broken_bases() -> tuple[Case, ...]:
    """The adapter is healthy: it must not be blamed, and must not be released on such a base either."""
    rows = (
        ("base-nan-in-target", "llama-nan-in-target", "q_proj.weight"),
        ("base-nan-far-from-targets", "llama-nan-far", "model.norm.weight"),
        ("base-neginf-in-head", "llama-neginf-far", "lm_head.weight"),
    )
    return tuple(
        Case(name, base=base, cause="base-nonfinite", origin="base", tensor=tensor) for name, base, tensor in rows
    )


def unjudgeable_bases() -> tuple[Case, ...]:
    """The adapter is healthy, and no merge into the base can be judged."""
    rows = (
        ("base-without-a-shard", "llama-incomplete", "base-incomplete", "layers.1."),
        ("base-of-another-config", "llama-inconsistent", "base-inconsistent", "layers.0.mlp"),
        ("base-in-exl2", "llama-exl2", "base-format", None),
    )
    return tuple(
        Case(name, base=base, verdict="error", cause=cause, origin="base", tensor=tensor)
        for name, base, cause, tensor in rows
    )


def broken_promises() -> tuple[Case, ...]:
    """Nothing is broken but what the release says of the adapter."""
    expectations = (
        ("expect-rank", {"r": 16}),
        ("expect-alpha", {"lora_alpha": 32}),
        ("expect-type", {"peft_type": "LOHA"}),
        ("expect-base", {"base": "acme/another-base"}),
        ("expect-sha256", {"sha256": {ADAPTER_WEIGHTS: "0" * 64}}),
        ("expect-missing-file", {"sha256": {"no-such-file.safetensors": "0" * 64}}),
    )
    return tuple(Case(name, cause="expectation-failed", entry={"expect": expect}) for name, expect in expectations)


def vain_merges() -> tuple[Case, ...]:
    untrained = both(zero("lora_B"), as_in_the_base)
    return (
        Case("all-lora-B-zero", break_=zero("lora_B"), cause="no-effect"),
        Case("all-lora-A-zero", "every-projection", zero("lora_A"), cause="no-effect"),
        Case("untrained-tied-embedding", "saved-tied-embedding", untrained, cause="no-effect"),
        Case("alpha-zero", break_=configure(lora_alpha=0), cause="no-effect"),
        Case("tied-head-one-side", "tied-head", cause="tied-weights"),
        Case("tied-embedding-one-side", "tied-embedding", cause="tied-weights"),
        Case("tied-tokens-one-side", "tied-tokens-head", cause="tied-weights"),
        Case("nonfinite-check-off", break_=poison("lora_B", where="last"), cause="merged-nonfinite",
             tensor="v_proj.weight", entry={"checks": {"adapter-nonfinite": "off"}}),
        Case("large-delta", break_=LARGE_DELTA, cause="delta-norm", tensor="v_proj.weight"),
        Case("magnitudes-zero", "dora", zero("lora_magnitude_vector"), cause="delta-norm", tensor="q_proj.weight"),
        Case("saved-head-zero", "modules-to-save", zero("lm_head"), cause="delta-norm", tensor="lm_head.weight"),
        Case("mismatch-as-error", break_=configure(base_model_name_or_path="acme/another-base"),
             cause="base-mismatch", entry={"checks": {"base-mismatch": "error"}}),
    )  # fmt: skip


FAULTS: tuple[Case, ...] = (
    *nonfinite_adapters(),
    *overflows(),
    *incomplete_files(),
    *unused_tensors(),
    *wrong_shapes(),
    *wrong_configs(),
    *broken_files(),
    *broken_bases(),
    *unjudgeable_bases(),
    *broken_promises(),
    *vain_merges(),
)


# --- what must pass --------------------------------------------------------------------------------------------------


def healthy(name: str, variant: str | None = None, **settings: Any) -> Case:
    return Case(name, variant or name, verdict="passed", **settings)


FAMILY = (
    "plain", "all-linear", "every-projection", "regex", "excluded", "layers-to-transform", "rslora", "patterns",
    "gaussian", "dora", "dora-all-linear", "pissa", "olora", "lora-bias", "bias-all", "bias-lora-only",
    "modules-to-save", "token-rows", "embedding", "embedding-dora", "saved-embedding", "resized-vocabulary",
    "resized-tied", "resized-target", "resized-tokens", "resized-tied-tokens", "both-biases", "dropout",
    "bfloat16-file", "float16-file", "lopsided", "name-in-keys", "old-config", "sharded-base", "tied-base",
    "tied-tokens", "conv1d", "conv1d-dora", "conv1d-saved", "feature-extraction", "six-labels", "classifier", "opt",
    "per-expert", "fused-experts",
)  # fmt: skip
"""Variants that must pass without a warning."""

SINCE_0_16 = (
    "use_qalora", "qalora_group_size", "target_parameters", "peft_version", "alora_invocation_tokens", "arrow_config",
    "ensure_weight_tying", "lora_ga_config", "use_bdlora", "monteclora_config", "velora_config", "kasa_config",
)  # fmt: skip
"""Keys that releases of PEFT before 0.16 do not write."""


FOR_ANOTHER_HEAD = both(drop("classifier"), configure(task_type="CAUSAL_LM", modules_to_save=None))
"""Trained under a head that the adapter does not bring, to be loaded under one that the base does not have."""


def healthy_with_a_twist() -> tuple[Case, ...]:
    """Odd, but not broken: each of these has been failed by some tool."""
    another = configure(base_model_name_or_path="acme/another-base")
    expect = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    saved_by_0_15 = configure(**dict.fromkeys(SINCE_0_16, ...))
    large_delta = {"checks": {"delta-norm": {"error-limit": 1e9}}}
    head, norm = "base_model.model.lm_head.original_module.weight", "base_model.model.model.norm.weight"
    return (
        healthy("pissa-niter", warnings=("not-reproducible",)),
        healthy("random-head", "six-labels", break_=FOR_ANOTHER_HEAD, warnings=("untrained-tensors",)),
        healthy("nan-where-a-trained-head-stands", "modules-to-save", break_=add(head, torch.nan, (64, 32)),
                warnings=("adapter-nonfinite",)),
        healthy("head-over-a-broken-one", "modules-to-save", base="llama-neginf-far", warnings=("base-nonfinite",)),
        healthy("resized-head-lost", "resized-vocabulary", break_=drop("lm_head"), warnings=("untrained-tensors",)),
        healthy("saved-by-0.15", "lora-bias", break_=saved_by_0_15, warnings=("meaning-changed",)),
        healthy("saved-twice", "modules-to-save", break_=save_twice()),
        healthy("pickle-allowed", "pickled", top=ALLOW_PICKLE),
        healthy("junk-pickle-beside", "plain", break_=overwrite(b"junk", "adapter_model.bin")),
        healthy("other-base-in-config", "plain", break_=another, warnings=("base-mismatch",)),
        healthy("some-lora-B-zero", "plain", break_=zero(V_B), warnings=("no-effect",)),
        healthy("lopsided-float16", "lopsided", dtype="float16"),
        healthy("large-but-float32", "plain", break_=LARGE_DELTA, warnings=("delta-norm",), entry=large_delta),
        healthy("complex-factors", "plain", break_=complex_factors(0.0), warnings=("keys-unexpected",)),
        healthy("norm-that-no-config-names", "plain", break_=add(norm, 1.5, (32,)), warnings=("keys-unexpected",)),
        healthy("zeros-that-are-allowed", "dora", break_=zero("lora_magnitude_vector"), warnings=("delta-norm",),
                entry={"checks": {"delta-norm": {"wiped": "warning"}}}),
        healthy("tiny-delta", "plain", break_=shrink("lora_B", 1e-3), dtype="bfloat16", warnings=("rounding-loss",)),
        healthy("expected", "plain", entry={"expect": expect}),
        healthy("base-only-in-config", "plain", entry={"base": {"model": ...}}),
        healthy("readme-beside", "plain", break_=overwrite(b"# A model card\n", "README.md")),
        healthy("float16-stored", "float16-base"),
        healthy("bfloat16-stored", "bfloat16-base"),
        healthy("plain-bfloat16", "plain", dtype="bfloat16"),
        healthy("dora-float16", "dora", dtype="float16"),
        healthy("saved-float16", "modules-to-save", dtype="float16"),
        healthy("resized-bfloat16", "resized-vocabulary", dtype="bfloat16"),
        healthy("conv1d-float16", "conv1d", dtype="float16"),
    )  # fmt: skip


HEALTHY: tuple[Case, ...] = (*map(healthy, FAMILY), *healthy_with_a_twist())
