"""Compares tokenizer, chat template, and stop tokens of a finished directory with those of the adapter or base.

In: three directories, all hostile. Out: findings. The adapter's own copy of a file is expected; without one, the
base's. Files are compared by their meaning, because libraries write the same tokenizer in several ways. Their code
never runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate.files.json_object import read_as_transformers
from merge_gate.judging.answer_kinds import finding
from merge_gate.records.terms import Finding
from merge_gate.regular_file import open_regular_file, read_all
from merge_gate.text import counted, listing, quoted

MOST_BYTES = 200_000_000
MOST_TEMPLATE_BYTES = 4_000_000

_TOKENIZER = "tokenizer.json"
_OTHER_TOKENIZERS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_SPECIAL = ("bos_token", "unk_token", "add_bos_token", "add_eos_token")
_LISTED = 5


def settings_findings(merged: str, base: str, adapter: str) -> Iterator[Finding]:
    """The findings on everything except the weights."""
    folders = [Path(folder) for folder in (adapter, base)]
    yield from _pickles(Path(merged))
    yield from _declared_dtype(Path(merged), Path(base))
    yield from _tokenizer(Path(merged), folders)
    yield from _chat_template(Path(merged), folders)
    yield from _stop_tokens(Path(merged), *folders)


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    return read_as_transformers(folder / name, MOST_BYTES)


def _digest(path: Path) -> str | None:
    try:
        with open_regular_file(path, follow=True) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _pickles(merged: Path) -> Iterator[Finding]:
    names = sorted(path.name for path in merged.glob("pytorch_model*.bin"))
    if names:
        yield finding(
            "stale-shards",
            f"{counted(len(names), 'pickled weight file')} in the directory, which transformers does not load: "
            f"{listing([quoted(name, 120) for name in names], _LISTED)}",
        )


def _declared_dtype(merged: Path, base: Path) -> Iterator[Finding]:
    """The dtype in config.json, in which servers load the weights."""
    old, new = (_dtype_in(_json(folder, "config.json") or {}) for folder in (base, merged))
    if old is not None and new is not None and old != new:
        yield finding("dtype-changed", f"config.json declares {_shown(new)}, expected {_shown(old)} as in the base")


def _dtype_in(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    places = (one.get(key) for one in (config, inner) for key in ("dtype", "torch_dtype"))
    return next((one for one in places if isinstance(one, str)), None)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (_TOKENIZER, *_OTHER_TOKENIZERS) if (folder / name).is_file()}


def _tokenizer(merged: Path, folders: list[Path]) -> Iterator[Finding]:
    source = next((folder for folder in folders if _tokenizer_files(folder)), None)
    if source is None:
        return
    expected, actual = _tokenizer_files(source), _tokenizer_files(merged)
    if not actual:
        yield finding("tokenizer-differs", f"there is no tokenizer, expected {listing(map(quoted, expected))}")
        return
    parts = list(_different_parts(source, merged, expected.keys() & actual.keys()))
    if not expected.keys() & actual.keys():
        parts = [f"{listing(map(quoted, actual))} instead of {listing(map(quoted, expected))}"]
    parts += [f"{key} is {_shown(new)}, expected {_shown(old)}" for key, old, new in _special(source, merged)]
    if parts:
        yield finding("tokenizer-differs", f"the tokenizer differs: {listing(parts, _LISTED)}")


def _different_parts(source: Path, merged: Path, names: set[str]) -> Iterator[str]:
    if _TOKENIZER in names:
        first, second = _json(source, _TOKENIZER), _json(merged, _TOKENIZER)
        if first is None or second is None:
            if _digest(source / _TOKENIZER) != _digest(merged / _TOKENIZER):
                yield f"{_TOKENIZER} cannot be read"
            return
        yield from _parts_of(first, second)
        return
    for name in sorted(names):
        if _digest(source / name) != _digest(merged / name):
            yield f"{name} has other bytes"


def _parts_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    old, new = _vocabulary(first), _vocabulary(second)
    if old != new:
        changed = [token for token in old.keys() | new.keys() if old.get(token) != new.get(token)]
        shown = listing([quoted(token, 40) for token in sorted(changed)], _LISTED)
        yield f"{counted(len(changed), 'token')} with other ids ({shown})"
    if _merges(first) != _merges(second):
        yield "the merges of the vocabulary"
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        try:
            differs = _adding(first.get(part)) != _adding(second.get(part))
        except RecursionError:  # no tokenizer is nested so deeply
            differs = True
        if differs:
            yield f"its {part}"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, Any] = {}
    if isinstance(vocab, dict):
        ids = dict(vocab)
    elif isinstance(vocab, list):
        ids = {
            str(entry[0]): (number, str(entry[1:]))
            for number, entry in enumerate(vocab)
            if isinstance(entry, list) and entry
        }
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            ids[str(entry.get("content"))] = entry.get("id")
    return ids


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Written as "a b" by some releases, and as ["a", "b"] by others."""
    model = tokenizer.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    return (
        [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in merges]
        if isinstance(merges, list)
        else []
    )


