"""The names of the files that a model may have next to its weights: what each file is, and which ones no loader reads.

In: the name of a file, relative to its directory. Out: its kind, or None for a file that is not published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates that have a name of their own."""


class Companion(StrEnum):
    """What a file next to the weights is for."""

    CONFIG = "config"
    GENERATION = "generation"
    TOKENIZER = "tokenizer"
    TEMPLATE = "chat template"
    PROCESSOR = "processor"
    LICENSE = "license"


_NAMES = {
    Companion.CONFIG: r"config\.json",
    Companion.GENERATION: r"generation_config\.json",
    Companion.TOKENIZER: r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|tekken\.json|([a-z_]+_)?vocab(-src|-tgt)?\.json|vocab\.(txt|bpe)|merges\.txt|encoder\.json|bpe\.codes|dict\.txt"
    r"|(spiece|sentencepiece(\.bpe)?|spm|spm_char|tiktoken)\.model|(source|target)\.spm|[\w-]+\.tiktoken"
    r"|normalizer\.json|emoji\.json|byte_maps\.json|word_(shape|pronunciation)\.json",
    Companion.TEMPLATE: rf"chat_template\.(jinja|json)|{TEMPLATES}/[\w-]+\.jinja",
    Companion.PROCESSOR: r"((image_|video_|audio_)?pre)?processor_config\.json",
    Companion.LICENSE: r"(?i:licen[cs]e|notice|copying|(acceptable_)?use_policy|third[-_]party[-_]notices?)"
    r"([-_][\w-]+)?(\.(txt|md|rst|pdf|html))?",
}


def companion_kind(name: str) -> Companion | None:
    """What the file is for; None if a file of this name is not published."""
    return next((kind for kind, pattern in _NAMES.items() if re.fullmatch(pattern, name, re.ASCII)), None)


def of_kind(names: Iterable[str], kind: Companion) -> set[str]:
    return {name for name in names if companion_kind(name) is kind}


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def replaced(of_base: Iterable[str], own: Iterable[str], *, has_template: bool) -> set[str]:
    """The base's files that give way to the adapter's own tokenizer or chat template.

    `has_template`: the adapter's tokenizer_config.json has a chat template.
    """
    names, dropped = set(own), set()
    if any(name in names for name in _VOCABULARIES):
        dropped |= of_kind(of_base, Companion.TOKENIZER)
    if has_template or any(companion_kind(name) is Companion.TEMPLATE for name in names):
        dropped |= of_kind(of_base, Companion.TEMPLATE)
    return dropped


_HARMLESS = re.compile(
    r"(.*/)?(readme(\.txt)?|[^/]+\.(md|rst|pdf|html|log|png|jpe?g|gif|svg|webp)|\.git(attributes|ignore)|\.ds_store)"
    r"|mergekit_config\.yml|\.git/|\.cache/huggingface/(cachedir\.tag|download/([^/]+/)*[^/]+\.(metadata|lock))",
    re.ASCII | re.IGNORECASE,
)
_TEXTS = re.compile(r".+\.(json|py|txt|jinja|ya?ml|toml|model|spm|tiktoken|csv)", re.ASCII)
_OF_WEIGHTS = re.compile(r"(.*/)?(.+\.index\.json|adapter_[^/]*)", re.ASCII | re.IGNORECASE)


def is_harmless(name: str) -> bool:
    """Whether no loader reads the file as weights, code, a tokenizer, a template, or settings."""
    kind = companion_kind(name.rpartition("/")[2])
    return kind is Companion.LICENSE or (kind is None and _HARMLESS.fullmatch(name) is not None)


def is_carried(name: str) -> bool:
    """Whether a model may have a copy of this file of its base, of a kind of its own, such as code.

    No file of the base's weights is one: these are the weights of the unmerged model.
    """
    return _TEXTS.fullmatch(name) is not None and _OF_WEIGHTS.fullmatch(name) is None
