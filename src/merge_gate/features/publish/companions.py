"""Chooses the files next to the weights of a published model: config, tokenizer, chat template, processor, license.

In: the directories of base and adapters, which are hostile, and what the merge changed. Out: the bytes of each file,
and findings. Files are copied, and config.json is changed only where the tensors have changed.

1. Read the files whose names are on the allow-list (companion_names.py). A link may lead to another file of the
   directory or of its own repository in the Hub's cache, and no further.
2. The adapter's own copy replaces that of the base, except config.json and licenses. Tokenizer and chat template are
   replaced as a whole: half of a tokenizer would be worse than either.
3. Change in config.json what is no longer true: the size of the vocabulary, the dtype, the quantization.
   References to code are removed, because code is not published.
4. Compare the stop tokens, and the tokenizer with the embedding.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_gate._internal.companion_names import TEMPLATES, Companion, companion_kind, replaced
from merge_gate._internal.errors import NotPublishedError
from merge_gate._internal.regular_file import open_regular_file, read_all
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.publish.declared import PUBLISHED_FILES, STOP_TOKENS, TOKENIZER_SIZE
from merge_gate.features.publish.manifest import PublicationFacts
from merge_gate.features.publish.weight_files import FLOATING_STORED
from merge_gate.files.base_files import loaded_files
from merge_gate.files.headers import shown
from merge_gate.files.identity import identity_of
from merge_gate.records.files import CARD_NAME, CONFIG_NAME, EXPORT_NAME, PICKLE_NAME, WEIGHTS_NAME, FileIdentity
from merge_gate.records.terms import PRESERVE, Finding, Origin, Severity, record

_MOST_BYTES = 256 * 1024 * 1024
_POINTER = b"version https://git-lfs"
_CODE = ("auto_map", "custom_pipelines")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_QUANTIZATIONS = ("quantization_config", "compression_config")
_ADAPTER_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME, EXPORT_NAME, PICKLE_NAME})
_LISTED = 8
_MODULES = "modules.json"
_COPY_NEEDED = "if the program that loads the model needs one of them, review it and copy it"
_COPY_POOLING = (
    f"for sentence-transformers, review and copy {_MODULES} and the folders that it names, such as 1_Pooling: without "
    "them the model may pool in another way"
)

_TEXT_SECTIONS = ("text_config", "llm_config")
"""The sections of config.json that describe the language model of a model with several parts."""

_INDENT = re.compile(r"\{\r?\n([ \t]+)")
_ID = re.compile(r"\d{1,11}", re.ASCII)

Json = Mapping[str, Any]
Identities = Mapping[str, Mapping[str, FileIdentity]]
"""By directory, the files next to the weights as they were when the run began."""

Place = tuple[str, ...]
"""The place of an object in a JSON document: the keys that lead to it."""

Chosen = dict[str, tuple[str, bytes]]
"""The files to be published, by name: whose each is, `base` or `adapter`, and its bytes."""


@record
class CompanionFiles:
    """The files of one directory. `others` are the names that are not on the allow-list, without hidden files."""

    files: dict[str, bytes]
    others: tuple[str, ...] = ()

    @property
    def without_config(self) -> dict[str, bytes]:
        """The files without config.json: that of an adapter is not published."""
        return {name: data for name, data in self.files.items() if companion_kind(name) is not Companion.CONFIG}


def read_inputs(
    base_directory: str, adapter_directories: Iterable[str], facts: PublicationFacts, seen: Identities
) -> list[CompanionFiles]:
    """The files next to the weights of the base, and those of each adapter; `seen` has the expected ones.

    Raises:
        NotPublishedError: a file cannot be copied, or is not the expected one.
    """
    loaded = {file.name: file for file in facts.base_identity}  # config.json, as the merge has read it
    of_base = seen.get(base_directory)
    of_base = of_base and {name: loaded.get(name, file) for name, file in of_base.items()}
    adapters = (read_companions(directory, "the adapter", seen.get(directory)) for directory in adapter_directories)
    return [read_companions(base_directory, "the base", of_base), *adapters]


def companions_of(
    base_directory: str, read: Sequence[CompanionFiles], facts: PublicationFacts
) -> tuple[Chosen, list[Finding]]:
    """The files that belong next to the weights of a published model, and what there is to say about them.

    Raises:
        NotPublishedError: a file is not what its name says, or config.json would not fit the tensors.
    """
    base, *adapters = read
    own, notes = _common(adapters)
    # 2. The adapter's own files.
    files = {name: ("base", data) for name, data in base.without_config.items()}
    notes += _replace(files, own)
    # 3. Texts that would no longer be true.
    files["config.json"] = ("base", _config(base.files.get("config.json"), facts))
    notes += _remove_code(files)
    notes += _left_out(base_directory, base, adapters)
    # 4. Comparisons.
    contents = {name: content for name, file in files.items() if isinstance(content := _parsed(name, *file), dict)}
    generation = _object(base.files.get("generation_config.json")) if "generation_config.json" in own else None
    return files, [*_disagreements(contents, generation), *_oversized(contents), *notes]


# --- 1. --------------------------------------------------------------------------------------------------------------


def companion_identities(directory: str) -> dict[str, FileIdentity]:
    """The identities of the files that may be published. What cannot be looked at is left out, and is refused later."""
    identities: dict[str, FileIdentity] = {}
    with contextlib.suppress(OSError):
        for name in _names(Path(directory)):
            if companion_kind(name) is not None:
                identities[name] = identity_of(name, Path(directory, name).stat())
    return identities


def read_companions(directory: str, owner: str, expected: Mapping[str, FileIdentity] | None = None) -> CompanionFiles:
    """The files next to the weights. `owner` is what messages call the directory's owner, such as `the base`.

    `expected` has the identities of the files when the run began; None accepts any.

    Raises:
        NotPublishedError: a file on the allow-list cannot be read, is too large, is a Git LFS pointer, is a link to
            another place, or is not the expected one.
    """
    folder = Path(directory)
    files: dict[str, bytes] = {}
    read: dict[str, FileIdentity] = {}
    others: list[str] = []
    try:
        for name in _names(folder):
            if companion_kind(name) is None:
                others.append(name)
            else:
                files[name], read[name] = _read(folder, name, owner)
                if sum(map(len, files.values())) > _MOST_BYTES:
                    raise NotPublishedError(
                        f"the files next to the weights of {owner} have more than {_MOST_BYTES:,} bytes",
                        hint=f"remove what is not needed from {shown(directory)}",
                    )
    except OSError as error:
        raise NotPublishedError(
            f"the directory of {owner} cannot be read: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error
    if expected is not None and read != expected:
        other = min(name for name in {*read, *expected} if read.get(name) != expected.get(name))
        raise NotPublishedError(
            f"{shown(other)} of {owner} was added, removed, or written to during the run",
            hint="let nothing write to that directory during the run, and run the gate again",
        )
    return CompanionFiles(files=files, others=tuple(others))


def _names(folder: Path) -> list[str]:
    """The names in the directory, without hidden files, and those of the chat templates in their folder."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.name == TEMPLATES and entry.is_dir(follow_symlinks=False):
            names += [f"{TEMPLATES}/{template.name}" for template in os.scandir(entry.path)]
        else:
            names.append(entry.name + "/" * entry.is_dir())
    return sorted(names)


