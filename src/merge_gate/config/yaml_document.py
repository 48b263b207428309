"""Reads YAML text into plain data, with the line and column of every value and key.

It reports everything that YAML allows and this tool does not: duplicate keys, tags, hidden characters, and values that
contain themselves. It does not know what the keys mean.

The dialect is YAML 1.1 (structure, anchors, merge keys, and the booleans `on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Only plain scalars, lists, and mappings are
constructed. Size, depth, and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Any, NoReturn

import yaml

from merge_gate._internal.errors import ConfigError
from merge_gate._internal.text import has_hidden, quoted
from merge_gate.records.config import Problem

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 300
MAX_REREAD = 65_536
"""If libyaml's error lies before this character, PyYAML's own parser reads the text again: its errors are clearer."""

MAX_LISTED = 100
"""How many problems are listed. The others are only counted."""
_CONFLICT = re.compile(r"^<{7} ", re.MULTILINE)
"""What git writes into a file with a merge conflict."""
_TOO_LARGE_HINT = "reduce it: a configuration needs far less"

Loc = tuple[str | int, ...]
Hint = str | Callable[[], str]
"""What to do next. A hint that takes long to compute is a function, called when the problem is listed."""


class NoValue(Enum):
    """Replaces a missing or refused value in the data. It fits no type, so that validation always reports it."""

    NULL = "null"
    REFUSED = "refused"  # its problem is already reported


@dataclass(slots=True, eq=False)
class Value:
    """One value of the file: its data, its place, and its items, each by key or index with the place of the key."""

    tag: str
    line: int
    column: int
    written: str = ""
    data: Any = None  # until all its items are read
    holds: Pairs = field(default_factory=dict)
    size: int = 1
    height: int = 0


Pairs = dict[str | int, tuple[Value, Value]]


class YamlDocument:
    """One YAML document: its values and its problems."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems = dict[tuple[int, int, str], Hint]()
        self.root = Value("", 1, 1)

    @property
    def data(self) -> Any:
        return self.root.data

    def deepest_at(self, loc: Loc) -> tuple[Loc, Value, Value]:
        """The value at `loc`, or the deepest value on the way there: its place, its key, and the value."""
        key = value = self.root
        for depth, part in enumerate(loc):
            if part not in value.holds:
                return loc[:depth], key, value
            key, value = value.holds[part]
        return loc, key, value

    def value_at(self, loc: Loc, key: str | None = None) -> Value:
        """The value at `loc`, or the key `key` of the mapping there."""
        place, key_value, value = self.deepest_at(loc if key is None else (*loc, key))
        return key_value if len(place) > len(loc) else value

    def report(self, loc: Loc, message: str, hint: Hint = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        self.add(self.value_at(loc, key), message, hint)

    def add(self, value: Value, message: str, hint: Hint) -> None:
        """Add a problem at a value, once for each place."""
        self.problems.setdefault((value.line, value.column, message), hint)

    def refuse(self, value: Value, message: str, hint: str) -> None:
        """Report a problem of the value, and drop its contents."""
        self.add(value, message, hint)
        value.data, value.holds, value.size, value.height = NoValue.REFUSED, {}, 1, 0

    def fill(self, value: Value, data: Any, written: str) -> None:
        """Set the data of a scalar, unless it has hidden characters."""
        value.data, value.written = data, written
        if has_hidden(written):
            hint = "remove line breaks, tabs, and invisible characters"
            self.refuse(value, f"{quoted(written)} contains a control character", hint)

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems, with the first in the order of the file."""
        listed = []
        for line, column, message in sorted(self.problems, key=lambda problem: problem[:2])[:MAX_LISTED]:
            hint = self.problems[line, column, message]
            hint = hint if isinstance(hint, str) else hint()
            listed.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))
        if listed:
            raise ConfigError(tuple(listed), more=len(self.problems) - len(listed))


def read_yaml(text: str, path: str) -> YamlDocument:
    """Read one YAML document. libyaml, which is many times faster, is used if PyYAML has it.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        yaml.reader.Reader(text)  # refuses characters that YAML does not allow
        try:
            return _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text), path).document
        except yaml.MarkedYAMLError as error:
            if error.problem_mark and error.problem_mark.index > MAX_REREAD:
                raise
        return _Reader(yaml.SafeLoader(text), path).document
    except yaml.MarkedYAMLError as error:
        if conflict := _CONFLICT.search(text):
            refuse(
                path,
                "the file has a git merge conflict here (<<<<<<<)",
                "resolve the conflict",
                *end_of(text[: conflict.start()]),
            )
        refuse(path, *_syntax(error), *_place(error.problem_mark))
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        refuse(path, message, "", *end_of(text[: error.position]))


