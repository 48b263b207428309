"""Makes the corpus: adapters of old releases of PEFT, each made by that release, with what it merges them into.

`python -m tests.tools.make_corpus DIRECTORY [RELEASE...]` writes `DIRECTORY/bases`, and
`DIRECTORY/adapters/RELEASE/KIND` for each kind of train_corpus.py that the release has. Each release is installed from
the package index into a directory of its own
that is searched before this environment, with the transformers of its time; torch is this environment's. Takes about a
minute per release. What tests/corpus/adapters holds is a part of it, copied by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

LIBRARIES = {
    "4.36.2": ("transformers==4.36.2", "tokenizers<0.19,>=0.14", "huggingface_hub<0.26,>=0.19.3", "accelerate==0.25.0"),
    "4.48.3": ("transformers==4.48.3", "tokenizers<0.22,>=0.21", "huggingface_hub<1,>=0.24", "accelerate==1.3.0"),
}
RELEASES = {
    "0.2.0": "4.36.2", "0.3.0": "4.36.2", "0.4.0": "4.36.2", "0.5.0": "4.36.2", "0.6.2": "4.36.2", "0.7.1": "4.36.2",
    "0.8.2": "4.36.2", "0.9.0": "4.36.2", "0.10.0": "4.36.2", "0.11.1": "4.36.2", "0.12.0": "4.36.2",
    "0.13.2": "4.36.2", "0.14.0": "4.48.3", "0.15.2": "4.48.3", "0.16.0": "4.48.3", "0.17.1": "4.48.3",
    "0.18.1": None, "0.19.1": None, "0.20.0": None,
}  # fmt: skip
"""PEFT and the transformers that it is run with; None: this environment's."""

SIZES = {"vocab_size": 32}


def make_bases(directory: Path) -> None:
    """Seven tiny models with seeded noise; biases and head are not zero."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "max_position_embeddings": 32}
    encoder = SIZES | small | {"intermediate_size": 24}
    llama = transformers.LlamaConfig(
        **encoder, num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True, pad_token_id=0
    )
    gpt2 = transformers.GPT2Config(
        **SIZES, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    opt = transformers.OPTConfig(**SIZES, **small, ffn_dim=24, word_embed_proj_dim=16)
    t5 = transformers.T5Config(
        **SIZES, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    resnet = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    roberta = transformers.RobertaConfig(**encoder | {"max_position_embeddings": 34}, num_labels=3)
    torch.manual_seed(0)
    models = {
        "llama": transformers.LlamaForCausalLM(llama),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "opt": transformers.OPTForCausalLM(opt),
        "t5": transformers.T5ForConditionalGeneration(t5),
        "bert": transformers.BertModel(transformers.BertConfig(**encoder)),
        "roberta": transformers.RobertaForSequenceClassification(roberta),
        "resnet": transformers.ResNetModel(resnet),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(directory / name)


def install(target: Path, *packages: str) -> Path:
    """Put packages into a directory of their own, once."""
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, *packages], check=True)
    return target


def make(directory: Path, release: str) -> None:
    """All kinds that one release has."""
    paths = [install(directory / "packages" / f"peft-{release}", f"peft=={release}")]
    if libraries := RELEASES[release]:
        paths.append(install(directory / "packages" / f"transformers-{libraries}", *LIBRARIES[libraries]))
    script = Path(__file__).with_name("train_corpus.py")
    subprocess.run(
        [sys.executable, "-P", str(script), str(directory / "bases"), str(directory / "adapters" / release)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"},
        check=True,
    )


def main() -> None:
    directory, releases = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(RELEASES)
    if not (directory / "bases").exists():
        make_bases(directory / "bases")
    for release in releases:
        make(directory, release)


if __name__ == "__main__":
    main()
