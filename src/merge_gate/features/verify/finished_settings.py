"""Compares what the files next to the weights mean: config, generation settings, tokenizer, and processor.

In: the names of both models' files, and both loaded configurations. Out: `ReadSettings`. It judges nothing, and runs no
code of either model. A file is compared key by key with the expected file, and the rows of expected_differences.py say
which differences change no result. What transformers loads is compared too, since a default may hide a difference:

1. config.json: the configuration of the loaded model, with all defaults.
2. generation_config.json: the settings that generate() uses, which come from config.json if there is no such file.
3. tokenizer.json: its canonical form, which the library `tokenizers` writes with all defaults.
4. The tokenizer: both are loaded, and must encode the same texts and all special tokens in the same way.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from merge_gate._internal.companion_names import Companion, companion_kind
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import quoted
from merge_gate.features.verify.comparison import ReadSettings, SettingDifference, SettingsFiles
from merge_gate.features.verify.expected_differences import ABSENT, Expectation, KeyChange, expected_by, flat, same
from merge_gate.limits.timeout import within

T = TypeVar("T")

TIMEOUT_S = 120.0
"""How long reading both tokenizers may take. A large one takes seconds."""

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_PROCESSOR = "processor_config.json"
"""The file of transformers 5 for the whole processor. It has the content of preprocessor_config.json, too."""
_OF_FILES = {"dtype", "architectures", "_name_or_path", "transformers_version"}
"""Keys that a loaded configuration has from its load, and not from the file."""

_MOST_DIFFERENCES = 200
_SHOWN_CHARACTERS = 80

_FLAGS = {"single_word", "lstrip", "rstrip", "normalized"}

TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice.",
    "  two  blanks\tand a tab\nand\n\nlines \r\n",
    "def f(x: int) -> str:\n    return f'{x + 1:>10}'  # 3.14e-10",
    "Größe, naïve café, ﬁne, Å (A\u030a), İstanbul, ½, ²",
    "日本語のテキスト、한국어 텍스트, 简体中文。",
    "Здравствуй мир! مرحبا بالعالم שלום नमस्ते สวัสดี",
    "🙂👩‍👩‍👧‍👦🇩🇪 \u200b\u00a0\ufeff\x00\x7f",
    "0123456789 1000000 1,000,000.00 -42 0x1F",
    "I'm you're WE'LL don\u2019t «quoted» \u201cquotes\u201d --- ... ___",
    "a" * 70 + " " * 20 + "Aa" * 30,
    "",
)
"""What both tokenizers encode, with and without special tokens."""


def read_settings(
    files: SettingsFiles, directory: str, expected: Any, actual: Any, expectation: Expectation
) -> ReadSettings:
    """Compare the files of a finished model in `directory` with the expected ones.

    Args:
        files: the names of both.
        directory: the finished model's.
        expected: the configuration of the base, with the class that the adapter needs.
        actual: the configuration of the finished model.
        expectation: what the conditions of the rows depend on, as far as the tensors tell.
    """
    # A thread that takes too long may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second, written, older = (Path(place, name) for name in ("expected", "merged", "written", "older"))
        _link(first, dict(files.expected))
        _link(second, {name: str(Path(directory, name)) for name in files.merged})
        for folder in (written, older):
            folder.mkdir()
        reading = _Reading(files, first, second, written, older, expected, actual, expectation)
        try:
            return within(TIMEOUT_S, lambda: _without_panic(reading.result))
        except TimeoutError:
            why = f"loading took longer than {TIMEOUT_S:g} s"
        except Exception as error:
            why = _words(error)
        return ReadSettings(
            differences=(SettingDifference(file="tokenizer.json", key="", expected="", actual=f"does not load: {why}"),)
        )


def _without_panic(function: Callable[[], T]) -> T:
    """The result. A panic of the library `tokenizers` is no `Exception`, and becomes one."""
    try:
        return function()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(_words(error)) from error


def _link(folder: Path, places: Mapping[str, str]) -> None:
    folder.mkdir()
    for name, place in places.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(place).absolute())


@dataclass
class _Reading:
    """The comparison of one finished model. `loaded` has what transformers makes of the expected files.

    `written` is the folder of the files that transformers writes, and `older` that of the vocabulary's older files.
    """

    files: SettingsFiles
    first: Path
    second: Path
    written: Path
    older: Path
    expected: Any
    actual: Any
    expectation: Expectation
    loaded: dict[str, Any] = field(default_factory=dict)
    by_key: dict[tuple[str, str], SettingDifference] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    def result(self) -> ReadSettings:
        names = {*dict(self.files.expected), *self.files.merged}
        with contextlib.suppress(Exception):
            self.expected.save_pretrained(self.written)
        of_model = {_CONFIG: (self.expected.to_dict(), self.actual.to_dict())}
        if _GENERATION in names:
            of_model |= self._generation()
        self.loaded |= {name: _plain(value) for name, (value, _) in of_model.items()}
        if any(_bytes(self.first / name) != _bytes(self.second / name) for name in names):
            self._tokenizers()
        self.expectation = replace(
            self.expectation,
            loaded=self.loaded,
            written={path.name: _parsed(path)[0] for path in self.written.glob("*.json")},
            config=_parsed(self.first / _CONFIG)[0] or {},
        )
        for name, (_, actual) in of_model.items():
            old, new = flat(self.loaded[name]), flat(_plain(actual))
            keys = [key for key in old.keys() | new.keys() if key[-1] not in _OF_FILES]
            old, new = ({key: settings.get(key) for key in keys} for settings in (old, new))
            self._compare(name, old, new, whole=actual, is_loaded=True)
        self._processors()
        for name in self.files.merged:
            if companion_kind(name) is not Companion.TEMPLATE:
                self._file(name)
        written, own = {path.name for path in self.written.iterdir()}, _parsed(self.second / _PROCESSOR)[0] or {}
        if flat(self.expectation.written.get(_PROCESSOR, {"": ""})).keys() <= flat(own).keys():  # has the other files
            written = {name for name in written if name == _PROCESSOR or not name.endswith("processor_config.json")}
        return ReadSettings(
            read=tuple(self.read),
            written=tuple(sorted(written)),
            differences=tuple(sorted(self.by_key.values(), key=lambda change: bool(change.row)))[:_MOST_DIFFERENCES],
        )

    def _generation(self) -> dict[str, tuple[Any, Any]]:
        """What generate() uses of both. If the base's own file does not load, only the same bytes are equal to it."""
        with contextlib.suppress(Exception):
            settings = _generation(self.first, self.expected)
            with contextlib.suppress(Exception):
                settings.save_pretrained(self.written)
            try:
                return {_GENERATION: (settings.to_dict(), _generation(self.second, self.actual).to_dict())}
            except Exception as error:
                self._refuse(_GENERATION, f"does not load: {_words(error)}")
        return {}

    def _processors(self) -> None:
        """What transformers loads: it may take a file that the expected model lacks, and defaults for its keys."""
        folders = (self.written, self.second / "written")
        for name in sorted({path.name for folder in folders for path in folder.glob("*processor_config.json")}):
            old, new = (_parsed(folder / name)[0] or {} for folder in folders)
            self._compare(name, flat(old), flat(new), whole=new, is_loaded=True)

    # --- files -------------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> None:
        content = _bytes(self.second / name)
        if content == _bytes(self.first / name) and name != _CONFIG:  # the adapter may need another class
            return
        if content in (_bytes(self.written / name), _bytes(self.older / name)):
            self.read.append(name)
        elif name.endswith(".json"):
            self._json(name)

    def _json(self, name: str) -> None:
        value, problem = _parsed(path := self.second / name)
        old, _ = _parsed(self.first / name)
        old = self.expectation.written.get(name) if old is None else old
        if old is None and name not in self.loaded:
            return
        self.read.append(name)
        if problem:
            self._refuse(name, problem)
            return
        if name == _CONFIG:
            old = {**(old or {}), "architectures": self.loaded[name]["architectures"]}
        elif name == "vocab.json" and old is None:
            old = self.loaded[name]
        tokens = self.expectation.added_tokens
        first, second = (flat(_normal(settings, tokens, name)) for settings in (old or {}, value))
        if name == _TOKENIZER and (forms := _forms(self.first, self.written)):
            actual = canonical(path)
            if actual is None:
                self._refuse(name, "does not load with the library `tokenizers`")
            elif not any(same(form, actual) for form in forms):
                self._compare(name, flat(forms[0]), flat(actual), whole=actual, is_loaded=True)
        self._compare(name, first, second, whole=value)

    def _compare(
        self, name: str, first: Mapping[Any, Any], second: Mapping[Any, Any], *, whole: Any, is_loaded: bool = False
    ) -> None:
        """Judge each key whose value differs. A chat template is compared as a text, elsewhere."""
        for key in sorted(first.keys() | second.keys()):
            old, new = first.get(key, ABSENT), second.get(key, ABSENT)
            if not same(old, new) and (name, key) != ("tokenizer_config.json", ("chat_template",)):
                change = KeyChange(file=name, key=key, expected=old, actual=new, whole=whole, is_loaded=is_loaded)
                self._add(name, ".".join(key), old, new, expected_by(change, self.expectation))

    # --- the tokenizer -----------------------------------------------------------------------------------------------

    def _tokenizers(self) -> None:
        """Load both, compare them, and have transformers write the expected files again."""
        own, problem = _tokenizer(self.first)
        other, why = None, ""
        if any(companion_kind(name) is Companion.TOKENIZER for name in self.files.merged):
            other, why = _tokenizer(self.second)
            if own is not None and other is not None:
                texts = _texts(own)
                actual = _properties(other, texts)
                for name, value in _properties(own, texts).items():
                    if not same(value, actual[name]):
                        self._add("tokenizer", name, *_first_difference(value, actual[name]))
            elif problem != why:
                self._refuse("tokenizer", f"does not load ({why})" if why else "loads, unlike the expected one")
        if own is None:
            return
        self._write(own)
        tokens = {
            str(token.content): token.__getstate__() | {"id": number}
            for number, token in own.added_tokens_decoder.items()
        }
        config = _parsed(self.second / "tokenizer_config.json")[0] or {}
        self.loaded |= {
            "tokenizer_config.json": {
                key: setting for key in config if isinstance(setting := _setting(own, key), str | int | float | bool)
            },
            "special_tokens_map.json": {**own.special_tokens_map, "extra_special_tokens": own.extra_special_tokens},
            "added_tokens.json": {content: token["id"] for content, token in tokens.items()},
        }
        if forms := _forms(self.first):
            vocab = forms[0]["model"].get("vocab")
            self.loaded |= {_TOKENIZER: forms[0]} | ({"vocab.json": vocab} if isinstance(vocab, dict) else {})
        self.expectation = replace(
            self.expectation,
            token_ids={name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            added_tokens=tokens,
            tokenizer_class=type(own).__name__ if type(own) is type(other) else "",
            has_own_tokenizer=self.files.has_own_tokenizer,
        )

    def _write(self, tokenizer: Any) -> None:
        import transformers  # noqa: PLC0415 - its classes are loaded on demand

        with contextlib.suppress(Exception):
            tokenizer.save_pretrained(self.written)
            _without_panic(lambda: tokenizer.backend_tokenizer.model.save(str(self.older)))  # as transformers 4
        if any(companion_kind(name) is Companion.PROCESSOR for name in self.files.merged):
            for name in ("AutoImageProcessor", "AutoFeatureExtractor", "AutoProcessor"):
                for folder, out in ((self.first, self.written), (self.second, self.second / "written")):
                    with contextlib.suppress(Exception):
                        own = getattr(transformers, name).from_pretrained(str(folder), trust_remote_code=False)
                        own.save_pretrained(str(out))

    # --- differences -------------------------------------------------------------------------------------------------

    def _refuse(self, file: str, why: str) -> None:
        """The whole file differs. `why` continues a sentence that begins with its name."""
        self.by_key[file, ""] = SettingDifference(file=file, key="", expected="", actual=quoted(why, 240, ""))

    def _add(self, file: str, key: str, expected: Any, actual: Any, row: str = "") -> None:
        if (known := self.by_key.get((file, key))) is None or known.row:
            self.by_key[file, key] = SettingDifference(
                file=file, key=key[:200] or '""', expected=_shown(expected), actual=_shown(actual), row=row
            )


def _generation(folder: Path, config: Any) -> Any:
    from transformers import GenerationConfig  # noqa: PLC0415 - slow

    if (folder / _GENERATION).exists():
        return GenerationConfig.from_pretrained(str(folder))
    return GenerationConfig.from_model_config(config)


def _setting(tokenizer: Any, key: str) -> Any:
    """A setting as the tokenizer has it, and whether it adds tokens as it does it: other releases read these keys."""
    end = {"add_bos_token": ("bos_token_id", 0), "add_eos_token": ("eos_token_id", -1)}.get(key)
    if end is None:
        return getattr(tokenizer, key, None)
    with contextlib.suppress(Exception):
        return _without_panic(lambda: tokenizer("a")["input_ids"])[end[1]] == getattr(tokenizer, end[0])
    return None


def _tokenizer(folder: Path) -> tuple[Any, str]:
    """A tokenizer, loaded without the code that its files may name, or why there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        return _without_panic(lambda: AutoTokenizer.from_pretrained(str(folder), **options)), ""
    except Exception as error:
        return None, _words(error).replace(str(folder), "")


def _forms(*folders: Path) -> list[Any]:
    """The canonical forms of the files tokenizer.json in these folders."""
    return [form for folder in folders if (form := canonical(folder / _TOKENIZER)) is not None]


def canonical(path: Path) -> Any:
    """tokenizer.json as the library `tokenizers` writes it, with all defaults; None if it does not load."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - slow

    with contextlib.suppress(Exception):
        return _without_panic(lambda: json.loads(Tokenizer.from_str(path.read_text(encoding="utf-8")).to_str()))
    return None


def _texts(tokenizer: Any) -> list[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return [*TEXTS, *(f"{token} a{token}b {token}" for token in sorted(special))]


def _properties(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """What a loaded tokenizer does, and how it is set. The texts are encoded with and without special tokens."""

    def ids(**how: Any) -> Callable[[], Any]:
        return lambda: {text: list(tokenizer(text, **how)["input_ids"]) for text in texts}

    settings = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "split_special_tokens")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ways: dict[str, Callable[[], Any]] = {
        "vocabulary": tokenizer.get_vocab,
        "special tokens": lambda: {**tokenizer.special_tokens_map, "all": list(tokenizer.all_special_tokens)},
        "added tokens": lambda: {str(n): token.__getstate__() for n, token in tokenizer.added_tokens_decoder.items()},
        "encoding": ids(),
        "encoding without special tokens": ids(add_special_tokens=False),
        "pairs": lambda: list(tokenizer(TEXTS[0], TEXTS[1])["input_ids"]),
        "decoding": lambda: tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]),
        "settings": lambda: {name: getattr(tokenizer, name, None) for name in settings},
        "processing": lambda: json.loads(backend.to_str()) if backend is not None else None,
    }
    properties: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            properties[name] = _without_panic(way)
        except Exception as error:
            properties[name] = _words(error)
    return properties