def _read(folder: Path, name: str, owner: str) -> tuple[bytes, FileIdentity]:
    what = f"{shown(name)} of {owner}"
    try:
        place = _within(folder, name, what)
        with open_regular_file(place) as file:
            data = read_all(file, _MOST_BYTES)
            identity = identity_of(name, os.fstat(file.fileno()))
    except OSError as error:
        raise NotPublishedError(
            f"{what} cannot be read: {error.strerror or error}",
            hint="correct that file, or remove it if the model does not need it",
        ) from error
    if data.startswith(_POINTER):
        raise NotPublishedError(
            f"{what} is a Git LFS pointer, expected the file itself",
            hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
        )
    return data, identity


def _within(folder: Path, name: str, what: str) -> Path:
    """The file itself, if a link leads to it. The Hub's cache links from a snapshot to the repository's blobs."""
    top = folder.resolve()
    place = (top / name).resolve(strict=True)
    is_blob = top.parent.name == "snapshots" and top.parent.parent / "blobs" in place.parents
    is_companion = top in place.parents and companion_kind(place.relative_to(top).as_posix()) is not None
    if not is_blob and not is_companion:
        raise NotPublishedError(
            f"{what} is a link to {shown(str(place))}, expected such a file of its directory",
            hint="replace the link by a copy of the file: what a link leads to might not be meant for publication",
        )
    return place


# --- 2. --------------------------------------------------------------------------------------------------------------


def _common(adapters: Iterable[CompanionFiles]) -> tuple[dict[str, bytes], list[Finding]]:
    """The adapter's own files. Those of a combination count only if all members have the same ones."""
    first, *others = [adapter.without_config for adapter in adapters]
    if all(other == first for other in others):
        return first, []
    return {}, [
        _note("the members of the combination have different files next to their weights, so the base's files are used")
    ]


