"""The text of a YAML file → a tree of values that know their line and column.

In: text. Out: a `Value`, and a `Problem` for everything that YAML allows and this tool does not (duplicate keys, tags,
control characters, values that contain themselves). Knows YAML, and nothing of what the keys mean.

The dialect: YAML 1.1's structure, anchors, merge keys and booleans (`on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Nothing is ever constructed but plain scalars,
lists and mappings. Size, depth and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import yaml

from merge_gate.config.words import CONTROL, quoted
from merge_gate.errors import ConfigError
from merge_gate.records import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 300

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]
Loc = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of the file. `data` is plain; `raw` is a scalar's text as written, without quotes.

    `children` holds the values of a list (by index) or of a mapping (by key), `keys` the places of a mapping's keys.
    `broken`: a problem was reported here, `data` is None. `size` counts the values with all aliases expanded.
    """

    data: Plain
    line: int
    column: int
    raw: str = ""
    children: Mapping[str | int, Value] = field(default_factory=dict)
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    broken: bool = False
    size: int = 1

    def locate(self, loc: Loc) -> tuple[Value, Loc]:
        """Return the value at `loc`, or the deepest one on the way there, and the part of `loc` that leads to it."""
        value = self
        for depth, step in enumerate(loc):
            if step not in value.children:
                return value, loc[:depth]
            value = value.children[step]
        return value, loc

    def walk(self, loc: Loc = ()) -> Iterator[tuple[Loc, Value]]:
        """Yield every value below this one with its place in the tree."""
        for step, child in self.children.items():
            yield (*loc, step), child
            yield from child.walk((*loc, step))


def read_yaml(text: str, path: str) -> tuple[Value, list[Problem]]:
    """Read one YAML document.

    Args:
        text: the whole file.
        path: the file's name, for messages.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        _refuse(path, error.problem_mark or error.context_mark, *_syntax(error))
    except yaml.reader.ReaderError as error:
        line, column = place(text, error.position)
        message = f"not valid YAML: the character U+{_code(error.character):04X} is not allowed"
        raise ConfigError((Problem(message=message, path=path, line=line, column=column),)) from None
    if node is None:
        _refuse(path, None, "the file is empty", 'it needs at least "version: 1" and a list "adapters"')
    reader = _Reader(path)
    value = reader.read(node)
    if value.size > MAX_VALUES:
        _refuse(path, None, f"the file expands to more than {MAX_VALUES:,} values", "use fewer aliases")
    return value, reader.problems


def place(text: str, index: int) -> tuple[int, int]:
    """Turn an index into `text` into line and column, both from 1."""
    start = text.rfind("\n", 0, index) + 1
    return text.count("\n", 0, index) + 1, index - start + 1


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing; depth and number of nodes are bounded."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)
    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_VALUES:
            what = f"deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _pattern, _first in (
    ("bool", r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    ("int", r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", "-+0123456789"),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.0123456789"),  # noqa: E501
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


class _Reader:
    """Turns nodes into values, each node once, and collects problems on the way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self._done: dict[int, Value] = {}
        self._open: set[int] = set()

    def read(self, node: yaml.Node) -> Value:
        if id(node) in self._open:
            return self._broken(node, "this value contains itself", "an alias (*name) may not stand inside its anchor")
        if id(node) not in self._done:
            self._open.add(id(node))
            self._done[id(node)] = self._value(node)
            self._open.remove(id(node))
        return self._done[id(node)]

    def _value(self, node: yaml.Node) -> Value:
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self.read(item) for item in node.value]
            line, column = _start(node)
            size = 1 + sum(item.size for item in items)
            if size > MAX_VALUES:
                return Value(data=None, line=line, column=column, size=size, broken=True)
            data = [item.data for item in items]
            return Value(data=data, line=line, column=column, children=dict(enumerate(items)), size=size)
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in {"str", "bool", "int", "float", "null", "merge"}:  # noqa: E501  # fmt: skip
            return self._scalar(node)
        shown = node.tag.replace(_TAG, "!!")
        return self._broken(node, f"the tag {quoted(shown)} is not allowed", "remove the tag")

    def _scalar(self, node: yaml.ScalarNode) -> Value:
        if CONTROL.search(node.value):
            hint = "write text without line breaks, tabs and invisible characters"
            return self._broken(node, f"{quoted(node.value)} holds a control character", hint)
        line, column = _start(node)
        try:
            data = _plain(node.tag.removeprefix(_TAG), node.value)
        except (ValueError, KeyError):
            return self._broken(node, f"{quoted(node.value)} does not fit its tag", "remove the tag")
        return Value(data=data, raw=node.value, line=line, column=column)

    def _mapping(self, node: yaml.MappingNode) -> Value:
        """Merged keys (`<<`) first, then the mapping's own, which win."""
        own: dict[str, Value] = {}
        keys: dict[str, tuple[int, int]] = {}
        merged: list[Value] = []
        for key_node, value_node in node.value:
            value = self.read(value_node)
            if key_node.tag == _TAG + "merge":
                merged += self._merge_sources(value_node, value)
            elif (key := self._key(key_node)) is None:
                continue
            elif key in own:
                self._report(key_node, f"the key {quoted(key)} is given twice", f"first in line {keys[key][0]}")
            else:
                own[key], keys[key] = value, _start(key_node)
        return _join(node, own, keys, merged)

    def _key(self, node: yaml.Node) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._report(node, "a key must be text, got a list or a mapping", 'write "key: value"')
            return None
        value = self._scalar(node) if node.tag.startswith(_TAG) else self.read(node)
        return None if value.broken else node.value

    def _merge_sources(self, node: yaml.Node, value: Value) -> list[Value]:
        sources = [value] if isinstance(node, yaml.MappingNode) else list(value.children.values())
        if isinstance(node, yaml.ScalarNode) or not all(isinstance(source.data, dict) for source in sources):
            self._report(node, '"<<" takes a mapping or a list of mappings', "use an alias, such as <<: *defaults")
            return []
        return sources

    def _report(self, node: yaml.Node, message: str, hint: str = "") -> None:
        line, column = _start(node)
        self.problems.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))

    def _broken(self, node: yaml.Node, message: str, hint: str) -> Value:
        self._report(node, message, hint)
        line, column = _start(node)
        return Value(data=None, line=line, column=column, broken=True)


