"""The text of a YAML file → plain data, and the place of every value and key by the parser's own marks.

In: text. Out: a `Document`, with a problem for everything that YAML allows and this tool does not (duplicate keys,
tags, hidden characters, values that contain themselves). Knows YAML, and nothing of what the keys mean.

The dialect: YAML 1.1's structure, anchors, merge keys and booleans (`on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Nothing is ever constructed but plain scalars,
lists and mappings. Size, depth and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

import yaml

from merge_gate.errors import ConfigError
from merge_gate.records.config import Problem
from merge_gate.text import has_hidden, quoted

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 300
MAX_REREAD = 65_536
"""Up to this character, what libyaml refuses is read again for the plainer words of PyYAML's own parser."""

MAX_TOLD = 100
"""As many problems are told; the others are counted."""
_FAR_LESS = "a configuration needs far less"

Loc = tuple[str | int, ...]
Hint = str | Callable[[], str]
"""What to do next. One that takes long to find is looked for when its problem is told."""


class Nothing(Enum):
    """Stands in the data where there is no value. No type takes it, so that whoever reads the data tells it."""

    NULL = "null"
    MISSING = "missing"
    REFUSED = "refused"  # its problem is told already


@dataclass(slots=True, eq=False)
class Value:
    """One value of the file: its data, its place, and what it holds, each by its key or index with the key's place."""

    tag: str
    line: int
    column: int
    written: str = ""
    data: Any = None  # until all that it holds is read
    holds: Pairs = field(default_factory=dict)
    size: int = 1
    height: int = 0


Pairs = dict[str | int, tuple[Value, Value]]


