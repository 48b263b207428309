"""Makes adapters with whatever PEFT is installed, and writes down what that PEFT merges them into.

Run by make_corpus.py.

In: a directory of bases, a directory to write to, as arguments. Out: for each kind that this release of PEFT has, the
adapter as its `save_pretrained` writes it, and `merged.json` beside it. Runs under releases of PEFT from 0.2.0 on and
transformers 4.36 to 5, so it imports nothing of this project, and asks each release only for what it has.

merged.json: `merged` has each tensor that the release's merge of the model in memory changed, `reloaded` each that its
merge of the saved file changes: shape, SHA-256 of the float32 bytes, and the values at some places. Where the release
itself cannot merge or reload, its words stand there instead.
"""

import hashlib
import inspect
import json
import sys
import traceback
import warnings
from pathlib import Path

import peft
import torch
import transformers

SAMPLED = 8

BASES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModel",
    "roberta": "AutoModelForSequenceClassification",
    "resnet": "AutoModel",
}
"""Name of the base, and the class that a trainer loads it with."""

QV = {"target_modules": ["q_proj", "v_proj"]}
LORA = QV | {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
CAUSAL = {"task_type": "CAUSAL_LM"}
HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
CONV = {"target_modules": ["convolution"]}
GPT2 = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "r": 2, "lora_dropout": 0.0, "fan_in_fan_out": True}
ADALORA = QV | CAUSAL | {"init_r": 3, "target_r": 2, "total_step": 10, "lora_dropout": 0.1}  # 0.4.0 needs some
MLP = {"target_modules": ["up_proj", "down_proj"]}


def lora(**settings):
    return ("llama", "LoraConfig", LORA | CAUSAL | settings)


