"""Reads YAML text into plain data, and gives PyYAML's line and column of every value and key.

It reports everything that YAML allows and this tool does not: duplicate keys, tags, and hidden characters. It does not
know what the keys mean.

The dialect is YAML 1.1 (structure, anchors, merge keys, and the booleans `on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Only plain scalars, lists, and mappings are
constructed. Size, depth, and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

import yaml

from merge_gate._internal.errors import ConfigError
from merge_gate._internal.text import has_hidden, quoted
from merge_gate.records.config import Problem

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_LISTED = 100
"""How many problems are listed. The others are only counted."""
KEY = "[key]"
"""The last part of the place of a key, as in pydantic's errors."""

_TAG = "tag:yaml.org,2002:"
_KINDS = ("str", "bool", "int", "float", "null")
_LIST, _MAPPING, _MERGE = f"{_TAG}seq", f"{_TAG}map", f"{_TAG}merge"
_SCALARS = {f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"] for kind in _KINDS}
_TAGS = {yaml.MappingNode: {_MAPPING}, yaml.SequenceNode: {_LIST}, yaml.ScalarNode: _SCALARS}
_NUMBERS = {
    f"{_TAG}int": re.compile(r"(?:[-+]?(?:0|[1-9][0-9]{0,299})|0x[0-9a-fA-F]{1,200}|0o[0-7]{1,200})\Z"),
    f"{_TAG}float": re.compile(
        r"(?:[-+]?(?:(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""Numbers in the notation of YAML 1.2. A whole number of too many digits is a float, perhaps an infinite one."""
_RESOLVERS = {  # an int first, since a float may have no point
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in reversed(rows) if tag in {*_SCALARS, _MERGE}]
    for first, rows in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
}

Loc = tuple[str | int, ...]
Hint = str | Callable[[], str]
"""What to do next. A hint that takes long to compute is a function, called when the problem is listed."""
Pairs = dict[str | int, tuple[yaml.Node, yaml.Node]]
"""The items of a mapping or list, by key or index, each with the node of its key."""


class NoValue(Enum):
    """Replaces a missing or refused value in the data. It fits no type, so that validation always reports it."""

    NULL = "null"
    REFUSED = "refused"  # its problem is already reported


class YamlDocument:
    """One YAML document: its plain data, the nodes that the data comes from, and its problems."""

    def __init__(self, path: str, root: yaml.Node) -> None:
        self.path, self.root = path, root
        self.problems = dict[tuple[int, int, str], Hint]()
        self.has_unknown_keys = set[Loc]()
        self._items = dict[yaml.Node, Pairs]()
        self._values = 0
        self.data = self._plain(root, 1)

    def find(self, loc: Loc) -> tuple[Loc, yaml.Node]:
        """The deepest node on the way to `loc`, and its place. If `loc` ends in `KEY`, the node is that of the key."""
        key = node = self.root
        for depth, part in enumerate(loc):
            items = self._items.get(node, {})
            if part not in items:
                return loc[:depth], key if part == KEY else node
            key, node = items[part]
        return loc, node

    def place(self, loc: Loc) -> tuple[int, int]:
        """The line and column of the node at `loc`, from 1."""
        return _place(self.find(loc)[1].start_mark)

    def report(self, loc: Loc, message: str, hint: Hint = "") -> None:
        """Add a problem at `loc`, once for each place."""
        self.add(self.find(loc)[1], message, hint)

    def add(self, node: yaml.Node, message: str, hint: Hint) -> NoValue:
        """Add a problem of a node, and return what replaces its value."""
        self.problems.setdefault((*_place(node.start_mark), message), hint)
        return NoValue.REFUSED

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems, with the first in the order of the file."""
        listed = []
        for line, column, message in sorted(self.problems, key=lambda problem: problem[:2])[:MAX_LISTED]:
            hint = self.problems[line, column, message]
            hint = hint if isinstance(hint, str) else hint()
            listed.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))
        if listed:
            raise ConfigError(tuple(listed), more=len(self.problems) - len(listed))

    # --- nodes → plain data ------------------------------------------------------------------------------------------

    def _plain(self, node: yaml.Node, depth: int) -> Any:
        """The data of a node. An alias is read again each time, so that it counts as what it stands for."""
        self._values += 1
        _refuse_excess(self.path, node.start_mark, depth, self._values)
        if node.tag not in _TAGS[type(node)]:
            return self._refuse_tag(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        is_list = isinstance(node, yaml.SequenceNode)
        self._items[node] = (
            {n: (item, item) for n, item in enumerate(node.value)} if is_list else self._pairs(node, depth)
        )
        data = {key: self._plain(item, depth + 1) for key, (_, item) in self._items[node].items()}
        return list(data.values()) if is_list else data

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if has_hidden(node.value):
            hint = "remove line breaks, tabs, and invisible characters"
            return self.add(node, f"{quoted(node.value)} contains a control character", hint)
        try:
            value = _SCALARS[node.tag](yaml.constructor.SafeConstructor(), node)
        except (ValueError, LookupError):
            return self._refuse_tag(node)
        return NoValue.NULL if value is None else value

    def _refuse_tag(self, node: yaml.Node) -> NoValue:
        return self.add(node, f"the tag {quoted(node.tag.replace(_TAG, '!!'))} is not allowed here", "remove the tag")

    def _pairs(self, node: yaml.Node, depth: int) -> Pairs:
        """The pairs of a mapping. Its own keys win over merged ones (`<<`). A key is text and occurs once."""
        own: Pairs = {}
        merged: Pairs = {}
        for key, item in node.value:
            if key.tag == _MERGE:
                merged |= self._merged(item, depth + 1)
            elif not isinstance(key, yaml.ScalarNode):
                self.add(key, "a key must be text, got a list or a mapping", 'write "key: value"')
            elif key.value in own:
                hint = f"first in line {_place(own[key.value][0].start_mark)[0]}"
                self.add(key, f"duplicate key {quoted(key.value)}", hint)
                self._plain(item, depth + 1)  # for its problems
            elif self._scalar(key) is not NoValue.REFUSED:
                own[key.value] = (key, item)
        return merged | own

    def _merged(self, node: yaml.Node, depth: int) -> Pairs:
        """The pairs that `<<` merges. If several mappings have a key, the first wins."""
        sources = node.value if node.tag == _LIST else [node]
        if any(source.tag != _MAPPING for source in sources):
            self.add(node, '"<<" must be a mapping or a list of mappings', "use an alias, such as <<: *defaults")
            return {}
        merged: Pairs = {}
        for source in reversed(sources):
            self._values += 1 + len(source.value)
            _refuse_excess(self.path, source.start_mark, depth, self._values)
            merged |= self._pairs(source, depth)
        return merged


def read_yaml(text: str, path: str) -> YamlDocument:
    """Read one YAML document. libyaml, which is many times faster, is used if PyYAML has it.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        yaml.reader.Reader(text)  # refuses characters that YAML does not allow
        root = _composed(text, path)
    except yaml.MarkedYAMLError as error:
        refuse(path, *_syntax(error, text))
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        refuse(path, message, "remove it", *end_of(text[: error.position]))
    if root is None:
        refuse(path, "the file is empty", 'it needs at least "version: 1" and a list of "adapters"')
    return YamlDocument(path, root)


def document_of(data: object, path: str) -> YamlDocument:
    """The document of JSON data. Its nodes have no places."""
    representer = yaml.representer.SafeRepresenter(sort_keys=False)
    return YamlDocument(path, representer.represent_data(data))


def _composed(text: str, path: str) -> yaml.Node | None:
    """PyYAML's root node, after a look at the size: composing uses the stack and memory."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = values = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.NodeEvent):
            values += 1
            _refuse_excess(path, event.start_mark, depth + 1, values)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    composer = loader(text)
    composer.yaml_implicit_resolvers = _RESOLVERS
    return composer.get_single_node()


def described(node: yaml.Node) -> str:
    """A node in words: `12`, `"x"`, `a list of 3`. Text has quotes."""
    if isinstance(node, yaml.ScalarNode):
        return quoted(node.value, mark='"' if node.tag == f"{_TAG}str" else "")
    return f"a {'list' if isinstance(node, yaml.SequenceNode) else 'mapping'} of {len(node.value)}"


def _refuse_excess(path: str, mark: Any, depth: int, values: int) -> None:
    if depth > MAX_DEPTH or values > MAX_VALUES:
        nested = f"is nested deeper than {MAX_DEPTH} levels"
        excess = nested if depth > MAX_DEPTH else f"has more than {MAX_VALUES:,} values"
        hint = "a configuration needs far less; aliases count as what they stand for"
        refuse(path, f"the file {excess}", hint, *_place(mark))


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> tuple[str, str, int, int]:
    """The message, hint, line, and column of a syntax error of PyYAML."""
    if conflict := re.search(r"^<{7} ", text, re.MULTILINE):
        message = "the file has a git merge conflict here (<<<<<<<)"
        return (message, "resolve the conflict", *end_of(text[: conflict.start()]))
    hint = "check the indentation (spaces, no tabs) and the colons here, and put special characters in quotes"
    started = f"{error.context} in line {error.context_mark.line + 1}: " if error.context_mark else ""
    message = f"not valid YAML: {started}{error.problem}"
    return (message.encode("ascii", "backslashreplace").decode(), hint, *_place(error.problem_mark))


def end_of(text: str) -> tuple[int, int]:
    """Line and column after `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def refuse(path: str, message: str, hint: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a `ConfigError` with this one problem. `line` is 0 for values that are not in a file."""
    raise ConfigError((Problem(message=message, hint=hint, path=path, line=line, column=column),)) from None