def _join(node: yaml.Node, own: dict[str, Value], keys: dict[str, tuple[int, int]], merged: list[Value]) -> Value:
    children: dict[str | int, Value] = {}
    places: dict[str, tuple[int, int]] = {}
    for source in reversed(merged):
        children.update(source.children)
        places.update(source.keys)
    children.update(own.items())
    places.update(keys)
    line, column = _start(node)
    size = 1 + sum(child.size for child in children.values())
    if size > MAX_VALUES:
        return Value(data=None, line=line, column=column, size=size, broken=True)
    data: dict[str, Plain] = {str(key): child.data for key, child in children.items()}
    return Value(data=data, line=line, column=column, children=children, keys=places, size=size)


def _plain(kind: str, raw: str) -> Plain:
    """Turn a scalar's text into its value. An int too long to be one becomes a float, which is then infinite."""
    if kind == "bool":
        return _BOOLEANS[raw.lower()]
    if kind == "int" and len(raw) <= MAX_DIGITS:
        return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)
    if kind in {"int", "float"}:
        return float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE)) if "x" not in raw else float("inf")
    return None if kind == "null" else raw


def _start(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _code(character: object) -> int:
    return character if isinstance(character, int) else ord(str(character)[:1] or "\0")


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """Say a syntax error of PyYAML in one sentence and a hint."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return "not valid YAML: a tab stands where spaces are expected", "indent with spaces"
    if problem.startswith(("deeper than", "more than")):
        return f"the file is {problem}", "a configuration needs far less"
    if "single document" in context:
        return "the file holds more than one YAML document", 'remove what follows the line "---"'
    where = f" ({context} in line {error.context_mark.line + 1})" if context and error.context_mark else ""
    hint = "check the indentation and the colons here; text with special characters needs quotes"
    return f"not valid YAML: {problem}{where}".encode("ascii", "backslashreplace").decode(), hint


def _refuse(path: str, mark: yaml.Mark | None, message: str, hint: str) -> NoReturn:
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    raise ConfigError((Problem(message=message, hint=hint, path=path, line=line, column=column),)) from None
