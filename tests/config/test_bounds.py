"""What is bounded: values, adapters, problems that are told; and that both of PyYAML's parsers read the same."""

from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from merge_gate._internal.errors import ConfigError, UsageError
from merge_gate.config.from_arguments import config_of
from merge_gate.config.load_config import load_config
from merge_gate.config.model import MAX_ADAPTERS
from merge_gate.config.yaml_document import KEY, MAX_DEPTH, MAX_LISTED, MAX_VALUES, Loc, YamlDocument, read_yaml
from merge_gate.records.config import Config
from tests.support.config.invalid import HEAD, WRONG
from tests.support.properties import examples
from tests.support.wording import Wording


def load(place: Path, text: str) -> Config:
    (place / "merge-gate.yml").write_text(text)
    return load_config(str(place / "merge-gate.yml"))


def refused(place: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(place, text)
    return caught.value


def test_a_file_may_list_ten_thousand_adapters_and_no_more(tmp_path: Path, wording: Wording) -> None:
    text = HEAD + "".join(f"- acme/a{n}\n" for n in range(MAX_ADAPTERS))
    assert len(load(tmp_path, text).adapters) == MAX_ADAPTERS == 10_000
    (problem,) = refused(tmp_path, text + "- acme/b\n").problems
    assert '"adapters"' in problem.message
    assert "10001" in problem.message
    wording(problem.message)


def test_values_are_bounded(tmp_path: Path, wording: Wording) -> None:
    (problem,) = refused(tmp_path, "a:\n" + "- a\n" * MAX_VALUES).problems
    assert problem.line == MAX_VALUES - 1
    wording(problem.message)
    (problem,) = refused(tmp_path, "a: &a x\nb: [" + "*a," * MAX_VALUES + "]").problems
    assert problem.line == 2
    wording(problem.message)


def test_as_many_values_as_may_be_are_read() -> None:
    text = "[" + "a," * (MAX_VALUES - 1) + "]"
    assert len(read_yaml(text, "x").data) == MAX_VALUES - 1


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")], ids=["lists", "mappings"])
def test_as_many_levels_as_may_be_are_read(opening: str, closing: str) -> None:
    """The value inside is a level too, and an alias has the levels of what it stands for."""
    most = MAX_DEPTH - 1

    def nested(levels: int, value: str = "x") -> str:
        return opening * levels + value + closing * levels

    assert read_yaml(nested(most), "x").problems == {}
    with pytest.raises(ConfigError, match=r"\b32\b"):
        read_yaml(nested(most + 1), "x")
    alias = f"a: &a {nested(16)}\nb: "
    assert read_yaml(alias + nested(most - 17, "*a"), "x").problems == {}
    with pytest.raises(ConfigError, match=r"\b32\b"):
        read_yaml(alias + nested(most - 16, "*a"), "x")


def test_aliases_expand_to_as_many_values_as_may_be(tmp_path: Path, wording: Wording) -> None:
    thousand = "a: &a [" + "x," * 999 + "]\n"
    assert len(read_yaml(thousand + "b: [" + "*a," * 98 + "]", "x").data["b"]) == 98
    (problem,) = refused(tmp_path, thousand + "b: [" + "*a," * 100 + "]").problems
    wording(f"{problem.message} ({problem.hint})")


@pytest.mark.parametrize("parts", [MAX_LISTED, MAX_LISTED + 150, 3000])
def test_the_first_problems_are_listed_and_the_others_counted(tmp_path: Path, parts: int) -> None:
    error = refused(tmp_path, HEAD + "- acme/a\n" + "".join(f"k{n}: 1\n" for n in range(parts)))
    assert [problem.line for problem in error.problems] == list(range(4, 4 + MAX_LISTED))
    assert all("version" in problem.hint for problem in error.problems)
    assert error.more == parts - MAX_LISTED
    said = str(error).splitlines()
    assert len(said) == MAX_LISTED + (error.more > 0)
    assert said[-1] == f"and {error.more:,} more" or not error.more


def test_a_problem_that_an_alias_repeats_is_one(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + "- &a {path: acme/a, nam: x}\n" + "- *a\n" * 200)
    assert [(problem.line, problem.column) for problem in error.problems] == [(3, 13), (3, 21)]
    assert error.more == 0


def test_problems_of_the_command_line_are_counted_too() -> None:
    with pytest.raises(UsageError, match=r"\b50\b") as caught:
        config_of([f"./a{n}" for n in range(150)])
    assert caught.value.message.count("./a") == MAX_LISTED


def outcome(text: str) -> tuple[object, ...]:
    """The data, and where each value and problem is; or none of it, and where the text is refused."""
    try:
        document = read_yaml(text, "x")
    except ConfigError as error:
        return None, [(problem.line, problem.column) for problem in error.problems]
    return repr(document.data), list(document.problems), list(places(document))


def places(document: YamlDocument, loc: Loc = ()) -> Iterator[tuple[Loc, tuple[int, int], tuple[int, int]]]:
    """Where each value and its key are, without empty values: the two parsers may place these differently."""
    _, node = document.find(loc)
    data = reduce(getitem, loc, document.data)
    if node.value:
        yield loc, document.place(loc), document.place((*loc, KEY))
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from places(document, (*loc, key))


@pytest.mark.parametrize("case", sorted(WRONG.keys() - {"lone surrogate", "escape beyond Unicode"}))
def test_without_libyaml_all_is_the_same(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    fast = outcome(WRONG[case][0])
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert outcome(WRONG[case][0]) == fast


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("[]{}:,-?&*|>'\"%@`#~<ab01. \n\tü😀\u2028"), max_size=40))
@example("a: !<tag:yaml.org,2002:int> 1")
@example("! 12: ! [a]")
@example('"\\/": "\\x41\\u00e9"')
def test_both_parsers_read_the_same(text: str) -> None:
    """libyaml takes more (a tab after a value); what both take is the same."""
    with pytest.MonkeyPatch.context() as without:
        fast = outcome(text)
        without.delattr(yaml, "CSafeLoader")
        slow = outcome(text)
    assert fast == slow or slow[0] is None
