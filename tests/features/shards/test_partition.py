"""The cut of a plan: complete, disjoint, the same whatever the order; bases stay together; the even share holds."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.errors import UsageError
from merge_gate.config.load_config import load_config
from merge_gate.features.shards.declared import shard_of
from merge_gate.features.shards.partition import assign, part_of
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.report import Shard
from merge_gate.records.terms import Acceptance, BaselineEntry, ForwardMode
from tests.support.command import merge_gate
from tests.support.wording import Wording

Bases = dict[str, tuple[str, str]]
BASES = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.tuples(st.sampled_from("abcd"), st.sampled_from(("", "v1"))),
    min_size=1,
    max_size=30,
)


@given(BASES, st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_entry_has_one_shard_whatever_the_order(bases: Bases, count: int, draw: random.Random) -> None:
    assigned = assign(bases, count)
    assert set(assigned) == set(bases)
    assert all(0 <= shard < count for shard in assigned.values())
    shuffled = list(bases.items())
    draw.shuffle(shuffled)
    assert assign(dict(shuffled), count) == assigned


@given(BASES, st.integers(1, 40))
def test_no_machine_is_idle_while_there_is_something_to_share(bases: Bases, count: int) -> None:
    assert len(set(assign(bases, count).values())) == min(count, len(bases))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=9), st.integers(1, 9))
def test_a_base_is_cut_only_where_it_is_more_than_an_even_share(sizes: list[int], count: int) -> None:
    bases = {f"{base}-{number}": (str(base), "") for base, size in enumerate(sizes) for number in range(size)}
    assigned = assign(bases, count)
    even = sum(sizes) / count
    for base, size in enumerate(sizes):
        machines = {assigned[f"{base}-{number}"] for number in range(size)}
        assert len(machines) == 1 or size > even or count > len(sizes)


def test_a_fleet_is_shared_evenly() -> None:
    """1,000 adapters on three bases."""
    bases = {f"{n:04}": ("abc"[n % 3], "") for n in range(1000)}
    for count, reads in ((1, 3), (2, 3), (3, 3), (4, 4), (16, 16), (256, 256)):
        assigned = assign(bases, count)
        assert len({(bases[name], shard) for name, shard in assigned.items()}) == reads
        assert max(Counter(assigned.values()).values()) <= 2 * 1000 / count


# --- of a configuration ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Six adapters on two bases, one of which only the adapters name; nothing is a model."""
    (tmp_path / "big").mkdir()
    entries = []
    for number in range(6):
        directory = tmp_path / "adapters" / f"a{number}"
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        entries.append({"path": f"./adapters/a{number}"} | ({"base": {"model": "./big"}} if number < 4 else {}))
    path = tmp_path / "gate.yml"
    path.write_text(json.dumps({"version": 1, "adapters": entries}))
    return load_config(str(path))


def planned(config: Config, specs: Sequence[AdapterSpec], number: tuple[int, int]) -> Shard:
    return part_of(config, specs, number)[1]


def names(config: Config, index: int, count: int) -> list[str]:
    return [spec.name for spec in part_of(config, config.adapters, (index, count))[0]]


def test_adapters_without_a_configured_base_are_together(config: Config) -> None:
    assert names(config, 1, 2) == ["a0", "a1", "a2", "a3"]
    assert names(config, 2, 2) == ["a4", "a5"]


def test_a_checkout_elsewhere_makes_the_same_cut(config: Config, tmp_path: Path) -> None:
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-moved") / "deeper"
    shutil.copytree(tmp_path, elsewhere)
    moved = load_config(str(elsewhere / "gate.yml"))
    for count in (1, 2, 3, 6, 9):
        for index in range(1, count + 1):
            ours = part_of(config, config.adapters, (index, count))
            theirs = part_of(moved, moved.adapters, (index, count))
            assert ours[1] == theirs[1]
            assert [spec.name for spec in ours[0]] == [spec.name for spec in theirs[0]]


def test_the_plan_is_another_one_when_anything_of_it_is(config: Config) -> None:
    def digest(config: Config, count: int = 2, *, most: int = 6) -> str:
        return planned(config, config.adapters[:most], (1, count)).plan_sha256

    others = [digest(config, 3), digest(config, most=5)]
    others.append(digest(replace(config, sha256="0" * 64)))
    not_run = tuple(replace(spec, forward=ForwardMode.OFF) for spec in config.adapters)
    others.append(digest(replace(config, adapters=not_run)))
    known = BaselineEntry(
        adapter="a" * 64,
        cause="no-effect",
        reason="r",
        owner="o",
        until="2030-01-01",
        outcome=Acceptance.UNMATCHED,
        line=1,
    )
    others.append(digest(replace(config, baseline=(known,))))
    assert len({digest(config), *others}) == 6


def test_positions_count_an_entry_for_each_dtype(config: Config) -> None:
    first = config.adapters[0]
    twice = replace(first, base=replace(first.base, dtypes=("float32", "bfloat16")))
    specs = (twice, *config.adapters[1:])
    shards = [planned(config, specs, (index, 2)) for index in (1, 2)]
    assert {shard.entries for shard in shards} == {7}
    assert sorted(position for shard in shards for position in shard.positions) == list(range(7))


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_pod_of_an_indexed_job_knows_its_number() -> None:
    assert shard_of("2/4", {}) == (2, 4)
    assert shard_of("4", {"JOB_COMPLETION_INDEX": "0"}) == (1, 4)
    assert shard_of("4", {"JOB_COMPLETION_INDEX": "3"}) == (4, 4)
    assert shard_of("1/4", {"JOB_COMPLETION_INDEX": "3"}) == (1, 4)


@pytest.mark.parametrize(("text", "index"), [("5/4", ""), ("4", "4"), ("4", ""), ("4", "-1"), ("4", "²")])
def test_a_shard_that_does_not_exist_is_a_usage_error(text: str, index: str, wording: Wording) -> None:
    with pytest.raises(UsageError) as raised:
        shard_of(text, {"JOB_COMPLETION_INDEX": index} if index else {})
    wording(raised.value)


@pytest.mark.parametrize("text", ["0/4", "4/0", "1/", "/4", "one/4", "1/4/4", "-1/4", "1.0/4", ""])
def test_what_is_no_shard_is_refused(text: str, tmp_path: Path) -> None:
    answer = merge_gate("run", "x.yml", f"--shard={text}", cwd=tmp_path)
    assert answer.code == 2, answer.said
    assert "I/N" in answer.err
