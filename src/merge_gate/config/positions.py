"""The text of a YAML file → plain data, and the place of every value and key by PyYAML's own marks.

In: text. Out: a `Document`, with a `Problem` for everything that YAML allows and this tool does not (duplicate keys,
tags, hidden characters, values that contain themselves). Knows YAML, and nothing of what the keys mean.

The dialect: YAML 1.1's structure, anchors, merge keys and booleans (`on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Nothing is ever constructed but plain scalars,
lists and mappings. Size, depth and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from merge_gate.errors import ConfigError
from merge_gate.records.config import Problem
from merge_gate.text import has_hidden, quoted

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 300

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]
Loc = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS = {"str", "bool", "int", "float", "null", "merge"}
_TAGS = {yaml.MappingNode: {"map"}, yaml.SequenceNode: {"seq"}, yaml.ScalarNode: _SCALARS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML document. `broken` are the nodes with a problem of their own: their data is None."""

    path: str
    data: Plain
    root: yaml.Node
    broken: set[yaml.Node]
    problems: list[Problem] = field(default_factory=list)

    def locate(self, loc: Loc) -> tuple[yaml.Node, Loc]:
        """The node at `loc`, or the deepest one on the way there, and the part of `loc` that leads to it."""
        node = self.root
        for depth, step in enumerate(loc):
            child = _child(node, step)
            if child is None:
                return node, loc[:depth]
            node = child
        return node, loc

    def get(self, loc: Loc) -> Plain:
        """The value at `loc`, or the deepest one on the way there."""
        value = self.data
        for step in self.locate(loc)[1]:
            value = value[step]  # type: ignore[index]
        return value

    def line(self, loc: Loc, key: str | None = None) -> tuple[int, int]:
        """Line and column of the value at `loc`, or of the key `key` of the mapping there."""
        node = self.locate(loc)[0]
        keys = {one.value: one for one, _ in node.value} if isinstance(node, yaml.MappingNode) else {}
        return _start(keys.get(key, node))

    def walk(self) -> Iterator[tuple[Loc, yaml.Node, Plain]]:
        """Every value but the first, with its place."""
        waiting: list[tuple[Loc, yaml.Node, Any]] = [((), self.root, self.data)]
        while waiting:
            loc, node, value = waiting.pop()
            if loc:
                yield loc, node, value
            if node not in self.broken:
                waiting += [((*loc, step), child, value[step]) for step, child in _children(node)]


def _child(node: yaml.Node, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode):
        return node.value[step] if isinstance(step, int) and step < len(node.value) else None
    return dict(_children(node)).get(step)


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)
    elif isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)


def read_yaml(text: str, path: str) -> Document:
    """Read one YAML document.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        loader = _Loader(text, path)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        _refuse(path, error.problem_mark or error.context_mark, *_syntax(error))
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        before = text[: error.position]
        mark = yaml.Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        _refuse(path, mark, f"not valid YAML: the character U+{code:04X} is not allowed", "")
    if root is None:
        _refuse(path, None, "the file is empty", 'it needs at least "version: 1" and a list "adapters"')
    data = loader.construct_object(root)
    if loader.sizes.get(root, 1) > MAX_VALUES:
        _refuse(path, None, f"the file expands to more than {MAX_VALUES:,} values", "use fewer aliases")
    return Document(path=path, data=data, root=root, broken=loader.broken, problems=loader.problems)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; it bounds the number of nodes, and what it cannot take is a problem, and None."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self.path, self.depth, self.nodes = path, 0, 0
        self.problems: list[Problem] = []
        self.broken: set[yaml.Node] = set()
        self.sizes: dict[yaml.Node, int] = {}  # values, with all aliases expanded

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

    def construct_object(self, node: yaml.Node, deep: bool = True) -> Any:  # noqa: ARG002
        """The node's data, with all that it holds."""
        if node in self.broken:
            return None
        if node in self.recursive_objects:
            self.broken.add(node)
            return self.report(node, "this value contains itself", "an alias (*name) may not stand inside its anchor")
        if node.tag.removeprefix(_TAG) not in _TAGS[type(node)] or not node.tag.startswith(_TAG):
            return self.refuse(node, f"the tag {quoted(node.tag.replace(_TAG, '!!'))} is not allowed", "remove the tag")
        if isinstance(node, yaml.ScalarNode) and has_hidden(node.value):
            hint = "write text without line breaks, tabs and invisible characters"
            return self.refuse(node, f"{quoted(node.value)} holds a control character", hint)
        try:
            data = super().construct_object(node, deep=True)
        except (ValueError, KeyError):
            return self.refuse(node, f"{quoted(node.value)} does not fit its tag", "remove the tag")
        self.sizes[node] = 1 + sum(self.sizes.get(child, 1) for _, child in _children(node))
        return data

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[str, Any]:  # type: ignore[override]  # noqa: ARG002
        """Merged keys (`<<`) first, then the mapping's own, which win."""
        for _, value in node.value:
            self.construct_object(value)
        merged = [pair for key, value in node.value if key.tag == _MERGE for pair in self._merged(value)]
        inside = {key.value: (key, value) for key, value in [*merged, *self._own(node)]}
        node.value = list(inside.values())
        return {key: self.construct_object(value) for key, (_, value) in inside.items()}

    def _own(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """The mapping's keys that are text, each once."""
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.report(key, "a key must be text, got a list or a mapping", 'write "key: value"')
            elif key.value in first:
                hint = f"first in line {_start(first[key.value])[0]}"
                self.report(key, f"the key {quoted(key.value)} is given twice", hint)
            elif key.tag != _MERGE:
                self.construct_object(key)
                first[key.value] = key
                if key not in self.broken:
                    yield key, value

    def _merged(self, node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """What `<<` brings. PyYAML's own order of several sources differs from release to release: the first wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(source, yaml.MappingNode) for source in sources):
            self.report(node, '"<<" takes a mapping or a list of mappings', "use an alias, such as <<: *defaults")
            return
        for source in reversed(sources):
            yield from source.value if source not in self.broken else ()

    def refuse(self, node: yaml.Node, message: str, hint: str) -> None:
        """Report a problem of a whole value."""
        self.recursive_objects.pop(node, None)
        self.constructed_objects[node] = None
        self.broken.add(node)
        self.report(node, message, hint)

    def report(self, node: yaml.Node, message: str, hint: str) -> None:
        line, column = _start(node)
        self.problems.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))


def _number(_: _Loader, node: yaml.ScalarNode) -> int | float:
    """As in YAML 1.2. An int too long to be one becomes a float, which is then infinite."""
    raw, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "int" and len(raw) <= MAX_DIGITS:
        return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)
    return float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE)) if "x" not in raw else float("inf")


for _name, _pattern, _first in (
    ("bool", r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    ("int", r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", "-+0123456789"),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.0123456789"),  # noqa: E501
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, _number)
_Loader.add_constructor(_MERGE, lambda _, node: node.value)


def _start(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """A syntax error of PyYAML in one sentence and a hint."""
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