KINDS = {
    "lora": lora(),
    "lora-alpha-half": lora(lora_alpha=1),
    "lora-no-task": ("llama", "LoraConfig", LORA),
    "lora-bias-all": lora(bias="all"),
    "lora-bias-only": lora(bias="lora_only"),
    "lora-saved": lora(modules_to_save=["lm_head"]),
    "lora-saved-embedding": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "lora-resized": ("llama+2", "LoraConfig", LORA | CAUSAL | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "lora-saved-norm": lora(modules_to_save=["norm"]),
    "lora-embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora-regex": lora(target_modules=r".*layers\.1.*\.(q|v)_proj"),
    "lora-layers": lora(layers_to_transform=[1], layers_pattern="layers"),
    "lora-patterns": lora(rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 8}),
    "lora-dropout": lora(lora_dropout=0.1),
    "lora-all-linear": lora(target_modules="all-linear"),
    "lora-rslora": lora(use_rslora=True),
    "lora-gaussian": lora(init_lora_weights="gaussian"),
    "lora-pissa": lora(init_lora_weights="pissa"),
    "lora-olora": lora(init_lora_weights="olora"),
    "lora-bias-term": lora(lora_bias=True),
    "lora-excluded": lora(target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"]),
    "lora-tokens": lora(trainable_token_indices={"embed_tokens": [3, 7]}),
    "dora": lora(use_dora=True),
    "dora-embedding": lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "lora-conv1d": ("gpt2", "LoraConfig", GPT2),
    "lora-conv1d-bias-all": ("gpt2", "LoraConfig", GPT2 | {"bias": "all"}),
    "lora-opt": ("opt", "LoraConfig", LORA | CAUSAL),
    "lora-opt-bias-only": ("opt", "LoraConfig", LORA | CAUSAL | {"bias": "lora_only"}),
    "lora-t5": (
        "t5", "LoraConfig", {"task_type": "SEQ_2_SEQ_LM", "r": 2, "target_modules": ["q", "v"], "lora_dropout": 0.0},
    ),
    "lora-bert": ("bert", "LoraConfig", {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.0}),
    "lora-bert-features": (
        "bert", "LoraConfig", HEAD | {"task_type": "FEATURE_EXTRACTION"},
    ),
    "lora-roberta": ("roberta", "LoraConfig", HEAD),
    "lora-roberta-bias-all": ("roberta", "LoraConfig", HEAD | {"bias": "all"}),
    "lora-roberta-bias-only": ("roberta", "LoraConfig", HEAD | {"bias": "lora_only"}),
    "lora-convolution": ("resnet", "LoraConfig", CONV | {"r": 2, "lora_dropout": 0.0}),
    "adalora": ("llama", "AdaLoraConfig", ADALORA),
    "adalora-bias-all": ("llama", "AdaLoraConfig", ADALORA | {"bias": "all"}),
    "ia3": ("llama", "IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"],
                                   "feedforward_modules": ["down_proj"]} | CAUSAL),
    "ia3-conv1d": ("gpt2", "IA3Config", {"target_modules": ["c_attn", "mlp.c_proj"],
                                         "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True} | CAUSAL),
    "ia3-roberta": ("roberta", "IA3Config", {"task_type": "SEQ_CLS", "target_modules": ["key", "value"],
                                             "feedforward_modules": []}),
    "ia3-convolution": ("resnet", "IA3Config", CONV | {"feedforward_modules": []}),
    "loha": ("llama", "LoHaConfig", QV | CAUSAL | {"r": 2, "alpha": 4}),
    "loha-mlp": ("llama", "LoHaConfig", MLP | CAUSAL | {"r": 2, "alpha": 2}),
    "loha-convolution": ("resnet", "LoHaConfig", CONV | {"r": 2, "alpha": 4}),
    "loha-convolution-effective": (
        "resnet", "LoHaConfig", CONV | {"r": 2, "alpha": 4, "use_effective_conv2d": True},
    ),
    "lokr": ("llama", "LoKrConfig", QV | CAUSAL | {"r": 2, "alpha": 4}),
    "lokr-rank-1": ("llama", "LoKrConfig", QV | CAUSAL | {"r": 1, "alpha": 1}),
    "lokr-both": ("llama", "LoKrConfig", MLP | CAUSAL | {"r": 2, "alpha": 4, "decompose_both": True}),
    "lokr-factor": ("llama", "LoKrConfig", MLP | CAUSAL | {"r": 2, "alpha": 4, "decompose_factor": 4}),
    "lokr-large-rank": ("llama", "LoKrConfig", QV | CAUSAL | {"r": 16, "alpha": 16}),
    "lokr-convolution": ("resnet", "LoKrConfig", CONV | {"r": 2, "alpha": 4}),
    "oft": ("llama", "OFTConfig", QV | CAUSAL | {"r": 4}),
    "oft-rank": ("llama", "OFTConfig", QV | CAUSAL | {"r": 4, "oft_block_size": 0}),
    "oft-block": ("llama", "OFTConfig", QV | CAUSAL | {"r": 0, "oft_block_size": 4}),
    "oft-coft": ("llama", "OFTConfig", QV | CAUSAL | {"r": 4, "oft_block_size": 0, "coft": True}),
    "boft": ("llama", "BOFTConfig", QV | CAUSAL | {"boft_block_size": 4}),
    "boft-factor": ("llama", "BOFTConfig", QV | CAUSAL | {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "vera": ("llama", "VeraConfig", CAUSAL | {"r": 2, "target_modules": ["q_proj", "o_proj"]}),
    "vera-not-saved": (
        "llama", "VeraConfig", CAUSAL | {"r": 2, "target_modules": ["q_proj", "o_proj"], "save_projection": False},
    ),
    "ln-tuning": ("llama", "LNTuningConfig", CAUSAL | {"target_modules": ["input_layernorm"]}),
    "fourierft": ("llama", "FourierFTConfig", QV | CAUSAL | {"n_frequency": 10}),
    "hra": ("llama", "HRAConfig", QV | CAUSAL | {"r": 2}),
    "bone": ("llama", "BoneConfig", QV | CAUSAL | {"r": 4}),
    "bone-bat": ("llama", "BoneConfig", QV | CAUSAL | {"r": 4, "init_weights": "bat"}),
    "miss": ("llama", "MissConfig", QV | CAUSAL | {"r": 4}),
    "vblora": ("llama", "VBLoRAConfig", QV | CAUSAL | {"r": 2, "num_vectors": 8, "vector_length": 4}),
    "c3a": ("llama", "C3AConfig", QV | CAUSAL | {"block_size": 4}),
    "randlora": ("llama", "RandLoraConfig", QV | CAUSAL | {"r": 2}),
    "shira": ("llama", "ShiraConfig", QV | CAUSAL | {"r": 2}),
    "road": ("llama", "RoadConfig", QV | CAUSAL | {"group_size": 4}),
    "trainable-tokens": ("llama", "TrainableTokensConfig", CAUSAL | {"token_indices": [3, 7]}),
    "waveft": ("llama", "WaveFTConfig", QV | CAUSAL | {"n_frequency": 10}),
    "gralora": ("llama", "GraloraConfig", QV | CAUSAL | {"r": 4, "gralora_k": 2}),
    "delora": ("llama", "DeloraConfig", QV | CAUSAL | {"r": 2}),
}  # fmt: skip
"""Name of the kind: the base, the config's class, its settings. `llama+2`: two tokens were added to the vocabulary."""


class AbsentError(Exception):
    """This release does not have the kind."""


def make_config(class_name, settings):
    cls = getattr(peft, class_name, None)
    if cls is None:
        raise AbsentError(class_name)
    known = set(inspect.signature(cls).parameters)
    if unknown := set(settings) - known:
        raise AbsentError(", ".join(sorted(unknown)))
    return cls(**settings)


def load(bases, name):
    plain, _, more = name.partition("+")
    model = getattr(transformers, BASES[plain]).from_pretrained(bases / plain)
    if more:
        torch.manual_seed(5)
        model.resize_token_embeddings(model.config.vocab_size + int(more))
    return model.float().eval()


def disturb(model, seed):
    """Training, in short: everything that would be trained moves a little."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.3 if "vblora" in name or "lora_" in name or "hada" in name or "lokr" in name else 0.05
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.add_(noise.to(parameter.dtype))


def merge(model):
    if hasattr(model.base_model, "merge_and_unload"):
        return model.base_model.merge_and_unload()
    for module in model.modules():  # 0.2.0 merges in eval mode
        if hasattr(module, "merge_weights"):
            module.merge_weights = True
            module.train()
            module.eval()
    return model.base_model.model


def describe(merged, base):
    """What differs from the base."""
    original = base.state_dict()
    changed = {}
    for name, tensor in merged.state_dict().items():
        if "lora_" in name or (name in original and torch.equal(original[name], tensor)):
            continue
        flat = tensor.detach().float().contiguous().view(-1)
        places = sorted({(i * flat.numel()) // SAMPLED for i in range(SAMPLED)})
        changed[name] = {
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
            "norm": float(flat.norm()),
            "values": [[i, float(flat[i])] for i in places],
        }
    return changed


def attempt(act):
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - an old release's own words are the record
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def name_base(path, base_name):
    """The path of the base on this machine is nobody's business."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": base_name}, indent=2) + "\n")


def make(kind, bases, out, seed):
    base_name, class_name, settings = KINDS[kind]
    config = make_config(class_name, dict(settings))
    base = load(bases, base_name)
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(bases, base_name), config)
    disturb(model, seed)
    model.eval()
    model.save_pretrained(str(out))
    record = {
        "kind": kind,
        "base": base_name,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "seed": seed,
    }
    record["merged"] = attempt(lambda: describe(merge(model), base))
    record["reloaded"] = attempt(
        lambda: describe(merge(peft.PeftModel.from_pretrained(load(bases, base_name), str(out)).eval()), base)
    )
    (out / "README.md").unlink(missing_ok=True)  # the empty card of newer releases
    name_base(out / "adapter_config.json", base_name)
    (out / "merged.json").write_text(json.dumps(record) + "\n")


def main():
    bases, out, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(KINDS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed, kind in enumerate(kinds, 1):
        directory = out / kind
        directory.mkdir(parents=True, exist_ok=True)
        try:
            make(kind, bases, directory, seed)
        except AbsentError as error:
            print(f"{peft.__version__} {kind}: absent ({error})")
            directory.rmdir()
        except Exception as error:  # noqa: BLE001 - as above
            print(f"{peft.__version__} {kind}: refused ({type(error).__name__}: {str(error)[:200]})")
            if "--trace" in sys.argv:
                traceback.print_exc()
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()
        else:
            print(f"{peft.__version__} {kind}: made")


if __name__ == "__main__":
    main()
