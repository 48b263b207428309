"""The text of a YAML file → plain data, and the place of every value and key by PyYAML's own marks.

In: text. Out: a `Document`, with a `Problem` for everything that YAML allows and this tool does not (duplicate keys,
tags, hidden characters, values that contain themselves). Knows YAML, and nothing of what the keys mean.

The dialect: YAML 1.1's structure, anchors, merge keys and booleans (`on`, `off`, `yes`, `no`), with numbers as in
YAML 1.2: `1e-3` is a number, `12:30:45` and `2026-01-31` are text. Nothing is ever constructed but plain scalars,
lists and mappings. Size, depth and the number of values after expanding aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
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
Pairs = dict[str, tuple[yaml.Node, yaml.Node]]

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class Unusable(Exception):  # noqa: N818 (not an error of the program: it carries a problem to where its place is known)
    """Something that cannot be taken. Carries the problem's message and hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True, slots=True)
class Place:
    """One value of the file: its data, its node, and the key before it. Without data where `is_broken`."""

    data: Plain
    node: yaml.Node
    key: yaml.Node
    is_broken: bool


class Document:
    """One YAML document: its data, the place of each value in it, and what is wrong with it."""

    def __init__(self, path: str, root: yaml.Node) -> None:
        self.path, self.places, self.problems = path, dict[Loc, Place](), list[Problem]()
        self._pairs = dict[yaml.Node, Pairs]()
        self.data = self._value((), root, root, ())

    def locate(self, loc: Loc) -> Loc:
        """`loc`, or the deepest place on the way there."""
        while loc not in self.places:
            loc = loc[:-1]
        return loc

    def at(self, loc: Loc) -> Place:
        """The place at `loc`, or the deepest one on the way there."""
        return self.places[self.locate(loc)]

    def line(self, loc: Loc, key: str | None = None) -> tuple[int, int]:
        """Line and column of the value at `loc`, or of the key `key` of the mapping there."""
        with_key = self.places.get((*loc, key)) if key is not None else None
        return _start(with_key.key if with_key else self.at(loc).node)

    def report(self, loc: Loc, message: str, hint: str = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        self._add(self.line(loc, key), message, hint)

    def _add(self, place: tuple[int, int], message: str, hint: str) -> None:
        line, column = place
        self.problems.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems, in the order of the file, each once."""
        if self.problems:
            in_order = sorted(self.problems, key=lambda problem: (problem.line, problem.column))
            raise ConfigError(tuple(dict.fromkeys(in_order))) from None

    # --- nodes → data ----------------------------------------------------------------------------------------------

    def _value(self, loc: Loc, node: yaml.Node, key: yaml.Node, above: tuple[yaml.Node, ...]) -> Plain:
        """The node's data, with all that it holds; None, and a problem, where it cannot be taken."""
        if len(self.places) >= MAX_VALUES:
            refuse(self.path, f"the file expands to more than {MAX_VALUES:,} values", "use fewer aliases")
        data: Any = None
        if is_sound := self._is_sound(node, above):
            inside = (*above, node)
            if isinstance(node, yaml.MappingNode):
                pairs = self._keys(node, inside)
                data = {name: self._value((*loc, name), value, one, inside) for name, (one, value) in pairs.items()}
            elif isinstance(node, yaml.SequenceNode):
                data = [self._value((*loc, index), item, item, inside) for index, item in enumerate(node.value)]
            else:
                data = _SCALARS[node.tag](node.value)
        self.places[loc] = Place(data, node, key, not is_sound)
        return self.places[loc].data

    def _keys(self, node: yaml.MappingNode, inside: tuple[yaml.Node, ...]) -> Pairs:
        """Merged keys (`<<`) first, then the mapping's own, which win. Only text is a key, and each is there once."""
        if node in self._pairs:
            return self._pairs[node]
        own: Pairs = {}
        merged: Pairs = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._add(_start(key), "a key must be text, got a list or a mapping", 'write "key: value"')
            elif key.value in own:
                hint = f"first in line {_start(own[key.value][0])[0]}"
                self._add(_start(key), f"the key {quoted(key.value)} is given twice", hint)
            elif key.tag == _MERGE:
                merged |= self._merged(value, inside)
            elif self._is_sound(key, inside):
                own[key.value] = (key, value)
        self._pairs[node] = merged | own
        return self._pairs[node]

    def _merged(self, node: yaml.Node, inside: tuple[yaml.Node, ...]) -> Pairs:
        """What `<<` brings. PyYAML's own order of several sources differs from release to release: the first wins."""
        pairs: Pairs = {}
        for source in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if not isinstance(source, yaml.MappingNode):
                self._add(
                    _start(node), '"<<" takes a mapping or a list of mappings', "use an alias, such as <<: *defaults"
                )
                return {}
            if self._is_sound(source, inside):
                pairs |= self._keys(source, (*inside, source))
        return pairs

    def _is_sound(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> bool:
        problem = _refusal(node, above)
        if problem:
            self._add(_start(node), *problem)
        return not problem


def _start(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _refusal(node: yaml.Node, above: tuple[yaml.Node, ...]) -> tuple[str, str] | None:
    """Why this node, inside of those `above`, is not taken: message and hint."""
    if node in above:
        return "this value contains itself", "an alias (*name) may not stand inside its anchor"
    if len(above) > MAX_DEPTH:
        return f"the aliases here lead deeper than {MAX_DEPTH} levels", "a configuration needs far less"
    if node.tag not in _TAGS[type(node)]:
        return f"the tag {quoted(node.tag.replace(_TAG, '!!'))} is not allowed", "remove the tag"
    return _scalar_refusal(node) if isinstance(node, yaml.ScalarNode) else None


def _scalar_refusal(node: yaml.ScalarNode) -> tuple[str, str] | None:
    if has_hidden(node.value):
        hint = "write text without line breaks, tabs and invisible characters"
        return f"{quoted(node.value)} holds a control character", hint
    try:
        _SCALARS[node.tag](node.value)
    except (ValueError, KeyError):
        return f"{quoted(node.value)} does not fit its tag", "remove the tag"
    return None


# --- text → nodes --------------------------------------------------------------------------------------------------


def read_yaml(text: str, path: str) -> Document:
    """Read one YAML document.

    Raises:
        ConfigError: the text is not YAML, holds no document or more than one, or is nested or expanded too far.
    """
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        refuse(path, *_syntax(error), *((mark.line + 1, mark.column + 1) if mark else ()))
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        line, column = end_of(text[: error.position])
        refuse(path, f"not valid YAML: the character U+{code:04X} is not allowed", "", line, column)
    if root is None:
        refuse(path, "the file is empty", 'it needs at least "version: 1" and a list "adapters"')
    return Document(path, root)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for its nodes only; their number and depth are bounded."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)
    depth = nodes = 0

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


def _int(raw: str) -> int | float:
    """An int too long to be one becomes a float, which is then infinite."""
    if len(raw) > MAX_DIGITS:
        return float("inf") if "x" in raw else float(raw)
    return int(raw, 16 if raw.startswith("0x") else 8 if raw.startswith("0o") else 10)


def _float(raw: str) -> float:
    return float(re.sub(r"\.(?=(?:inf|nan)$)", "", raw, flags=re.IGNORECASE))


_SWITCHES = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_SCALARS: dict[str, Callable[[str], Plain]] = {
    f"{_TAG}str": str,
    f"{_TAG}bool": lambda raw: _SWITCHES[raw.lower()],
    f"{_TAG}int": _int,
    f"{_TAG}float": _float,
    f"{_TAG}null": lambda _: None,
    _MERGE: str,
}
_TAGS = {yaml.MappingNode: {f"{_TAG}map"}, yaml.SequenceNode: {f"{_TAG}seq"}, yaml.ScalarNode: _SCALARS.keys()}
for _name, _pattern, _first in (
    ("bool", r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    ("int", r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", "-+0123456789"),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.0123456789"),  # noqa: E501
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


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


def end_of(text: str) -> tuple[int, int]:
    """Line and column after `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def refuse(path: str, message: str, hint: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a `ConfigError` with this one problem."""
    raise ConfigError((Problem(message=message, hint=hint, path=path, line=line, column=column),)) from None