class Unusable(Exception):  # noqa: N818 (not an error of the program: it carries a problem to where its place is known)
    """Something that cannot be taken. Carries the problem's message and hint."""

    def __init__(self, message: str, hint: Hint = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Document:
    """One YAML document: its values, and what is wrong with them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems = dict[tuple[int, int, str], Hint]()
        self.root = Value("", 1, 1)

    @property
    def data(self) -> Any:
        return self.root.data

    def at(self, loc: Loc) -> tuple[Loc, Value, Value]:
        """The value at `loc`, or the deepest one on the way there: its place, its key, and itself."""
        key = value = self.root
        for depth, part in enumerate(loc):
            if part not in value.holds:
                return loc[:depth], key, value
            key, value = value.holds[part]
        return loc, key, value

    def line(self, loc: Loc, key: str | None = None) -> tuple[int, int]:
        """Line and column of the value at `loc`, or of the key `key` of the mapping there."""
        found, of_key, value = self.at(loc if key is None else (*loc, key))
        there = of_key if len(found) > len(loc) else value
        return there.line, there.column

    def report(self, loc: Loc, message: str, hint: Hint = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        self.add(self.line(loc, key), message, hint)

    def add(self, place: tuple[int, int], message: str, hint: Hint) -> None:
        """Add a problem at a line and column, once."""
        self.problems.setdefault((*place, message), hint)

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems, with the first in the order of the file."""
        told = []
        for line, column, message in sorted(self.problems, key=lambda one: one[:2])[:MAX_TOLD]:
            hint = self.problems[line, column, message]
            words = hint if isinstance(hint, str) else hint()
            told.append(Problem(message=message, hint=words, path=self.path, line=line, column=column))
        if told:
            raise ConfigError(tuple(told), more=len(self.problems) - len(told))


def read_yaml(text: str, path: str) -> Document:
    """Read one YAML document, by libyaml where PyYAML has it, which is many times as fast.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        yaml.reader.Reader(text)  # refuses characters that YAML does not have
        try:
            return _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text), path).document
        except yaml.MarkedYAMLError as error:
            if error.problem_mark and error.problem_mark.index > MAX_REREAD:
                raise
        return _Reader(yaml.SafeLoader(text), path).document
    except yaml.MarkedYAMLError as error:
        refuse(path, *_syntax(error), *_place(error.problem_mark))
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        refuse(path, message, "", *end_of(text[: error.position]))


# --- events → values -----------------------------------------------------------------------------------------------


class _Reader:
    """Makes values of a parser's events, as PyYAML's composer makes nodes."""

    def __init__(self, parser: Any, path: str) -> None:
        self.next, self.peek = parser.get_event, parser.peek_event
        self.anchors: dict[str, Value] = {}
        self.depth = self.values = 0
        self.document = Document(path)
        self.next()  # the stream starts
        if isinstance(self.peek(), yaml.StreamEndEvent):
            refuse(path, "the file is empty", 'it needs at least "version: 1" and a list "adapters"')
        self.next()  # the document starts
        self.document.root = self.value()
        self.next()  # the document ends
        if not isinstance(self.peek(), yaml.StreamEndEvent):
            hint = 'remove what follows the line "---"'
            refuse(path, "the file holds more than one YAML document", hint, *_place(self.peek().start_mark))

    def report(self, value: Value, message: str, hint: str) -> None:
        self.document.add((value.line, value.column), message, hint)

    def refuse(self, value: Value, message: str, hint: str) -> None:
        """Report the value, and take nothing of it."""
        self.report(value, message, hint)
        value.data, value.holds, value.size, value.height = Nothing.REFUSED, {}, 1, 0

    def value(self) -> Value:
        event = self.next()
        line, column = _place(event.start_mark)
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH or self.values > MAX_VALUES:
            what = f"deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            refuse(self.document.path, f"the file is {what}", _FAR_LESS, line, column)
        value = self.aliased(event) if isinstance(event, yaml.AliasEvent) else self.composed(event, line, column)
        self.depth -= 1
        return value

    def composed(self, event: Any, line: int, column: int) -> Value:
        value = Value(_tag(event), line, column, getattr(event, "value", ""))
        if event.anchor and (first := self.anchors.setdefault(event.anchor, value)) is not value:
            message = f"the anchor {quoted(event.anchor)} is given twice"
            refuse(self.document.path, message, f"first in line {first.line}", value.line, value.column)
        kind = type(event)
        if kind is yaml.SequenceStartEvent:
            self.items(value)
        elif kind is yaml.MappingStartEvent:
            self.pairs(value)
        if value.tag not in _TAGS[kind]:
            self.refuse(value, f"the tag {quoted(value.tag.replace(_TAG, '!!'))} is not allowed", "remove the tag")
        elif kind is yaml.ScalarEvent:
            self.scalar(value)
        return value

    def aliased(self, event: yaml.AliasEvent) -> Value:
        if event.anchor not in self.anchors:
            at: Any = event.start_mark  # libyaml's marks are unknown to the stub
            raise yaml.MarkedYAMLError(problem=f"found undefined alias {event.anchor!r}", problem_mark=at)
        value = self.anchors[event.anchor]
        if value.data is None:
            value = Value("", value.line, value.column)
            self.refuse(value, "this value contains itself", "an alias (*name) may not stand inside its anchor")
        return value

    def scalar(self, value: Value) -> None:
        if has_hidden(value.written):
            hint = "write text without line breaks, tabs and invisible characters"
            self.refuse(value, f"{quoted(value.written)} holds a control character", hint)
            return
        try:
            value.data = _SCALARS[value.tag](value.written)
        except (ValueError, KeyError):
            self.refuse(value, f"{quoted(value.written)} does not fit its tag", "remove the tag")

    def items(self, value: Value) -> None:
        while not isinstance(self.peek(), yaml.SequenceEndEvent):
            item = self.value()
            value.holds[len(value.holds)] = (item, item)
        self.next()
        value.data = [item.data for _, item in value.holds.values()]
        self.bound(value)

    def pairs(self, value: Value) -> None:
        """Merged keys (`<<`) first, then the mapping's own, which win. Only text is a key, and each is there once."""
        own: Pairs = {}
        merged: Pairs = {}
        while not isinstance(self.peek(), yaml.MappingEndEvent):
            key, item = self.value(), self.value()
            if key.tag == _MERGE:
                merged |= self.merged(item)
                value.height = max(value.height, 1 + item.height)
            elif key.tag in {_LIST, _MAPPING}:
                self.report(key, "a key must be text, got a list or a mapping", 'write "key: value"')
            elif key.written in own:
                hint = f"first in line {own[key.written][0].line}"
                self.report(key, f"the key {quoted(key.written)} is given twice", hint)
            elif key.data is not Nothing.REFUSED:
                own[key.written] = (key, item)
        self.next()
        value.holds = merged | own
        value.data = {name: item.data for name, (_, item) in value.holds.items()}
        self.bound(value)

    def merged(self, value: Value) -> Pairs:
        """What `<<` brings: of several sources, the first wins."""
        sources = [item for _, item in value.holds.values()] if value.tag == _LIST else [value]
        sources = [source for source in sources if source.data is not Nothing.REFUSED]
        if any(source.tag != _MAPPING for source in sources):
            hint = "use an alias, such as <<: *defaults"
            self.report(value, '"<<" takes a mapping or a list of mappings', hint)
            return {}
        return {name: pair for source in reversed(sources) for name, pair in source.holds.items()}

    def bound(self, value: Value) -> None:
        """Refuse what is larger than it looks, once all that the value holds is read."""
        inner = [item for _, item in value.holds.values()]
        value.size += sum(item.size for item in inner)
        value.height = max([value.height, *(1 + item.height for item in inner)])
        if value.height > MAX_DEPTH:
            self.refuse(value, f"the aliases here lead deeper than {MAX_DEPTH} levels", _FAR_LESS)
        elif value.size > MAX_VALUES:
            refuse(self.document.path, f"the file expands to more than {MAX_VALUES:,} values", "use fewer aliases")


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _tag(event: Any) -> str:
    """The tag that is written, or the one that a scalar looks like."""
    if event.tag not in (None, "!"):
        return str(event.tag)
    if not isinstance(event, yaml.ScalarEvent):
        return _LIST if isinstance(event, yaml.SequenceStartEvent) else _MAPPING
    plain = _PLAIN.fullmatch(event.value) if event.implicit[0] else None
    return f"{_TAG}{plain.lastgroup if plain else 'str'}"


def _int(raw: str) -> int | float:
    """An int too long to be one becomes a float, which is then infinite."""
    if len(raw) > MAX_DIGITS:
        return float("inf") if "x" in raw else float(raw)
    return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)


