"""Accounts for every file of a finished directory, as the comparison of tensors accounts for every tensor.

In: the names and bytes of three directories, all hostile, and what the worker made of the files next to the weights.
Out: findings. Each file is exactly one of these:

1. weights that the index names, or the single file, with the index;
2. a companion: equal to the expected file byte for byte, or by its meaning (engine/finished_settings.py). The adapter's
   own file is expected, or else the base's, as in a published model;
3. a copy of another file of the base that is no weights, such as code, equal byte for byte;
4. the gate's manifest and card, or another file that no loader reads;
5. unexpected, and named.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_gate.companion_names import Companion, companion_kind, is_carried, is_harmless
from merge_gate.errors import ResolveError
from merge_gate.files.base_files import loaded_files
from merge_gate.files.base_weights import MODEL_INDEX
from merge_gate.judging.answer_kinds import finding, note
from merge_gate.publish.companions import replaced
from merge_gate.publish.manifest import MANIFEST_NAME
from merge_gate.publish.model_card import CARD_NAME
from merge_gate.records.comparison import ReadSettings, SettingsFiles
from merge_gate.records.files import Entry, Snapshot
from merge_gate.records.terms import Finding, record
from merge_gate.regular_file import RefusedFileError, chunks, open_regular_file, read_all
from merge_gate.strict_json import InvalidJsonError, parse_strictly
from merge_gate.text import counted, listing, quoted

MOST_FILES = 10_000
MOST_BYTES = 256 * 1024 * 1024
"""The most that is read of a companion. A larger one is a difference."""

_LISTED = 5
_KINDS = {
    Companion.CONFIG: "config-differs",
    Companion.GENERATION: "settings-differ",
    Companion.TOKENIZER: "tokenizer-differs",
    Companion.TEMPLATE: "chat-template-differs",
    Companion.PROCESSOR: "settings-differ",
}
_KINDS_OF_KEYS = {
    "eos_token_id": "stop-tokens-differ",
    "eos_token": "stop-tokens-differ",
    "dtype": "dtype-changed",
    "torch_dtype": "dtype-changed",
    "tie_word_embeddings": "tied",
}
_LINE_END = re.compile(r"\r\n|\r")
_ON_DEMAND = {Companion.TOKENIZER: "tokenizer", Companion.PROCESSOR: "processor"}


@record
class ExpectedFiles:
    """The files that a finished model should have next to its weights, by name, and those that it may copy.

    `companions` are of the kinds that are compared by meaning. `others` are the base's remaining files.
    """

    companions: dict[str, Path]
    others: dict[str, Path]
    has_own_tokenizer: bool = False


def expected_files(entry: Entry) -> ExpectedFiles:
    """The files of base and adapter that belong next to the merge, by the rule of a publication."""
    base = _places(entry.base.directory if entry.base is not None else "")
    adapter = _places(entry.files.directory)
    own = {
        name: path
        for name, path in adapter.items()
        if companion_kind(name) not in {None, Companion.CONFIG, Companion.LICENSE}
    }
    settings = _object(own.get("tokenizer_config.json"))
    dropped = replaced(base, own, has_template=bool(settings.get("chat_template")))
    kept = {name: path for name, path in base.items() if name not in dropped}
    companions = {name: path for name, path in kept.items() if companion_kind(name) in _KINDS} | own
    return ExpectedFiles(
        companions=companions,
        others={name: path for name, path in base.items() if companion_kind(name) not in _KINDS},
        has_own_tokenizer=any(companion_kind(name) is Companion.TOKENIZER for name in dropped & own.keys())
        or any(companion_kind(name) is Companion.TOKENIZER for name in own),
    )


def settings_files(merged: Snapshot, expected: ExpectedFiles) -> SettingsFiles:
    """What the worker compares: of the finished model, the companions that can be read."""
    places = _places(merged.directory)
    names = (name for name in places if companion_kind(name) in _KINDS and not _refused(places[name]))
    return SettingsFiles(
        expected=tuple((name, str(path)) for name, path in sorted(expected.companions.items()) if not _refused(path)),
        merged=tuple(sorted(names)),
        has_own_tokenizer=expected.has_own_tokenizer,
    )


def directory_findings(merged: Snapshot, expected: ExpectedFiles, read: ReadSettings) -> Iterator[Finding]:
    """The findings on everything except the tensors."""
    account = _Account(merged, expected, read)
    account.run()
    for kind, parts in account.odd.items():
        yield finding(
            kind, f"{counted(len(parts), 'difference')} in the files next to the weights: {listing(parts, _LISTED)}"
        )
    for kind, names, what in (
        ("stale-shards", account.stale, "of weights that transformers does not load"),
        (
            "unexpected-file",
            account.unexpected,
            "that neither the base nor the adapter has, and that a program may load",
        ),
    ):
        if names:
            yield finding(kind, f"{counted(len(names), 'file')} {what}: {listing(names, _LISTED)}")
    if account.absent:
        parts = [f"no {what} ({listing(map(_named, names), _LISTED)})" for what, names in account.absent.items()]
        yield note("tokenizer-differs", f"the directory has {' and '.join(parts)}: the server must supply it")
    if account.harmless:
        named = listing(map(_named, account.harmless), _LISTED)
        yield note("unexpected-file", f"{counted(len(account.harmless), 'file')} that no loader reads: {named}")


class _Account:
    """The account of one directory."""

    def __init__(self, merged: Snapshot, expected: ExpectedFiles, read: ReadSettings) -> None:
        self._merged, self._expected, self._read = merged, expected, read
        self._places = _places(merged.directory)
        self._names = sorted({*self._places, *merged.withheld})
        self.odd: dict[str, list[str]] = defaultdict(list)
        self.stale: list[str] = []
        self.unexpected: list[str] = []
        self.harmless: list[str] = []
        self.absent: dict[str, list[str]] = {}

    def run(self) -> None:
        weights = self._weights()
        if len(self._names) > MOST_FILES:
            self.unexpected.append(f"more than {MOST_FILES:,} files")
        for name in self._names[:MOST_FILES]:
            if name not in weights:
                self._file(name)
        for one in self._read.differences:
            if not one.row:
                kind = _KINDS_OF_KEYS.get(one.key.rpartition(".")[2]) or _kind_of(one.file)
                what = f"is {one.actual}, expected {one.expected}" if one.key else one.actual
                place = f"{one.key} of {one.file}" if one.key else one.file
                self.odd[kind].append(f"{quoted(place, 120)} {what}")
        self._missing()
        self._templates()
        self._code()

    def _weights(self) -> set[str]:
        """The files that transformers loads, with the index. mlx-lm writes an index of a single file, too."""
        try:
            files = {*loaded_files(self._merged.directory).all_files}
        except ResolveError:  # the findings on the weights say what is wrong
            return set()
        listed = _object(self._places.get(MODEL_INDEX)).get("weight_map")
        own = self._merged.base_files
        if isinstance(listed, dict) and own is not None and files.issuperset(map(str, listed.values())):
            files |= {MODEL_INDEX} if listed.keys() <= {one.name for one in own.tensors} else set()
        return {os.path.normpath(name) for name in files}

    # --- files that are there ----------------------------------------------------------------------------------------

    def _file(self, name: str) -> None:
        path, kind = self._places.get(name), companion_kind(name)
        if kind in _KINDS and path is not None:
            self._companion(name, path, self._expected.companions.get(name))
        elif is_harmless(name) or name == MANIFEST_NAME:
            if path is not None and (why := _refused(path, None)):
                self.unexpected.append(f"{_named(name)} ({why})")
            elif name not in {CARD_NAME, MANIFEST_NAME, *self._expected.others}:
                self.harmless.append(name)
        elif path is not None and self._is_copy(name, path):
            pass
        elif name.endswith(".safetensors") or name.rpartition("/")[2].startswith("pytorch_model"):
            self.stale.append(_named(name))
        else:
            self.unexpected.append(f"{_named(name)}{self._why(name, path)}")

    def _companion(self, name: str, path: Path, expected: Path | None) -> None:
        kind = companion_kind(name)
        why = _refused(path)
        if not why and expected is not None and _same_bytes(path, expected):
            return
        if why:
            self.odd[_kind_of(name)].append(f"{_named(name)} cannot be read: {why}")
        elif name not in self._read.read and kind is not Companion.TEMPLATE:
            if expected is None:
                self.unexpected.append(_named(name))
            else:
                self.odd[_kind_of(name)].append(f"{_named(name)} has other bytes")

    def _is_copy(self, name: str, path: Path) -> bool:
        """Whether the base has the same file. Weights in a folder must be those of a module that modules.json names."""
        of_base = self._expected.others.get(name)
        is_module = name.endswith(".safetensors") and name.rpartition("/")[0] in self._modules()
        return of_base is not None and (is_carried(name) or is_module) and _same_bytes(path, of_base)

    def _modules(self) -> set[str]:
        try:
            listed = json.loads(_text(self._places.get("modules.json")) or "")
        except (ValueError, RecursionError):
            return set()
        return (
            {str(one["path"]) for one in listed if isinstance(one, dict) and one.get("path")}
            if isinstance(listed, list)
            else set()
        )

    def _why(self, name: str, path: Path | None) -> str:
        of_base = self._expected.others.get(name)
        if path is None:
            return " (not fetched)"
        if of_base is None:
            return f" ({why})" if (why := _refused(path, None)) else ""
        return " (other bytes than the base's)" if is_carried(name) else " (weights of the base, which are not merged)"

    # --- files that are not there ------------------------------------------------------------------------------------

    def _missing(self) -> None:
        for kind, what in _ON_DEMAND.items():
            expected = sorted(name for name in self._expected.companions if companion_kind(name) is kind)
            actual = [name for name in self._places if companion_kind(name) is kind]
            if expected and not actual:
                self.absent[what] = expected
                continue
            written = {name for name in self._read.written if companion_kind(name) is kind}
            for name in expected:
                if name not in actual and (name in written or not written):
                    self.odd[_KINDS[kind]].append(f"{_named(name)} is missing")

    def _code(self) -> None:
        """A directory that names code has all of the base's code: what it has was compared."""
        configs = (path for name, path in self._places.items() if name.endswith("config.json") and "/" not in name)
        if any('"auto_map"' in (_text(path) or "") for path in configs):
            lost = [name for name in self._expected.others if name.endswith(".py") and name not in self._names]
            self.odd["config-differs"] += [f"{_named(name)} is missing, and auto_map names code" for name in lost]
        if not self.odd["config-differs"]:
            del self.odd["config-differs"]

    # --- the chat template -------------------------------------------------------------------------------------------

    def _templates(self) -> None:
        """Each place of the directory has the expected text, and so has what transformers takes."""
        companions = self._expected.companions
        expected, actual = (
            _templates({name: path for name, path in places.items() if not _refused(path)})
            for places in (companions, self._places)
        )
        if "tokenizer" in self.absent and not any(actual.values()):
            return
        texts = defaultdict(set)
        for of_place in (*expected.values(), *(_used(expected, fallback) for fallback in _FALLBACKS)):
            for name, text in of_place.items():
                texts[name].add(text)
        used = [_used(expected, fallback) for fallback in _FALLBACKS]
        odd: set[str] = set()
        for place, of_place in actual.items():
            for name, text in of_place.items():
                allowed = {one[name] for one in used if name in one} | {expected.get(place, {}).get(name)}
                if text not in allowed:
                    odd.add(f"the text {quoted(name, 60)} in {quoted(place, 120)}{_position(text, allowed)}")
        for fallback, before in zip(_FALLBACKS, used, strict=True):
            after = _used(actual, fallback)
            lost = [name for name in before if name not in after]
            odd |= {f"the template {quoted(name, 60)} is missing" for name in lost}
            odd |= {f"the template {quoted(name, 60)}, expected none" for name in after if name not in before}
            if not lost and before != after and after.keys() == before.keys():
                odd |= {
                    f"the template {quoted(name, 60)} has another text" for name in after if after[name] != before[name]
                }
        if odd:
            self.odd["chat-template-differs"] += sorted(odd)


