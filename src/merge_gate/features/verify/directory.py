"""Accounts for every file of a finished directory, as the comparison of tensors accounts for every tensor.

In: the names and bytes of three directories, all hostile, and what the worker made of the files next to the weights.
Out: findings. Each file is exactly one of these:

1. weights that the index names, or the single file, with the index;
2. a companion: equal to the expected file byte for byte, or by its meaning (finished_settings.py). The adapter's
   own file is expected, or else the base's, as in a published model;
3. a copy of another file of the base that is no weights, such as code, equal byte for byte;
4. the gate's manifest and card, or another file that no loader reads;
5. unexpected, and named.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate._internal.companion_names import Companion, companion_kind, is_carried, is_harmless, of_kind, replaced
from merge_gate._internal.regular_file import RefusedFileError, chunks, open_regular_file, read_all
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.verify.comparison import ReadSettings, SettingsFiles
from merge_gate.files.base_files import MODEL_INDEX
from merge_gate.judging.kinds import finding, note
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME, BaseFiles, Entry, Snapshot
from merge_gate.records.terms import Finding

MOST_FILES = 10_000
MOST_BYTES = 256 * 1024 * 1024
"""The most that is read of a companion. A larger one is a difference."""

_KINDS: Mapping[Companion | None, str] = {
    Companion.CONFIG: "config-differs",
    Companion.GENERATION: "settings-differ",
    Companion.TOKENIZER: "tokenizer-differs",
    Companion.TEMPLATE: "chat-template-differs",
    Companion.PROCESSOR: "settings-differ",
}
_TOKENIZER = Companion.TOKENIZER
_TOO_MANY = {"stale-shards", "unexpected-file"}
_KINDS_OF_KEYS = {
    "eos_token_id": "stop-tokens-differ",
    "eos_token": "stop-tokens-differ",
    "dtype": "dtype-changed",
    "torch_dtype": "dtype-changed",
    "tie_word_embeddings": "tied",
}
_MODULES = "modules.json"
_OF_MODULES = {_MODULES, "sentence_bert_config.json", "config_sentence_transformers.json"}
_THEN = "sentence-transformers then takes the mean of all tokens, with its own defaults"
_LINE_END = re.compile(r"\r\n|\r")


def expected_files(entry: Entry, *, has_own_tokenizer: bool = True) -> dict[str, Path]:
    """The files of base and adapter that belong next to the merge, by the rule of a publication.

    Those whose kind is not compared by meaning are the base's remaining files, which the model may copy. Without
    `has_own_tokenizer`, the adapter's tokenizer does not replace the base's.
    """
    base = _places(entry.base.directory if entry.base is not None else "")
    own = _own_files(entry)
    own = {name: path for name, path in own.items() if has_own_tokenizer or companion_kind(name) is not _TOKENIZER}
    settings = _object(own.get("tokenizer_config.json"))
    dropped = replaced(base, own, has_template=bool(settings.get("chat_template")))
    return {name: path for name, path in base.items() if name not in dropped} | own


def _own_files(entry: Entry) -> dict[str, Path]:
    """The adapter's own companions, which replace those of the base."""
    adapter = _places(entry.files.directory)
    return {name: adapter[name] for name in _compared(adapter) if companion_kind(name) is not Companion.CONFIG}


def adds_tokens(entry: Entry) -> bool:
    """Whether the adapter's tokenizer has tokens that the base's does not have, or the reverse."""
    own, base = (_vocabulary(files) for files in (_own_files(entry), expected_files(entry, has_own_tokenizer=False)))
    return bool(own) and own != base


def _vocabulary(files: Mapping[str, Path]) -> object:
    content = _object(files.get("tokenizer.json"))
    model = content.get("model")
    added = [(token.get("id"), token.get("content")) for token in content.get("added_tokens") or []]
    return (model.get("vocab") if isinstance(model, dict) else None, added) if content else None


def settings_files(merged: Snapshot, entry: Entry, *, has_own_tokenizer: bool = True) -> SettingsFiles:
    """What the worker compares: of both, the companions that can be read."""
    expected = expected_files(entry, has_own_tokenizer=has_own_tokenizer)
    return SettingsFiles(
        expected=tuple((name, str(path)) for name, path in _readable(expected).items()),
        merged=tuple(_readable(_places(merged.directory))),
        has_own_tokenizer=has_own_tokenizer and bool(of_kind(_own_files(entry), Companion.TOKENIZER)),
    )