def document_of(data: object, path: str) -> YamlDocument:
    """The document of plain data. Its lines number the values in their order."""
    document, lines = YamlDocument(path), count(1)

    def value_of(data: Any, depth: int = 1) -> Value:
        value = Value("", next(lines), 1)
        if depth > MAX_DEPTH:
            document.refuse(value, f"nested deeper than {MAX_DEPTH} levels", _TOO_LARGE_HINT)
        elif isinstance(data, dict | list | tuple):
            pairs = ((str(key), item) for key, item in data.items()) if isinstance(data, dict) else enumerate(data)
            value.holds = {key: (value_of(key), value_of(item, depth + 1)) for key, item in pairs}
            values = {key: item.data for key, (name, item) in value.holds.items() if name.data is not NoValue.REFUSED}
            value.data = values if isinstance(data, dict) else list(values.values())
        else:
            document.fill(value, NoValue.NULL if data is None else data, str(data))
        return value

    document.root = value_of(data)
    return document


# --- scalars ---------------------------------------------------------------------------------------------------------


def _int(raw: str) -> int | float:
    """Convert digits to an int. A number of too many digits becomes an infinite float."""
    if len(raw) > MAX_DIGITS:
        return float("inf") if "x" in raw else float(raw)
    return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)


_TAG = "tag:yaml.org,2002:"
_LIST, _MAPPING, _MERGE = f"{_TAG}seq", f"{_TAG}map", f"{_TAG}merge"
_CONVERTERS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}str": str,
    f"{_TAG}bool": lambda raw: yaml.constructor.SafeConstructor.bool_values[raw.lower()],
    f"{_TAG}int": _int,
    f"{_TAG}float": lambda raw: float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE)),
    f"{_TAG}null": lambda _: NoValue.NULL,
    _MERGE: str,
}
"""Converts the text of a scalar, by its tag."""
_NUMBERS = {
    f"{_TAG}int": re.compile(r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)\Z"),
    f"{_TAG}float": re.compile(
        r"(?:[-+]?(?:(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""Numbers in the notation of YAML 1.2."""
_TAGS = {yaml.MappingNode: {_MAPPING}, yaml.SequenceNode: {_LIST}, yaml.ScalarNode: _CONVERTERS.keys()}


# --- nodes → values ------------------------------------------------------------------------------------------------


class _Reader(yaml.composer.Composer, yaml.resolver.BaseResolver):
    """PyYAML's composer, changed to create values instead of nodes. It reads the events of either parser."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's; an int first, since a float may have no point)
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in reversed(rows) if tag in _CONVERTERS]
        for first, rows in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }

    def __init__(self, parser: Any, path: str) -> None:
        super().__init__()
        self.check_event, self.peek_event, self.get_event = parser.check_event, parser.peek_event, parser.get_event
        self.anchored: dict[yaml.Node, Value] = {}
        self.depth = self.values = 0
        self.document = YamlDocument(path)
        self.refuse = self.document.refuse
        self.get_event()  # the stream starts
        if self.check_event(yaml.StreamEndEvent):
            refuse(path, "the file is empty", 'it needs at least "version: 1" and a list of "adapters"')
        self.document.root = self.compose_document()  # type: ignore[assignment] # a value stands where a node would
        if not self.check_event(yaml.StreamEndEvent):
            hint = 'remove everything after the line "---"'
            refuse(path, "the file holds more than one YAML document", hint, *_place(self.peek_event().start_mark))

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Create the next value. The items of PyYAML's node are already values."""
        event = self.peek_event()
        place = _place(event.start_mark)
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH or self.values > MAX_VALUES:
            nested = f"is nested deeper than {MAX_DEPTH} levels"
            excess = nested if self.depth > MAX_DEPTH else f"has more than {MAX_VALUES:,} values"
            refuse(self.document.path, f"the file {excess}", _TOO_LARGE_HINT, *place)
        is_alias = isinstance(event, yaml.AliasEvent)
        if event.anchor in self.anchors and not is_alias:
            message = f"the anchor {quoted(event.anchor)} is defined twice"
            first = f"first in line {self.anchors[event.anchor].start_mark.line + 1}"
            refuse(self.document.path, message, first, *place)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if node in self.anchored:
            return self.anchored[node]
        if is_alias:
            value = Value("", *_place(node.start_mark))
            self.refuse(value, "this value contains itself", "remove the alias (*name) from inside its own anchor")
        else:
            value = Value(node.tag, *place)
            self.fill(value, node)
            if event.anchor:
                self.anchored[node] = value
        return value

    def fill(self, value: Value, node: Any) -> None:
        if isinstance(node, yaml.ScalarNode):
            value.written = node.value
        elif isinstance(node, yaml.SequenceNode):
            value.holds = {index: (item, item) for index, item in enumerate(node.value)}
            value.data = [item.data for item in node.value]
            self.bound(value)
        else:
            self.pairs(value, node.value)
            self.bound(value)
        if value.tag not in _TAGS[type(node)]:
            self.refuse(value, f"the tag {quoted(value.tag.replace(_TAG, '!!'))} is not allowed", "remove the tag")
        elif isinstance(node, yaml.ScalarNode):
            self.scalar(value)

    def scalar(self, value: Value) -> None:
        try:
            self.document.fill(value, _CONVERTERS[value.tag](value.written), value.written)
        except (ValueError, KeyError):
            self.refuse(value, f"{quoted(value.written)} does not fit its tag", "remove the tag")

    def pairs(self, value: Value, pairs: list[tuple[Value, Value]]) -> None:
        """Fill a mapping: merged keys (`<<`) first, then its own keys, which win. A key is text and occurs once."""
        own: Pairs = {}
        merged: Pairs = {}
        for key, item in pairs:
            if key.tag == _MERGE:
                merged |= self.merged(item)
                value.height = max(value.height, 1 + item.height)
            elif key.tag in {_LIST, _MAPPING}:
                self.document.add(key, "a key must be text, got a list or a mapping", 'write "key: value"')
            elif key.written in own:
                hint = f"first in line {own[key.written][0].line}"
                self.document.add(key, f"duplicate key {quoted(key.written)}", hint)
            elif key.data is not NoValue.REFUSED:
                own[key.written] = (key, item)
        value.holds = merged | own
        value.data = {name: item.data for name, (_, item) in value.holds.items()}

    def merged(self, value: Value) -> Pairs:
        """The pairs that `<<` merges. If several sources have a key, the first wins."""
        sources = [item for _, item in value.holds.values()] if value.tag == _LIST else [value]
        sources = [source for source in sources if source.data is not NoValue.REFUSED]
        if any(source.tag != _MAPPING for source in sources):
            hint = "use an alias, such as <<: *defaults"
            self.document.add(value, '"<<" must be a mapping or a list of mappings', hint)
            return {}
        return {name: pair for source in reversed(sources) for name, pair in source.holds.items()}

    def bound(self, value: Value) -> None:
        """Refuse a value that aliases make too large or too deep. All its items are already read."""
        inner = [item for _, item in value.holds.values()]
        value.size += sum(item.size for item in inner)
        value.height = max([value.height, *(1 + item.height for item in inner)])
        if value.height > MAX_DEPTH:
            self.refuse(value, f"the aliases here are nested deeper than {MAX_DEPTH} levels", _TOO_LARGE_HINT)
        elif value.size > MAX_VALUES:
            refuse(self.document.path, f"the file expands to more than {MAX_VALUES:,} values", "use fewer aliases")


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """A syntax error of PyYAML in one sentence and a hint."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return "not valid YAML: got a tab, expected spaces", "indent with spaces"
    started = f" ({context} in line {error.context_mark.line + 1})" if context and error.context_mark else ""
    hint = "check the indentation and the colons here, and put text with special characters in quotes"
    return f"not valid YAML: {problem}{started}".encode("ascii", "backslashreplace").decode(), hint


def end_of(text: str) -> tuple[int, int]:
    """Line and column after `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def refuse(path: str, message: str, hint: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a `ConfigError` with this one problem. What is no file has no lines: `line` is 0."""
    raise ConfigError((Problem(message=message, hint=hint, path=path, line=line, column=column),)) from None
