"""Compares the tokenizer and the chat template in a GGUF file with the files that they are made from.

In: a header, and the paths of the expected files. Out: what differs. Runs in the worker, and no code of the model.

1. The ids of bos, eos, unk, and pad, and the template, are those that llama.cpp's converter takes from these files
   (gguf.SpecialVocab).
2. Each token of tokenizer.json has its id. The converter writes some tokens otherwise: spaces for their marks, and
   WordPiece without its marks. It adds tokens up to the size of the vocabulary, which are not compared.
3. It leaves out a token whose id has no row in the embedding, and the id of such a special token: Gemma 3 of 1B has one
   for images.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import EngineError
from merge_gate._internal.regular_file import open_regular_file, read_all
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import listing, quoted
from merge_gate.features.quantized.gguf_file import GgufHeader
from merge_gate.features.quantized.measurement import TEMPLATE, Setting

_TOKENIZER, _MOST_BYTES, _LISTED = "tokenizer.json", 1 << 28, 3
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""The names of special tokens in tokenizer_config.json, and in the keys of a GGUF file."""

_EMBEDDING = "token_embd.weight"
_LINE_END = re.compile(r"\r\n|\r")


def differing_tokenizer(header: GgufHeader, files: Mapping[str, str]) -> Iterator[Setting]:
    """What differs. `files` are the expected ones: their names, and their paths.

    Raises:
        EngineError: the expected files cannot be read.
    """
    import gguf  # noqa: PLC0415 - of the extra

    if not any(name.startswith("tokenizer") for name in files):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            if "/" not in name:
                Path(folder, name).symlink_to(Path(path).absolute())
        try:
            special = gguf.SpecialVocab(folder, n_vocab=(count := _count(header)))
            tokens = {number: text for number, text in _tokens(Path(folder, _TOKENIZER)).items() if number < count}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"the expected tokenizer cannot be read: {str(error)[:200]}", hint="check the files of base and adapter"
            ) from error
    for name, word in _IDS.items():
        key = f"tokenizer.ggml.{word}_token_id"
        expected, actual = special.special_token_ids.get(name), header.keys.get(key)
        if expected is not None and actual != expected:
            yield Setting(name=key, actual=_shown(actual), expected=str(expected))
    yield from _differing_template(header, special.chat_template)
    yield from _differing_tokens(header, tokens)


def _count(header: GgufHeader) -> int:
    """So many tokens can be in the file: the rows of its embedding, which are compared elsewhere."""
    embedding = header.tensors.get(_EMBEDDING)
    return max(len(header.tokens), embedding.shape[0] if embedding is not None else sys.maxsize)


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)[:60]


def _differing_template(header: GgufHeader, expected: Any) -> Iterator[Setting]:
    if isinstance(expected, list):
        expected = next((item.get("template") for item in expected if item.get("name") == "default"), None)
    actual = header.keys.get(TEMPLATE)
    texts = [_LINE_END.sub("\n", text) if isinstance(text, str) else None for text in (actual, expected)]
    if texts[0] != texts[1]:
        first, second = (text if text is None else f"{len(text):,} characters" for text in texts)
        yield Setting(name=TEMPLATE, actual=_shown(first), expected=_shown(second))


def _tokens(path: Path) -> dict[int, str]:
    """The tokens of a tokenizer.json by their ids; none if there is no such file, as with SentencePiece alone."""
    if not path.exists():
        return {}
    with open_regular_file(path, follow=True) as file:
        try:
            content = parse_strictly(read_all(file, _MOST_BYTES), constant=float)
        except InvalidJsonError as error:
            raise ValueError(str(error)) from error
    vocabulary = content["model"].get("vocab") or {}
    by_id = (
        {number: str(item[0]) for number, item in enumerate(vocabulary)}
        if isinstance(vocabulary, list)
        else {int(number): str(text) for text, number in vocabulary.items()}
    )
    return by_id | {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or []}


def _differing_tokens(header: GgufHeader, expected: Mapping[int, str]) -> Iterator[Setting]:
    kind, tokens = header.keys.get("tokenizer.ggml.model"), header.tokens
    odd = [
        (number, tokens[number] if number < len(tokens) else None, text)
        for number, text in sorted(expected.items())
        if number >= len(tokens) or _plain(tokens[number], kind) != _plain(text, kind)
    ]
    if odd:
        shown = [f"{number:,} {_quoted(actual)}, expected {_quoted(text)}" for number, actual, text in odd]
        name = f"tokens ({len(odd):,} of {len(expected):,} differ)"
        yield Setting(name=name, actual=listing(shown, _LISTED), expected="")


def _quoted(text: str | None) -> str:
    return "absent" if text is None else quoted(text, 40)


def _plain(token: str, kind: Any) -> str:
    """A token without what the converter rewrites."""
    text = token.replace("\u2581", " ").replace("\ufffd", "")
    if kind == "bert":
        text = text.removeprefix("##")
    return text.strip() or text