def directory_findings(merged: Snapshot, expected: Mapping[str, Path], read: ReadSettings) -> Iterator[Finding]:
    """The findings on everything except the tensors."""
    account = _Account(merged, expected, read)
    for kind, parts in account.odd.items():
        what = f"{counted(len(parts), 'difference')} in the files next to the weights"
        if kind in _TOO_MANY:
            what = f"{counted(len(parts), 'file')} that a program may load, and that is not expected"
        yield finding(kind, f"{what}: {listing(parts)}")
    for what, names in account.absent.items():
        then = _THEN if what == _MODULES else "the server must supply it"
        kind = "tokenizer-differs" if what == Companion.TOKENIZER else "settings-differ"
        yield note(kind, f"the directory has no {what}: {then} ({listing(map(_named, names))})")
    if account.harmless:
        files = listing(map(_named, account.harmless))
        yield note("unexpected-file", f"{counted(len(account.harmless), 'file')} that no loader reads: {files}")


class _Account:
    """The account of one directory: by kind, what is odd, and which files should not be there."""

    def __init__(self, merged: Snapshot, expected: Mapping[str, Path], read: ReadSettings) -> None:
        self._merged, self._read = merged, read
        self._expected = {name: expected[name] for name in _compared(expected)}
        self._others = {name: path for name, path in expected.items() if name not in self._expected}
        self._places = _places(merged.directory)
        self.odd: dict[str, list[str]] = defaultdict(list)
        self.absent: dict[str, list[str]] = {}
        self.harmless: list[str] = []
        self._all_files()
        self._missing()
        self._templates()

    def _all_files(self) -> None:
        names = sorted({*self._places, *self._merged.withheld} - self._weights())
        if len(names) > MOST_FILES:
            self.odd["unexpected-file"].append(f"more than {MOST_FILES:,} files")
        for name in names[:MOST_FILES]:
            if companion_kind(name) in _KINDS and name in self._places:
                self._companion(name, self._places[name])
            else:
                self._other(name, self._places.get(name))
        for change in self._read.differences:
            if not change.row:
                kind = _KINDS_OF_KEYS.get(change.key.rpartition(".")[2], _kind_of(change.file))
                what = f"is {change.actual}, expected {change.expected}" if change.key else change.actual
                place = f"{change.key} of {change.file}" if change.key else change.file
                self.odd[kind].append(f"{quoted(place, 120)} {what}")

    def _weights(self) -> set[str]:
        """The files that transformers loads, with the index. mlx-lm writes a right index of a single file, too."""
        own = self._merged.base_files or BaseFiles(directory="")
        is_right = _object(self._places.get(MODEL_INDEX)).get("weight_map") == {
            tensor.name: tensor.file for tensor in own.tensors
        }
        indices = {own.index, MODEL_INDEX} if is_right else {own.index}
        return {*map(os.path.normpath, (*own.weights, *filter(None, indices)))}

    def _companion(self, name: str, path: Path) -> None:
        expected = self._expected.get(name)
        if why := _refused(path):
            self.odd[_kind_of(name)].append(f"{_named(name)} cannot be read: {why}")
        elif expected is not None and _same_bytes(path, expected):
            return
        elif name not in self._read.read and not _is_template(name, path):
            if expected is None:
                self.odd["unexpected-file"].append(_named(name))
            else:
                self.odd[_kind_of(name)].append(f"{_named(name)} has other bytes")

    def _other(self, name: str, path: Path | None) -> None:
        of_base = self._others.get(name)
        is_module = name.endswith(".safetensors") and name.rpartition("/")[0] in _modules(self._places)
        why = "not fetched" if path is None else _refused(path, None)
        if (is_harmless(name) or name == MANIFEST_NAME) and (path is None or not why):
            self.harmless += [name] if of_base is None and name not in {CARD_NAME, MANIFEST_NAME} else []
        elif not (of_base and path and (is_carried(name) or is_module) and _same_bytes(path, of_base)):
            if of_base is not None and not why:
                why = "other bytes than the base's" if is_carried(name) else "weights of the base, which are not merged"
            is_stale = name.endswith(".safetensors") or name.rpartition("/")[2].startswith("pytorch_model")
            self.odd["stale-shards" if is_stale else "unexpected-file"].append(_named(name) + f" ({why})" * bool(why))

    def _missing(self) -> None:
        """A model without any tokenizer needs that of its server; one with half of it is wrong.

        A file that transformers does not write may be absent. What a file names must be there: code, and the modules of
        sentence-transformers.
        """
        for kind in (Companion.TOKENIZER, Companion.PROCESSOR):
            expected, actual = of_kind(self._expected, kind), of_kind(self._places, kind)
            written = of_kind(self._read.written, kind) or expected
            if expected and not actual:
                self.absent[str(kind)] = sorted(expected)
                continue
            for name in sorted((expected & written) - actual):
                self.odd[_KINDS[kind]].append(f"{_named(name)} is missing")
        missing = self._others.keys() - {*self._places, *self._merged.withheld}
        lacking = sorted(name for name in missing if not is_harmless(name))
        if any(name.endswith("config.json") and "auto_map" in _object(path) for name, path in self._places.items()):
            for name in lacking:
                if name.endswith(".py"):
                    self.odd["config-differs"].append(f"{_named(name)} is missing, and auto_map names code")
        folders = _modules(self._others)
        gone = [name for name in lacking if name in _OF_MODULES or name.rpartition("/")[0] in folders]
        if _MODULES in gone:
            self.absent[_MODULES] = gone
        elif gone and _MODULES in self._others:
            self.odd["settings-differ"] += [f"{_named(name)} is missing" for name in gone]

    def _templates(self) -> None:
        """Each place of the directory has the expected text, and so has what transformers takes."""
        expected, actual = (_templates(_readable(files)) for files in (self._expected, self._places))
        if Companion.TOKENIZER in self.absent and not any(actual.values()):
            return
        used = [(_used(expected, fallback), _used(actual, fallback)) for fallback in _FALLBACKS]
        odd: set[str] = set()
        for place, texts in actual.items():
            for name, text in texts.items():
                allowed = {before.get(name) for before, _ in used} | {expected.get(place, {}).get(name)}
                if text not in allowed:
                    odd.add(f"the text {quoted(name, 60)} in {quoted(place, 120)}{_position(text, allowed)}")
        for before, after in used:
            odd |= {f"the template {quoted(name, 60)} is missing" for name in before.keys() - after.keys()}
            odd |= {f"the template {quoted(key, 60)} is another one" for key in after if after[key] != before.get(key)}
        if odd:
            self.odd["chat-template-differs"] += sorted(odd)