def _float(raw: str) -> float:
    return float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE))


_SWITCHES = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_WORDS = [spelled for word in _SWITCHES for spelled in (word, word.capitalize(), word.upper())]
_TAG = "tag:yaml.org,2002:"
_LIST, _MAPPING, _MERGE = f"{_TAG}seq", f"{_TAG}map", f"{_TAG}merge"
_KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "str": ("(?!)", str),
    "bool": ("|".join(_WORDS), lambda raw: _SWITCHES[raw.lower()]),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", _int),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _float,
    ),
    "null": ("~|null|Null|NULL|", lambda _: Nothing.NULL),
    "merge": ("<<", str),
}
"""The kinds of scalars: how each is written without a tag, and what it is."""
_PLAIN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, (pattern, _) in _KINDS.items()))
_SCALARS = {f"{_TAG}{kind}": make for kind, (_, make) in _KINDS.items()}
_TAGS = {yaml.MappingStartEvent: {_MAPPING}, yaml.SequenceStartEvent: {_LIST}, yaml.ScalarEvent: _SCALARS.keys()}


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """A syntax error of PyYAML in one sentence and a hint."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return "not valid YAML: a tab stands where spaces are expected", "indent with spaces"
    where = f" ({context} in line {error.context_mark.line + 1})" if context and error.context_mark else ""
    hint = "check the indentation and the colons here; text with special characters needs quotes"
    return f"not valid YAML: {problem}{where}".encode("ascii", "backslashreplace").decode(), hint


def end_of(text: str) -> tuple[int, int]:
    """Line and column after `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def refuse(path: str, message: str, hint: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a `ConfigError` with this one problem."""
    raise ConfigError((Problem(message=message, hint=hint, path=path, line=line, column=column),)) from None