def _first_difference(first: Any, second: Any) -> tuple[Any, Any]:
    """The innermost values that differ, of two values that do."""
    while isinstance(first, Mapping) and isinstance(second, Mapping):
        odd = [key for key in (*first, *second) if not same(first.get(key, ABSENT), second.get(key, ABSENT))]
        first, second = (
            {odd[0]: value} if value is ABSENT else value
            for value in (first.get(odd[0], ABSENT), second.get(odd[0], ABSENT))
        )
    return first, second


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _parsed(path: Path) -> tuple[Any, str]:
    """The object in a JSON file, or what is wrong with it. `Infinity` and `NaN` are numbers, as in transformers."""
    if not path.is_file():
        return None, "there is no such file"
    try:
        value = parse_strictly(path.read_bytes(), constant=float)
    except InvalidJsonError as error:
        return None, str(error)
    return (value, "") if isinstance(value, dict) else (None, "is no JSON object")


def _normal(value: Any, tokens: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """The file with each token as its text, if it has the flags of the added token of this text.

    As in transformers, `additional_special_tokens` counts if `extra_special_tokens` is empty.
    """
    if name not in {"tokenizer_config.json", "special_tokens_map.json"} or not isinstance(value, dict):
        return value
    texts = {key: inner if key == "added_tokens_decoder" else _text_of(inner, tokens) for key, inner in value.items()}
    extra = (texts.pop("extra_special_tokens", None), texts.pop("additional_special_tokens", None))  # the older name
    named = next((given for given in extra if given), None)
    return texts | ({"extra_special_tokens": named} if named else {})


def _text_of(value: Any, tokens: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(value, list):
        return [_text_of(item, tokens) for item in value]
    own = tokens.get(str(value.get("content"))) if isinstance(value, dict) else None
    keys = value.keys() - {"__type"} if own is not None else set()
    is_own = own is not None and keys >= _FLAGS and all(same(own.get(key, ABSENT), value[key]) for key in keys)
    return value["content"] if is_own else value


def _plain(values: Any) -> Any:
    """The values as JSON has them."""
    return json.loads(json.dumps(values, default=str))


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return quoted(text, _SHOWN_CHARACTERS, '"' if isinstance(value, str) else "")


def _words(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"