_FALLBACKS = ("tokenizer_config.json", "chat_template.json")
"""Where tokenizers and processors find their templates, if there are no files of their own."""


def _templates(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """The templates of each place, by their names. Jinja reads every end of line as a line feed."""
    found: dict[str, dict[str, str]] = {}
    for name, path in files.items():
        if name.endswith(".jinja") and companion_kind(name) is Companion.TEMPLATE:
            text = _text(path)
            key = "default" if "/" not in name else name.rpartition("/")[2].removesuffix(".jinja")
            found[name] = {key: f"\0{name} is not UTF-8" if text is None else text}
        elif name in _FALLBACKS:
            value = _object(path).get("chat_template")
            listed = (
                [(one.get("name"), one.get("template")) for one in value if isinstance(one, dict)]
                if isinstance(value, list)
                else []
            )
            pairs = (
                [("default", value)]
                if isinstance(value, str)
                else list(value.items())
                if isinstance(value, dict)
                else listed
            )
            found[name] = {str(key): str(text) for key, text in pairs}
    return {place: {key: _LINE_END.sub("\n", text) for key, text in texts.items()} for place, texts in found.items()}


def _used(templates: Mapping[str, Mapping[str, str]], fallback: str) -> dict[str, str]:
    """The templates that transformers takes: from the files of their own, or else from the fallback."""
    of_files = {
        key: text for place, texts in templates.items() if place.endswith(".jinja") for key, text in texts.items()
    }
    if len(of_files) > 1 and "default" in of_files:  # a file of this name in the folder comes last
        of_files |= templates.get("additional_chat_templates/default.jinja", {})
    return of_files or dict(templates.get(fallback, {})) or dict(templates.get(_FALLBACKS[0], {}))


def _position(text: str, allowed: set[str | None]) -> str:
    others = [one for one in allowed if one is not None]
    if not others:
        return ", expected none"
    pairs = enumerate(zip(text, others[0], strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(text), len(others[0])))
    line = text.count("\n", 0, same) + 1
    return f" differs from line {line:,}, column {same - text.rfind(chr(10), 0, same):,} on"


# --- names and bytes -------------------------------------------------------------------------------------------------


def _named(name: str) -> str:
    return quoted(name, 120)


def _kind_of(name: str) -> str:
    kind = companion_kind(name)
    return _KINDS.get(kind, "tokenizer-differs") if kind is not None else "tokenizer-differs"


def _places(directory: str) -> dict[str, Path]:
    """The files in and below a directory. No link to another directory is followed, and .git/ is one place."""
    found: dict[str, Path] = {}
    if not directory:
        return found
    for place, folders, names in os.walk(directory):
        here = Path(place)
        is_top = here == Path(directory)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*names, *links):
            found[(here / name).relative_to(directory).as_posix()] = here / name
        if is_top and ".git" in folders:
            folders.remove(".git")
            found[".git/"] = here / ".git"
        folders.sort()
        if len(found) > 2 * MOST_FILES:
            break
    return found


def _refused(path: Path, limit_bytes: int | None = MOST_BYTES) -> str:
    """Why a file cannot be read, or has more bytes than are read; empty if it can."""
    if path.name == ".git":
        return ""
    try:
        with open_regular_file(path, follow=True) as file:
            size_bytes = os.fstat(file.fileno()).st_size
    except RefusedFileError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    if limit_bytes is not None and size_bytes > limit_bytes:
        return f"it has {size_bytes:,} bytes, expected at most {limit_bytes:,}"
    return ""


def _same_bytes(first: Path, second: Path) -> bool:
    try:
        with open_regular_file(first, follow=True) as one, open_regular_file(second, follow=True) as other:
            size_bytes = os.fstat(one.fileno()).st_size
            if size_bytes != os.fstat(other.fileno()).st_size:
                return False
            pairs = zip(chunks(one, size_bytes), chunks(other, size_bytes), strict=True)
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


def _object(path: Path | None) -> dict[str, Any]:
    text = _text(path)
    try:
        value = parse_strictly(text.encode(), constant=float) if text is not None else {}
    except InvalidJsonError:
        return {}
    return value if isinstance(value, dict) else {}