def _replace(files: Chosen, own: Mapping[str, bytes]) -> list[Finding]:
    """Put the adapter's own files into `files`, and return notes about the base's files that they replace."""
    settings = _object(own.get("tokenizer_config.json")) or {}
    dropped = replaced(files, own, has_template=bool(settings.get("chat_template")))
    for name in dropped:
        del files[name]
    for name, data in own.items():
        if companion_kind(name) is Companion.LICENSE and name in files and files[name][1] != data:
            name = f"adapter-{name}"  # noqa: PLW2901 - the license of the base stays
        files[name] = ("adapter", data)
    gone = sorted(dropped - set(own))
    if not gone:
        return []
    message = "the adapter has its own tokenizer or chat template, so these files of the base were left out"
    return [_note(f"{message}: {listing(map(shown, gone), _LISTED)}")]


def _left_out(base_directory: str, base: CompanionFiles, adapters: Iterable[CompanionFiles]) -> list[Finding]:
    """Notes about the files that are not on the allow-list."""
    expected = {*loaded_files(base_directory).all_files, CARD_NAME}
    of_base = sorted(set(base.others) - expected)
    of_adapter = sorted({name for adapter in adapters for name in adapter.others} - _ADAPTER_FILES - {CARD_NAME})
    return [
        _note(
            f"not published: {counted(len(names), 'file')} of {owner} ({listing(map(shown, names), _LISTED)})",
            _COPY_POOLING if _MODULES in names else _COPY_NEEDED,
        )
        for owner, names in (("the base", of_base), ("the adapter", of_adapter))
        if names
    ]


# --- 3. --------------------------------------------------------------------------------------------------------------


def _config(data: bytes | None, facts: PublicationFacts) -> bytes:
    """config.json, changed where the tensors have changed. Without a change, these are the base's bytes."""
    if data is None or (config := _object(data)) is None:
        raise NotPublishedError(
            "config.json of the base cannot be read as a JSON object", hint="fetch the base again, or correct the file"
        )
    if facts.config.trust_remote_code and any("auto_map" in section for section in (config, _text_section(config))):
        raise NotPublishedError(
            "the base needs its own code (`auto_map` in config.json), and merge-gate does not publish code",
            hint="if transformers has this architecture itself, set trust-remote-code: false",
        )
    rows = _resized_rows(facts, config)
    with _as_json("config.json", "base"):
        config |= facts.settings
        if rows is not None:
            for section in _vocabulary_sections(config, rows[0]):
                section["vocab_size"] = rows[1]
        if facts.spec.dtype != PRESERVE:
            for place, section in _objects(config):
                if not any(name in _QUANTIZATIONS for name in place):
                    section.update({key: facts.spec.dtype for key in _DTYPE_KEYS if isinstance(section.get(key), str)})
        if facts.is_dequantized:
            _remove(config, _QUANTIZATIONS)
        return _written(config, data)