def _adding(part: Any) -> Any:
    """A part of a tokenizer; None for a template without tokens: transformers 5 writes it if there was none."""
    plain = _plain(part)
    is_template = isinstance(plain, dict) and plain.get("type") == "TemplateProcessing"
    return None if is_template and not plain.get("special_tokens") else plain


def _plain(value: Any) -> Any:
    """Without settings that say nothing: releases differ in whether they write them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one not in (None, False, [], {})}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _special(source: Path, merged: Path) -> Iterator[tuple[str, Any, Any]]:
    first, second = _json(source, _TOKENIZER_CONFIG), _json(merged, _TOKENIZER_CONFIG)
    for key in _SPECIAL if first is not None and second is not None else ():
        old, new = _content((first or {}).get(key)), _content((second or {}).get(key))
        if old is not None and new is not None and old != new:
            yield key, old, new


def _content(token: Any) -> Any:
    """The text of a token, which may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _shown(value: Any) -> str:
    return "absent" if value is None else quoted(str(value), 60)


# --- the chat template -----------------------------------------------------------------------------------------------


def _templates(folder: Path) -> dict[str, str]:
    """The templates by name, from whichever file has them."""
    try:
        with open_regular_file(folder / _TEMPLATES[0], follow=True) as file:
            return {"default": read_all(file, MOST_TEMPLATE_BYTES).decode("utf-8", "replace").rstrip()}
    except OSError:
        pass
    for name in (_TOKENIZER_CONFIG, _TEMPLATES[1]):
        written = (_json(folder, name) or {}).get("chat_template")
        if isinstance(written, str):
            return {"default": written.rstrip()}
        if isinstance(written, list):
            return {str(one.get("name")): str(one.get("template")).rstrip() for one in written if isinstance(one, dict)}
    return {}


def _chat_template(merged: Path, folders: list[Path]) -> Iterator[Finding]:
    expected = next((found for folder in folders if (found := _templates(folder))), {})
    actual = _templates(merged)
    if expected == actual:
        return
    if not actual:
        message = "there is no chat template, expected one"
    elif not expected:
        message = "there is a chat template, expected none: adapter and base have none"
    else:
        names = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        message = f"the chat template {listing([quoted(name, 60) for name in names])} has another text"
    yield finding("chat-template-differs", message)


# --- the stop tokens -------------------------------------------------------------------------------------------------


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(one for one in values if isinstance(one, int) and not isinstance(one, bool))


def _stop_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text: of generation_config.json, or else of config.json."""
    generation = _json(folder, "generation_config.json") or {}
    config = _json(folder, "config.json") or {}
    text = config.get("text_config")
    inner = text.get("eos_token_id") if isinstance(text, dict) else None
    places = (generation.get("eos_token_id"), config.get("eos_token_id"), inner)
    return next((ids for place in places if (ids := _ids(place))), frozenset())


def _eos(folder: Path) -> Any:
    return _content((_json(folder, _TOKENIZER_CONFIG) or {}).get("eos_token"))


def _stop_tokens(merged: Path, adapter: Path, base: Path) -> Iterator[Finding]:
    expected, actual = _stop_ids(adapter) or _stop_ids(base), _stop_ids(merged)
    lost, more = sorted(expected - actual), sorted(actual - expected)
    parts = []
    if expected and (lost or (more and not _is_of_tokenizer(more, adapter))):
        parts.append(f"the ids {sorted(actual)}, expected {sorted(expected)}")
    eos = _eos(adapter) or _eos(base)
    if eos is not None and _eos(merged) not in (None, eos):
        parts.append(f"eos_token {_shown(_eos(merged))}, expected {_shown(eos)}")
    if parts:
        yield finding(
            "stop-tokens-differ",
            f"the stop tokens differ: {'; '.join(parts)}",
            measured=(("lost", float(len(lost))),),
        )


def _is_of_tokenizer(ids: list[int], adapter: Path) -> bool:
    """Whether these are the id of the end token in the adapter's own tokenizer: training may add it to the config."""
    eos = _eos(adapter)
    vocabulary = _vocabulary(_json(adapter, _TOKENIZER) or {})
    return eos is not None and [vocabulary.get(str(eos))] == ids