def _modules(places: Mapping[str, Path]) -> set[str]:
    """The folders that modules.json of sentence-transformers names."""
    listed = _json(places.get(_MODULES))
    paths = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    return {str(path) for path in paths if path}


_FALLBACKS = ("tokenizer_config.json", "chat_template.json")
"""Where tokenizers and processors find their templates, if there are no files of their own."""


def _templates(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """The templates of each place, by their names. Jinja reads every end of line as a line feed."""
    templates: dict[str, dict[str, str]] = {}
    for name, path in files.items():
        if name.endswith(".jinja") and companion_kind(name) is Companion.TEMPLATE:
            text = _text(path)
            key = "default" if "/" not in name else name.rpartition("/")[2].removesuffix(".jinja")
            templates[name] = {key: f"\0{name} is not UTF-8" if text is None else text}
        elif name in _FALLBACKS:
            value = _object(path).get("chat_template")
            if isinstance(value, list):
                listed = [item if isinstance(item, dict) else {"name": "default", "template": item} for item in value]
                value = {str(item.get("name")): item.get("template") for item in listed}
            named = value if isinstance(value, dict) else {"default": value} if value is not None else {}
            templates[name] = {str(key): str(text) for key, text in named.items()}
    return {
        place: {key: _LINE_END.sub("\n", text) for key, text in texts.items()} for place, texts in templates.items()
    }


def _is_template(name: str, path: Path) -> bool:
    """Whether the file holds only chat templates, which are compared as texts."""
    is_of_kind = companion_kind(name) is Companion.TEMPLATE
    return is_of_kind and (name.endswith(".jinja") or _object(path).keys() == {"chat_template"})


def _used(templates: Mapping[str, Mapping[str, str]], fallback: str) -> dict[str, str]:
    """The templates that transformers takes: from the files of their own, or else from the fallback.

    A file in the folder replaces a template of the same name.
    """
    files = sorted((place.count("/"), place) for place in templates if place.endswith(".jinja"))
    texts = {name: text for _, place in files for name, text in templates[place].items()}
    return texts or dict(templates.get(fallback, {})) or dict(templates.get(_FALLBACKS[0], {}))


def _position(text: str, allowed: set[str | None]) -> str:
    others = [allowed_text for allowed_text in allowed if allowed_text is not None]
    if not others:
        return ", expected none"
    pairs = enumerate(zip(text, others[0], strict=False))
    same = next((place for place, (character, other) in pairs if character != other), min(len(text), len(others[0])))
    line = text.count("\n", 0, same) + 1
    return f" differs from line {line:,}, column {same - text.rfind(chr(10), 0, same):,} on"


# --- names and bytes -------------------------------------------------------------------------------------------------


def _named(name: str) -> str:
    return quoted(name, 120)


def _kind_of(name: str) -> str:
    return _KINDS.get(companion_kind(name), "tokenizer-differs")


def _compared(names: Iterable[str]) -> list[str]:
    """The names of a kind that is compared by meaning."""
    return sorted(name for name in names if companion_kind(name) in _KINDS)


def _readable(places: Mapping[str, Path]) -> dict[str, Path]:
    return {name: places[name] for name in _compared(places) if not _refused(places[name])}


def _places(directory: str) -> dict[str, Path]:
    """The files in and below a directory. No link to another directory is followed, and .git/ is one place.

    A folder that cannot be read is a place, too.
    """
    paths: list[Path] = []
    errors: list[OSError] = []
    for place, folders, names in os.walk(directory, onerror=errors.append):
        here = Path(place)
        paths += [here / name for name in (*names, *(name for name in folders if (here / name).is_symlink()))]
        if here == Path(directory) and ".git" in folders:
            folders.remove(".git")
            paths.append(here / ".git")
        if len(paths) > 2 * MOST_FILES:
            break
    paths += [Path(error.filename) for error in errors]
    by_name = {path.relative_to(directory).as_posix(): path for path in paths if path != Path(directory)}
    return {".git/" if name == ".git" and path.is_dir() else name: path for name, path in by_name.items()}


def _refused(path: Path, max_bytes: int | None = MOST_BYTES) -> str:
    """Why a file cannot be read, or has more bytes than are read; empty if it can."""
    if path.name == ".git" and path.is_dir() and not path.is_symlink():
        return ""
    try:
        with open_regular_file(path, follow=True) as file:
            size_bytes = os.fstat(file.fileno()).st_size
    except RefusedFileError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    if max_bytes is not None and size_bytes > max_bytes:
        return f"it has {size_bytes:,} bytes, expected at most {max_bytes:,}"
    return ""


def _same_bytes(first: Path, second: Path) -> bool:
    try:
        with open_regular_file(first, follow=True) as first_file, open_regular_file(second, follow=True) as other:
            size_bytes = os.fstat(first_file.fileno()).st_size
            if size_bytes != os.fstat(other.fileno()).st_size:
                return False
            pairs = zip(chunks(first_file, size_bytes), chunks(other, size_bytes), strict=True)
            return all(piece == another for piece, another in pairs)
    except (OSError, ValueError):
        return False


def _text(path: Path | None) -> str | None:
    """The text of a file; None if it is no UTF-8, or cannot be read."""
    try:
        with open_regular_file(path or "", follow=True) as file:
            return read_all(file, MOST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return None


def _json(path: Path | None) -> Any:
    """The value in a file; None if it is no JSON, or cannot be read."""
    try:
        return parse_strictly((_text(path) or "").encode(), constant=float)
    except InvalidJsonError:
        return None


def _object(path: Path | None) -> dict[str, Any]:
    value = _json(path)
    return value if isinstance(value, dict) else {}