def _resized_rows(facts: PublicationFacts, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows of the embedding before and after, if the merge has changed them.

    Raises:
        NotPublishedError: other tensors have other shapes, or the base does not store them.
    """
    is_plain = not facts.is_dequantized  # else the shapes of packed tensors say nothing
    base_shapes = {
        tensor.name: tensor.shape for tensor in facts.base_tensors if is_plain or tensor.dtype in FLOATING_STORED
    }
    shapes = {tensor.name: tensor.shape for tensor in facts.tensors if is_plain or tensor.name in base_shapes}
    added = [name for name in shapes if name not in base_shapes]
    if added and (not facts.settings or {**config, **facts.settings}.get("model_type") != config.get("model_type")):
        raise NotPublishedError(
            f"the merge has {counted(len(added), 'tensor')} that the base does not store "
            f"({listing(map(shown, added), _LISTED)}), so the base's config.json describes another model "
            f"(architectures: {shown(str(config.get('architectures')))})",
            hint="use a base that has this head, saved by transformers with the labels of the adapter",
        )
    changed = {name: (old, shapes[name]) for name, old in base_shapes.items() if old != shapes.get(name, old)}
    if not changed:
        return None
    rows = {(old[:1], new[:1]) for old, new in changed.values()}
    if len(rows) == 1 and all(old[1:] == new[1:] for old, new in changed.values()):
        ((before, after),) = rows
        if before and after and before[0] in (config.get("vocab_size"), _text_section(config).get("vocab_size")):
            return before[0], after[0]
    shapes_of = [f"{shown(name)} ({list(old)} to {list(new)})" for name, (old, new) in changed.items()]
    raise NotPublishedError(
        f"the merge changes the shape of {listing(shapes_of, 3)}, and the base's config.json does not describe this: "
        "it has no vocab_size of that many rows",
        hint="use a base whose shapes the adapter does not change, or save the base with the new shapes first",
    )


def _vocabulary_sections(config: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """The objects of config.json with the old size of the vocabulary: the whole, and that of the language model.

    Raises:
        NotPublishedError: another part of the model has the same size, and its tensors may have kept it.
    """
    sections = {place: section for place, section in _objects(config) if section.get("vocab_size") == rows}
    texts = [(name,) for name in _TEXT_SECTIONS]
    others = sorted(".".join((*place, "vocab_size")) for place in sections if place and place not in texts)
    if others:
        raise NotPublishedError(
            "the merge changes the size of the vocabulary, and config.json has it in several parts of the model "
            f"({listing(others)})",
            hint="save the base with the new vocabulary first, and use it as the adapter's base",
        )
    return list(sections.values())


def _remove_code(files: Chosen) -> list[Finding]:
    """Remove the references to code from the configurations: the code itself is not published."""
    changed = []
    for name, (origin, before) in files.items():
        if not name.endswith("config.json") or not isinstance(content := _parsed(name, origin, before), dict):
            continue
        with _as_json(name, origin):
            _remove(content, _CODE)
            data = _written(content, before)
        if data != before:
            files[name] = (origin, data)
            changed.append(name)
    return [_note(f"the reference to code was removed from {listing(map(shown, sorted(changed)))}")] if changed else []


# --- 4. --------------------------------------------------------------------------------------------------------------

# The values are of unknown origin and may have any type.


def _text_section(config: Json) -> Json:
    """The part of config.json that describes the language model."""
    sections = [config[name] for name in _TEXT_SECTIONS if isinstance(config.get(name), dict)]
    return sections[0] if sections else config


def _disagreements(files: Mapping[str, Json], generation_of_base: Json | None = None) -> Iterator[Finding]:
    """What the published files say about stop tokens in different ways.

    Args:
        files: the content of the published JSON files, by name.
        generation_of_base: the base's generation_config.json, if the adapter's own replaces it.
    """
    config, generation = files.get("config.json", {}), files.get("generation_config.json", {})
    of_config = _ids(config) or _ids(_text_section(config))
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


def _oversized(files: Mapping[str, Json]) -> Iterator[Finding]:
    """Whether the tokenizer has an id that the embedding has no row for, as far as config.json shows."""
    rows = _text_section(files["config.json"]).get("vocab_size")
    vocabulary = _vocabulary(files)
    largest = max(vocabulary.values(), default=-1)
    if type(rows) is int and largest >= rows:
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


# --- JSON ------------------------------------------------------------------------------------------------------------


def _parsed(name: str, origin: str, data: bytes) -> Any:
    """The content of a JSON file; None for any other file."""
    if not name.endswith(".json"):
        return None
    with _as_json(name, origin):
        return json.loads(data.decode("utf-8"))


def _objects(content: dict[str, Any], place: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The object and all objects in it, with their places. Arrays are not entered."""
    yield place, content
    for key, value in list(content.items()):
        if isinstance(value, dict):
            yield from _objects(value, (*place, key))


def _remove(content: dict[str, Any], keys: Iterable[str]) -> None:
    for _, section in _objects(content):
        for key in keys:
            section.pop(key, None)


def _written(content: dict[str, Any], data: bytes) -> bytes:
    """The content, written as `data` is: these bytes themselves, if they say the same."""
    text = data.decode("utf-8")
    if json.loads(text) == content:
        return data
    indent = _INDENT.match(text)
    written = json.dumps(content, indent=indent and indent[1], ensure_ascii=text.isascii())
    return (written + text[len(text.rstrip()) :]).encode("utf-8")


@contextlib.contextmanager
def _as_json(name: str, origin: str) -> Iterator[None]:
    """The block reads a file as JSON. How deep it may be nested depends on the release of Python, and on the reader."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise NotPublishedError(
            f"{shown(name)} of the {origin} cannot be read as JSON: {str(error)[:120]}",
            hint="fetch it again, or remove it if the model does not need it",
        ) from error


def _object(data: bytes | None) -> dict[str, Any] | None:
    """The object in a JSON file; None if it has none, or is not there."""
    try:
        value = json.loads((data or b"").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _note(message: str, hint: str = "") -> Finding:
    return Finding(check=PUBLISHED_FILES, severity=Severity.NOTE, message=message, hint=hint, origin=Origin.FILE)


def _warning(check: str, message: str, hint: str) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, message=message, hint=hint, origin=Origin.FILE)
