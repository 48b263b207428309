"""Adapters in the directories that trainers write and people ship: real ones of PEFT's, with all that lies about them.

In: a directory to write to, and the tiny bases. Out: `SHIPPED`, one row for each way, with what must be said of it.
What PEFT makes of a row is `merge_plainly`; knows nothing of the gate.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from tests.support import methods
from tests.support.faults import configure
from tests.support.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Shelf,
    _noise,
    cast_file,
    load_for_training,
    make_adapter,
    name_in_keys,
    read_config,
    read_tensors,
    rewrite,
    save_adapter,
    to_pickle,
)

SCORE = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]}
VANISHED = "/mnt/nvme0/users/kim/runs/llama-tuned"
WINDOWS = r"D:\models\acme\llama"


Make = Callable[[Shelf, Path], object]


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """`make` writes the directory. `cause` None: it passes, and PEFT's own merge has the same bits.

    `path` is the part of the directory that is listed. `base` None leaves the base to the adapter. `says` and `hint`
    stand in the deciding finding, `warned` are the checks that warn. `rows` is what the base's embedding is enlarged
    to, `labels` what its head has, before PEFT loads the adapter by hand.
    """

    name: str
    make: Make
    path: str = "."
    base: str | None = "llama"
    cause: str | None = None
    says: tuple[str, ...] = ()
    hint: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    rows: int | None = None
    labels: int | None = None


def merge_plainly(row: Shipped, shelf: Shelf, directory: Path) -> dict[str, Tensor]:
    """What somebody gets who loads the base, and merges with PEFT: every tensor, by its name."""
    adapter = directory / row.path
    more = {} if row.labels is None else {"num_labels": row.labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_for_training(shelf.base(str(row.base)), read_config(adapter).get("task_type"), **more)
        if row.rows is not None:
            model.resize_token_embeddings(row.rows, mean_resizing=False)
        return methods.values(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True))


# --- files next to it ----------------------------------------------------------------------------------------------


def lora(**settings: Any) -> Make:
    """A LoRA of the llama, as `save_pretrained` writes it."""
    return lambda shelf, out: make_adapter(shelf.base("llama"), out, **settings)


def then(make: Make, *steps: Callable[[Path], object]) -> Make:
    return lambda shelf, out: (make(shelf, out), *(step(out) for step in steps))


def below(folder: str, make: Make) -> Make:
    return lambda shelf, out: ((out / folder).parent.mkdir(parents=True, exist_ok=True), make(shelf, out / folder))


def all_of(*makes: Make) -> Make:
    return lambda shelf, out: [make(shelf, out) for make in makes]


def trainer_state(directory: Path) -> None:
    """What transformers' Trainer writes into a checkpoint next to the model."""
    state = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(state.parameters())
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save({"last_epoch": 3}, directory / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, directory / "rng_state.pth")
    torch.save({"output_dir": "./out"}, directory / "training_args.bin")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 40, "epoch": 1.0, "log_history": []}))


def file_maker(files: Mapping[str, object]) -> Callable[[Path], None]:
    """A function that writes these files into a directory: texts, bytes, or values as JSON."""

    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def only(files: Mapping[str, object]) -> Make:
    return lambda _shelf, out: file_maker(files)(out)


TOKENIZER = file_maker({
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "special_tokens_map.json": {"pad_token": "<pad>"},
    "added_tokens.json": {"<|im_start|>": 64, "<|im_end|>": 65},
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
})  # fmt: skip
"""With two tokens of its own."""
YAML = "---\nlibrary_name: peft\nbase_model: acme/llama\n---\n# out\n```yaml\nadapter: lora\nlora_r: 4\n```\n"
CARD = file_maker({"README.md": YAML})
"""Axolotl's model card holds a YAML file."""
CONFIG_OF_THE_BASE = file_maker({
    "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "_name_or_path": VANISHED},
})  # fmt: skip
"""Axolotl and others save it next to the adapter."""
OF_SWIFT = file_maker({
    "args.json": {"model": "acme/llama", "tuner_type": "lora"},
    "additional_config.json": {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06},
})  # fmt: skip
OF_DEEPSPEED = only({
    "global_step40/zero_pp_rank_0_mp_rank_00_model_states.pt": b"PK",
    "latest": "global_step40",
    "zero_to_fp32.py": "# DeepSpeed's\n",
})  # fmt: skip
OF_FSDP = only({
    "pytorch_model_fsdp_0/__0_0.distcp": b"\x80", "optimizer_0/__0_0.distcp": b"\x80", "trainer_state.json": "{}",
})  # fmt: skip
OF_MEGATRON = only({"iter_0000040/__0_0.distcp": b"\x80", "latest_checkpointed_iteration.txt": "40"})
OF_NEMO = only({"megatron_gpt_peft_lora_tuning.nemo": b"\x1f\x8b"})


