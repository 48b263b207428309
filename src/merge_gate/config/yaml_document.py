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
_CONFLICT = re.compile(r"^<{7} ", re.MULTILINE)
"""What git leaves where two versions of a file could not be made one."""
_FAR_LESS = "a configuration needs far less"

Loc = tuple[str | int, ...]
Hint = str | Callable[[], str]
"""What to do next. One that takes long to find is looked for when its problem is told."""


class Nothing(Enum):
    """Stands in the data where there is no value. No type takes it, so that whoever reads the data tells it."""

    NULL = "null"
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


class YamlDocument:
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

    def there(self, loc: Loc, key: str | None = None) -> Value:
        """The value at `loc`, or the key `key` of the mapping there."""
        found, of_key, value = self.at(loc if key is None else (*loc, key))
        return of_key if len(found) > len(loc) else value

    def report(self, loc: Loc, message: str, hint: Hint = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        self.add(self.there(loc, key), message, hint)

    def add(self, value: Value, message: str, hint: Hint) -> None:
        """Add a problem at a value, once for each place."""
        self.problems.setdefault((value.line, value.column, message), hint)

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems, with the first in the order of the file."""
        told = []
        for line, column, message in sorted(self.problems, key=lambda one: one[:2])[:MAX_TOLD]:
            hint = self.problems[line, column, message]
            words = hint if isinstance(hint, str) else hint()
            told.append(Problem(message=message, hint=words, path=self.path, line=line, column=column))
        if told:
            raise ConfigError(tuple(told), more=len(self.problems) - len(told))


def read_yaml(text: str, path: str) -> YamlDocument:
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
        if conflict := _CONFLICT.search(text):
            refuse(
                path,
                "git left two versions of the file here (<<<<<<<)",
                "decide between them",
                *end_of(text[: conflict.start()]),
            )
        refuse(path, *_syntax(error), *_place(error.problem_mark))
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        refuse(path, message, "", *end_of(text[: error.position]))


# --- scalars ---------------------------------------------------------------------------------------------------------


def _int(raw: str) -> int | float:
    """An int too long to be one becomes a float, which is then infinite."""
    if len(raw) > MAX_DIGITS:
        return float("inf") if "x" in raw else float(raw)
    return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)


_TAG = "tag:yaml.org,2002:"
_LIST, _MAPPING, _MERGE = f"{_TAG}seq", f"{_TAG}map", f"{_TAG}merge"
_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}str": str,
    f"{_TAG}bool": lambda raw: yaml.constructor.SafeConstructor.bool_values[raw.lower()],
    f"{_TAG}int": _int,
    f"{_TAG}float": lambda raw: float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE)),
    f"{_TAG}null": lambda _: Nothing.NULL,
    _MERGE: str,
}
"""What the text of a scalar is, by its tag."""
_NUMBERS = {
    f"{_TAG}int": re.compile(r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)\Z"),
    f"{_TAG}float": re.compile(
        r"(?:[-+]?(?:(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""Numbers as YAML 1.2 writes them."""
_TAGS = {yaml.MappingNode: {_MAPPING}, yaml.SequenceNode: {_LIST}, yaml.ScalarNode: _SCALARS.keys()}


# --- nodes → values ------------------------------------------------------------------------------------------------


class _Reader(yaml.composer.Composer, yaml.resolver.BaseResolver):
    """PyYAML's composer, which makes values in place of nodes. It reads the events of either parser."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's; an int first, since a float may have no point)
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in reversed(rows) if tag in _SCALARS]
        for first, rows in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }

    def __init__(self, parser: Any, path: str) -> None:
        super().__init__()
        self.check_event, self.peek_event, self.get_event = parser.check_event, parser.peek_event, parser.get_event
        self.anchored: dict[yaml.Node, Value] = {}
        self.depth = self.values = 0
        self.document = YamlDocument(path)
        self.get_event()  # the stream starts
        if self.check_event(yaml.StreamEndEvent):
            refuse(path, "the file is empty", 'it needs at least "version: 1" and a list "adapters"')
        self.document.root = self.compose_document()  # type: ignore[assignment] # a value stands where a node would
        if not self.check_event(yaml.StreamEndEvent):
            hint = 'remove what follows the line "---"'
            refuse(path, "the file holds more than one YAML document", hint, *_place(self.peek_event().start_mark))

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next value. What PyYAML's node holds are values already."""
        event = self.peek_event()
        place = _place(event.start_mark)
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH or self.values > MAX_VALUES:
            what = f"deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            refuse(self.document.path, f"the file is {what}", _FAR_LESS, *place)
        is_alias = isinstance(event, yaml.AliasEvent)
        if event.anchor in self.anchors and not is_alias:
            message = f"the anchor {quoted(event.anchor)} is given twice"
            first = f"first in line {self.anchors[event.anchor].start_mark.line + 1}"
            refuse(self.document.path, message, first, *place)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if node in self.anchored:
            return self.anchored[node]
        if is_alias:
            value = Value("", *_place(node.start_mark))
            self.refuse(value, "this value contains itself", "an alias (*name) may not stand inside its anchor")
        else:
            value = Value(node.tag, *place)
            self.fill(value, node)
            if event.anchor:
                self.anchored[node] = value
        return value

    def refuse(self, value: Value, message: str, hint: str) -> None:
        """Report the value, and take nothing of it."""
        self.document.add(value, message, hint)
        value.data, value.holds, value.size, value.height = Nothing.REFUSED, {}, 1, 0

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
        if has_hidden(value.written):
            hint = "write text without line breaks, tabs and invisible characters"
            self.refuse(value, f"{quoted(value.written)} holds a control character", hint)
            return
        try:
            value.data = _SCALARS[value.tag](value.written)
        except (ValueError, KeyError):
            self.refuse(value, f"{quoted(value.written)} does not fit its tag", "remove the tag")

    def pairs(self, value: Value, pairs: list[tuple[Value, Value]]) -> None:
        """Merged keys (`<<`) first, then the mapping's own, which win. Only text is a key, and each is there once."""
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
                self.document.add(key, f"the key {quoted(key.written)} is given twice", hint)
            elif key.data is not Nothing.REFUSED:
                own[key.written] = (key, item)
        value.holds = merged | own
        value.data = {name: item.data for name, (_, item) in value.holds.items()}

    def merged(self, value: Value) -> Pairs:
        """What `<<` brings: of several sources, the first wins."""
        sources = [item for _, item in value.holds.values()] if value.tag == _LIST else [value]
        sources = [source for source in sources if source.data is not Nothing.REFUSED]
        if any(source.tag != _MAPPING for source in sources):
            hint = "use an alias, such as <<: *defaults"
            self.document.add(value, '"<<" takes a mapping or a list of mappings', hint)
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
