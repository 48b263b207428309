"""Compares the places that name stop tokens, and the tokenizer's ids with the rows of the embedding.

In: the JSON of config.json, generation_config.json, and the tokenizer's files. Out: findings of `stop-tokens` and
`tokenizer-size`. The values are of unknown origin and may have any type.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from merge_gate.judging.kinds import STOP_TOKENS, TOKENIZER_SIZE
from merge_gate.records.terms import Finding, Origin, Severity
from merge_gate.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Json = Mapping[str, Any]

_ID = re.compile(r"\d{1,11}", re.ASCII)

TEXT_SECTIONS = ("text_config", "llm_config")
"""The sections of config.json that describe the language model of a model with several parts."""


def config_section(config: Json) -> Json:
    """The part of config.json that describes the language model."""
    sections = [config[name] for name in TEXT_SECTIONS if isinstance(config.get(name), dict)]
    return sections[0] if sections else config


def disagreements(files: Mapping[str, Json], generation_of_base: Json | None = None) -> Iterator[Finding]:
    """What the published files say about stop tokens in different ways.

    Args:
        files: the content of the published JSON files, by name.
        generation_of_base: the base's generation_config.json, if the adapter's own replaces it.
    """
    config, generation = files.get("config.json", {}), files.get("generation_config.json", {})
    of_config = _ids(config) or _ids(config_section(config))
    of_generation = _ids(generation)
    token, of_tokenizer = _end_token(files)
    stops = of_generation or of_config
    ignored = sorted((of_config | of_tokenizer) - stops) if stops else []
    if ignored:
        places = [
            f"generation_config.json has {_listed(of_generation)}",
            f"config.json has {_listed(of_config)}",
            f"the tokenizer has {_listed(of_tokenizer)} ({quoted(token)})" if token else "",
        ]
        yield _warning(
            STOP_TOKENS,
            f"the stop tokens disagree: {'; '.join(filter(None, places))}; generate() does not stop at "
            f"{_listed(set(ignored))}",
            "if the adapter was trained to end with that token, give the adapter its own generation_config.json "
            "with all stop tokens; otherwise no action is needed",
        )
    lost = sorted(_ids(generation_of_base or {}) - of_generation) if of_generation else []
    if lost:
        yield _warning(
            STOP_TOKENS,
            f"the adapter's generation_config.json has the stop tokens {_listed(of_generation)}, and the base's file "
            f"has {_listed(set(lost))} too, so generate() no longer stops there",
            "add them to eos_token_id in the adapter's generation_config.json, or remove that file",
        )


def oversized(files: Mapping[str, Json], rows: int | None) -> Iterator[Finding]:
    """Whether the tokenizer has an id that the embedding has no row for. `rows` None is unknown."""
    vocabulary = _vocabulary(files)
    largest = max(vocabulary.values(), default=-1)
    if rows is not None and largest >= rows:
        token = next(token for token, number in vocabulary.items() if number == largest)
        yield _warning(
            TOKENIZER_SIZE,
            f"the tokenizer has {quoted(token)} with the id {largest:,}, and the embedding has {rows:,} rows: a text "
            "with this token cannot be embedded",
            "save the adapter with the embedding that was resized for its tokenizer (save_embedding_layers=True)",
        )


def _ids(content: Json) -> set[int]:
    """The ids under `eos_token_id`, which is a number or a list of numbers."""
    value = content.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {number for number in values if type(number) is int}


def _end_token(files: Mapping[str, Json]) -> tuple[str, set[int]]:
    """The tokenizer's own end token, and its id; the set is empty if the id is unknown."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _text(files.get(name, {}).get("eos_token"))
        if token:
            number = _vocabulary(files).get(token)
            return token, set() if number is None else {number}
    return "", set()


def _vocabulary(files: Mapping[str, Json]) -> dict[str, int]:
    """The tokenizer's tokens and their ids, as far as its JSON files show them."""
    tokenizer = files.get("tokenizer.json", {})
    model = tokenizer.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else files.get("vocab.json", {})
    pairs: list[tuple[Any, Any]]
    if isinstance(listed, list):  # [token, score], and the id is the place
        pairs = [(row[0], place) for place, row in enumerate(listed) if isinstance(row, list) and row]
    else:
        pairs = list(listed.items()) if isinstance(listed, dict) else []
    added = tokenizer.get("added_tokens")
    added = added if isinstance(added, list) else []
    pairs += [(row.get("content"), row.get("id")) for row in added if isinstance(row, dict)]
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    rows = decoder.items() if isinstance(decoder, dict) else ()
    pairs += [(_text(row), int(number)) for number, row in rows if _ID.fullmatch(number)]
    pairs += list(files.get("added_tokens.json", {}).items())
    return {token: number for token, number in pairs if isinstance(token, str) and type(number) is int}


def _text(value: Any) -> str:
    """A token is a string, or an object with its `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _warning(check: str, message: str, hint: str) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, message=message, hint=hint, origin=Origin.FILE)