def of_unsloth(directory: Path) -> None:
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    }
    configure(auto_mapping=mapping, base_model_name_or_path="unsloth/llama-bnb-4bit", task_type="CAUSAL_LM")(directory)


def of_llama_factory(directory: Path) -> None:
    log, picture = json.dumps({"current_steps": 5, "loss": 1.2}) + "\n", b"\x89PNG\r\n\x1a\n"
    file_maker({"all_results.json": {"train_loss": 1.2}, "trainer_log.jsonl": log, "training_loss.png": picture})(
        directory
    )
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, directory / "value_head.safetensors")


def also_pickled(directory: Path) -> None:
    """Both containers, as a conversion leaves them; the pickle is an older state."""
    torch.save({name: tensor * 2 for name, tensor in read_tensors(directory).items()}, directory / "adapter_model.bin")


def prefixed(prefix: str) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def linked_as_in_the_cache(directory: Path) -> None:
    """snapshots/COMMIT/NAME is a link to blobs/DIGEST."""
    blobs = directory / "blobs"
    snapshot = directory / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate((ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        (directory / name).rename(blobs / f"blob{number}")
        (snapshot / name).symlink_to(f"../../blobs/blob{number}")
    (directory / "README.md").unlink(missing_ok=True)


def merged_by_mistake(shelf: Shelf, out: Path) -> None:
    """`merge_and_unload().save_pretrained(out)` over the adapter's directory, whose config stayed."""
    lora()(shelf, out)
    model = load_for_training(shelf.base("llama"), "CAUSAL_LM")
    PeftModel.from_pretrained(model, str(out)).merge_and_unload().save_pretrained(out)
    (out / ADAPTER_WEIGHTS).unlink()


def merged_only(shelf: Shelf, out: Path) -> None:
    merged_by_mistake(shelf, out)
    (out / ADAPTER_CONFIG).unlink()


def merged_over(shelf: Shelf, out: Path) -> None:
    """A merged model's tensors under the adapter's name."""
    merged_by_mistake(shelf, out)
    (out / "model.safetensors").rename(out / ADAPTER_WEIGHTS)


def pissa_converted(shelf: Shelf, out: Path) -> None:
    """PEFT's conversion on saving: twice the rank, and no initialisation left."""
    model = get_peft_model(
        load_for_training(shelf.base("llama"), "CAUSAL_LM"),
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"),
    )
    first = out.parent / f"{out.name}-first"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(first)
    model.peft_config["default"].init_lora_weights = "pissa"
    _noise(model, 1)
    model.save_pretrained(out, path_initial_model_for_weight_conversion=str(first))
    shutil.rmtree(first)


def two_names(first: str, second: str) -> Make:
    """Two adapters on one model; save_pretrained gives each but `default` a folder."""

    def make(shelf: Shelf, out: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(load_for_training(shelf.base("llama"), "CAUSAL_LM"), config, adapter_name=first)
        model.add_adapter(second, config)
        _noise(model, 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.05)
        model.save_pretrained(out)

    return make


def resized(shelf: Shelf, out: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "r": 4, "target_modules": ["q_proj"]}
    save_adapter(shelf.base("llama"), out, LoraConfig(task_type="CAUSAL_LM", **settings), rows=66)


def adalora(shelf: Shelf, out: Path) -> None:
    settings = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"]}
    config = AdaLoraConfig(task_type="CAUSAL_LM", tinit=1, tfinal=2, **settings)
    model = get_peft_model(load_for_training(shelf.base("llama"), "CAUSAL_LM"), config)
    _noise(model, 1)
    for step in range(10):
        ids = torch.arange(8).reshape(1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(out)


def classifier(**settings: Any) -> Make:
    def make(shelf: Shelf, out: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=8, **(SCORE | settings))
        save_adapter(shelf.base("llama"), out, config, num_labels=settings.pop("labels", 1))

    return make


def empty_pickle(shelf: Shelf, out: Path) -> None:
    """Axolotl's adapter_model.bin of a ZeRO-3 run: names, and nothing in them."""
    lora()(shelf, out)
    torch.save({name: torch.empty(0) for name in read_tensors(out)}, out / "adapter_model.bin")
    (out / ADAPTER_WEIGHTS).unlink()


def on_another_adapter(shelf: Shelf, out: Path) -> None:
    """Trained on a model that was loaded from an adapter's directory: the base that it names is that adapter."""
    lora()(shelf, out / "first")
    lora(seed=2)(shelf, out / "second")
    configure(base_model_name_or_path=str(out / "first"))(out / "second")


def with_mark(directory: Path) -> None:
    """An editor's byte order mark."""
    path = directory / ADAPTER_CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def with_comma(directory: Path) -> None:
    path = directory / ADAPTER_CONFIG
    path.write_text(path.read_text().rstrip().removesuffix("}").rstrip() + ",\n}\n")


def renamed_to(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / ADAPTER_WEIGHTS).rename(directory / name) and None


def loftq(shelf: Shelf, out: Path) -> None:
    lora()(shelf, out)
    configure(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})(out)


def capital(directory: Path) -> None:
    (directory / ADAPTER_CONFIG).rename(directory / ADAPTER_CONFIG.capitalize())


def saved_tied(shelf: Shelf, out: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    make_adapter(shelf.base("llama-tied"), out, **settings)


def passing() -> tuple[Shipped, ...]:
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    patterns = {
        "rank_pattern": {r"^model\.layers\.0\..*q_proj": 8, "v_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 32},
    }
    base = {"target_modules": seven}
    return (
        Shipped(name="axolotl", make=then(lora(**base), CARD, CONFIG_OF_THE_BASE, TOKENIZER, trainer_state)),
        Shipped(name="checkpoint", make=below("checkpoint-40", then(lora(), trainer_state, CARD)),
                path="checkpoint-40"),
        Shipped(name="unsloth", make=then(lora(), of_unsloth, TOKENIZER)),
        Shipped(name="llama-factory", make=then(lora(), of_llama_factory, CARD)),
        Shipped(name="swift", make=below("v0-20260101-120000/checkpoint-40", then(lora(), OF_SWIFT, trainer_state)),
                path="v0-20260101-120000/checkpoint-40"),
        Shipped(name="trl-added-tokens", make=then(resized, TOKENIZER), rows=66),
        Shipped(name="value-head-next-to-it", make=then(
            lora(), lambda out: torch.save({"v_head.summary.weight": torch.zeros(1, 32)}, out / "pytorch_model.bin"))),
        Shipped(name="both-containers", make=then(lora(), also_pickled)),
        Shipped(name="pickle", make=then(lora(), to_pickle)),
        Shipped(name="cache-layout", make=then(lora(), linked_as_in_the_cache), path="snapshots/c0ffee"),
        Shipped(name="pissa-converted", make=pissa_converted),
        Shipped(name="base-null", make=then(lora(), configure(base_model_name_or_path=None))),
        Shipped(name="base-vanished", make=then(lora(), configure(base_model_name_or_path=VANISHED))),
        Shipped(name="base-of-windows", make=then(lora(), configure(base_model_name_or_path=WINDOWS))),
        Shipped(name="one-of-two", make=two_names("default", "dpo")),
        Shipped(name="the-other-of-two", make=two_names("default", "dpo"), path="dpo"),
        Shipped(name="rslora", make=lora(use_rslora=True, lora_alpha=16)),
        Shipped(name="score", make=classifier(modules_to_save=["score"]), labels=1),
        Shipped(name="all-linear", make=then(lora(target_modules="all-linear"),
                                             configure(target_modules="all-linear"))),
        Shipped(name="layers", make=lora(layers_to_transform=[1])),
        Shipped(name="patterns", make=lora(**patterns, **base)),
        Shipped(name="excluded", make=lora(target_modules="all-linear", exclude_modules=["down_proj", "lm_head"])),
        Shipped(name="excluded-by-regex", make=lora(target_modules="all-linear", exclude_modules=r".*\.0\..*")),
        Shipped(name="token-rows", make=lora(trainable_token_indices=[3, 7])),
        Shipped(name="dora-bias-only", make=lora(use_dora=True, bias="lora_only")),
        Shipped(name="dora-bias-all", make=lora(use_dora=True, bias="all")),
        Shipped(name="adalora", make=adalora),
        Shipped(name="default-targets", make=then(lora(), configure(target_modules=None))),
        Shipped(name="name-in-names", make=then(lora(), rewrite(name_in_keys))),
        Shipped(name="saved-tied", make=saved_tied, base="llama-tied"),
        Shipped(name="half", make=then(lora(), cast_file(torch.float16))),
    )  # fmt: skip


def in_another_place() -> tuple[Shipped, ...]:
    """The files are whole, and lie where nobody looks for them, or under another name."""
    missing = "file-missing"
    run = "v0-20260101-120000/checkpoint-40"
    return (
        Shipped(name="output-directory", cause=missing, hint=("subdirectory 'checkpoint-100'",),
                make=all_of(below("checkpoint-20", lora()), below("checkpoint-100", lora(seed=2)))),
        Shipped(name="swift-output", make=below(run, then(lora(), OF_SWIFT)), cause=missing,
                hint=(f"subdirectory '{run}'",)),
        Shipped(name="subfolder", make=below("adapter", lora()), cause=missing, hint=("subdirectory 'adapter'",)),
        Shipped(name="several", make=two_names("sft", "dpo"), cause=missing,
                hint=("'dpo', 'sft'",)),
        Shipped(name="renamed", make=then(lora(), renamed_to("lora.safetensors")), cause=missing,
                hint=("adapter_model.safetensors",)),
        Shipped(name="renamed-pt", make=then(lora(), renamed_to("adapter_model.pt")), cause=missing,
                hint=("adapter_model.safetensors",)),
        Shipped(name="capital", make=then(lora(), capital), cause=missing, hint=("adapter_config.json",)),
        Shipped(name="safetensors-as-bin", make=then(lora(), renamed_to("adapter_model.bin")), cause="file-corrupt",
                says=("safetensors",), hint=("adapter_model.safetensors",)),
        Shipped(name="deepspeed", make=OF_DEEPSPEED, cause=missing, hint=("DeepSpeed", "save_pretrained")),
        Shipped(name="fsdp", make=OF_FSDP, cause=missing, hint=("FSDP", "FULL_STATE_DICT")),
        Shipped(name="megatron", make=OF_MEGATRON, cause=missing, hint=("Megatron", "AutoBridge.export_adapter_ckpt")),
        Shipped(name="nemo", make=OF_NEMO, cause=missing, hint=("NeMo", "AutoBridge.export_adapter_ckpt")),
        Shipped(name="merged", make=merged_only, cause=missing, hint=("model",)),
        Shipped(name="merged-config-left", make=merged_by_mistake, cause=missing, hint=("model",)),
    )  # fmt: skip


def of_something_else() -> tuple[Shipped, ...]:
    """The two files are there, and hold what PEFT cannot use."""
    missing, config, targets = "keys-missing", "config-invalid", "targets-not-found"
    return (
        Shipped(name="merged-under-its-name", make=merged_over, cause=missing, hint=("model",)),
        Shipped(name="compiled", make=then(lora(), prefixed("_orig_mod.")), cause=missing,
                hint=("_orig_mod.", "torch.compile", "model._orig_mod")),
        Shipped(name="data-parallel", make=then(lora(), prefixed("module.")), cause=missing,
                hint=("module.", "model.module")),
        Shipped(name="zero-3-pickle", make=empty_pickle, cause="shape-mismatch", hint=("ZeRO-3",)),
        Shipped(name="byte-order-mark", make=then(lora(), with_mark), cause=config,
                hint=("UTF-8",)),
        Shipped(name="trailing-comma", make=then(lora(), with_comma), cause=config,
                says=("JSON",)),
        Shipped(name="alpha-null", make=then(lora(), configure(lora_alpha=None)), cause=config,
                says=("lora_alpha", "null")),
        Shipped(name="names-in-a-text", make=then(lora(), configure(target_modules="q_proj,v_proj")), cause=targets,
                hint=("target_modules",)),
        Shipped(name="expressions-in-a-list", make=then(lora(), configure(target_modules=[".*q_proj"])), cause=targets,
                hint=("target_modules",)),
        Shipped(name="all-excluded", make=then(lora(), configure(exclude_modules=["q_proj", "v_proj"])), cause=targets,
                says=("exclude_modules", "q_proj, v_proj")),
        Shipped(name="small-letters", make=then(lora(), configure(peft_type="lora")), cause="not-judged",
                hint=("'LORA'",)),
        Shipped(name="windows-no-base", base=None, make=then(lora(), configure(base_model_name_or_path=WINDOWS)),
                cause="not-judged", hint=("adapter_config.json", "base.model")),
        Shipped(name="on-another-adapter", base=None, make=on_another_adapter, path="second", cause="not-judged",
                hint=("adapter",)),
    )  # fmt: skip


SHIPPED = (*passing(), *in_another_place(), *of_something_else())
