"""The cut of a plan: complete, disjoint, the same whatever the order; bases stay together; the even share holds."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.errors import UsageError
from merge_gate.config.load_config import load_config
from merge_gate.files import identity
from merge_gate.records.config import Combine
from merge_gate.records.options import RunOptions
from merge_gate.records.terms import Acceptance, BaselineEntry, ForwardMode
from merge_gate.shards import partition
from merge_gate.shards.partition import LOAD_BYTES, MERGE_BYTES, Cost, Costs, assign, part_of, shard_of
from tests.support.command import merge_gate
from tests.support.wording import Wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_gate.records.config import AdapterSpec, Config
    from merge_gate.records.report import Shard

MB = 1 << 20


def cost(base: str, merge_bytes: int = MB, read_bytes: int = 0) -> Cost:
    return Cost(base=(base, ""), read_bytes=read_bytes, merge_bytes=merge_bytes)


COSTS = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.builds(cost, st.sampled_from("abcd"), st.integers(1, 9 * MB), st.integers(0, 9 * MB)),
    min_size=1,
    max_size=30,
)


@given(COSTS, st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_entry_has_one_shard_whatever_the_order(costs: dict[str, Cost], count: int, draw: random.Random) -> None:
    assigned = assign(costs, count)
    assert set(assigned) == set(costs)
    assert all(0 <= shard < count for shard in assigned.values())
    shuffled = list(costs.items())
    draw.shuffle(shuffled)
    assert assign(dict(shuffled), count) == assigned


@given(COSTS, st.integers(1, 40))
def test_no_machine_is_idle_while_there_is_something_to_share(costs: dict[str, Cost], count: int) -> None:
    assert len(set(assign(costs, count).values())) == min(count, len(costs))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=9), st.integers(1, 9))
def test_a_base_is_cut_only_where_it_is_more_than_an_even_share(sizes: list[int], count: int) -> None:
    costs = {f"{base}-{number}": cost(str(base)) for base, size in enumerate(sizes) for number in range(size)}
    assigned = assign(costs, count)
    even = sum(sizes) / count
    for base, size in enumerate(sizes):
        machines = {assigned[f"{base}-{number}"] for number in range(size)}
        assert len(machines) == 1 or size > even or count > len(sizes)


def test_a_fleet_is_shared_evenly() -> None:
    """1,000 adapters on three bases of one size: four machines have 250 each, and read five bases in all."""
    costs = {f"{n:04}": cost("abc"[n % 3], 65 * MB, 300 * MB) for n in range(1000)}
    for count, reads in ((1, 3), (2, 3), (3, 3), (4, 4), (16, 16), (256, 256)):
        assigned = assign(costs, count)
        assert len({(costs[name].base, shard) for name, shard in assigned.items()}) == reads
        assert max(Counter(assigned.values()).values()) <= 2 * 1000 / count


# --- of a configuration ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Six adapters on two bases, one of which only the adapters name; sizes decide, and nothing is a model."""
    for base in ("big", "small"):
        (tmp_path / base).mkdir()
        (tmp_path / base / "model.safetensors").write_bytes(bytes(5000 if base == "big" else 100))
    entries = []
    for number in range(6):
        directory = tmp_path / "adapters" / f"a{number}"
        directory.mkdir(parents=True)
        named = {} if number < 4 else {"base_model_name_or_path": "small"}
        (directory / "adapter_config.json").write_text(json.dumps(named))
        (directory / "adapter_model.safetensors").write_bytes(bytes(10 * number))
        entries.append({"path": f"./adapters/a{number}"} | ({"base": {"model": "./big"}} if number < 4 else {}))
    path = tmp_path / "gate.yml"
    path.write_text(json.dumps({"version": 1, "adapters": entries}))
    return load_config(str(path))


def planned(config: Config, specs: Sequence[AdapterSpec], options: RunOptions) -> Shard:
    shard = part_of(config, specs, options)[1]
    assert shard is not None
    return shard


def test_a_whole_run_is_no_shard(config: Config) -> None:
    assert part_of(config, config.adapters, RunOptions()) == (config.adapters, None)


def names(config: Config, index: int, count: int) -> list[str]:
    return [spec.name for spec in part_of(config, config.adapters, RunOptions(shard=(index, count)))[0]]


def test_bases_are_told_apart_also_where_only_the_adapter_names_one(config: Config) -> None:
    assert names(config, 1, 2) == ["a0", "a1", "a2", "a3"]
    assert names(config, 2, 2) == ["a4", "a5"]


def test_a_machine_with_the_checkout_elsewhere_makes_the_same_cut(config: Config, tmp_path: Path) -> None:
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-moved") / "deeper"
    shutil.copytree(tmp_path, elsewhere)
    moved = load_config(str(elsewhere / "gate.yml"))
    for count in (1, 2, 3, 6, 9):
        for index in range(1, count + 1):
            ours = part_of(config, config.adapters, RunOptions(shard=(index, count)))
            theirs = part_of(moved, moved.adapters, RunOptions(shard=(index, count)))
            assert ours[1] == theirs[1]
            assert [spec.name for spec in ours[0]] == [spec.name for spec in theirs[0]]


def test_the_plan_is_another_one_when_anything_of_it_is(config: Config, tmp_path: Path) -> None:
    def digest(config: Config, count: int = 2, *, most: int = 6) -> str:
        return planned(config, config.adapters[:most], RunOptions(shard=(1, count))).plan_sha256

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
    (tmp_path / "adapters" / "a5" / "adapter_config.json").write_text("{}")  # a base that nobody knows
    others.append(digest(config, 3))
    assert len({digest(config), *others}) == 7


def test_positions_count_an_entry_for_each_dtype(config: Config) -> None:
    first = config.adapters[0]
    twice = replace(first, base=replace(first.base, dtypes=("float32", "bfloat16")))
    specs = (twice, *config.adapters[1:])
    shards = [planned(config, specs, RunOptions(shard=(index, 2))) for index in (1, 2)]
    assert {shard.entries for shard in shards} == {7}
    assert sorted(position for shard in shards for position in shard.positions) == list(range(7))


def test_sizes_of_a_combination_are_its_members(config: Config) -> None:
    blend = replace(
        config.adapters[0], name="b", path=None, combine=Combine(method="ties", adapters=("a1", "a3"), weights=(1, 1))
    )
    costs = Costs(config)
    alone = costs.of(config.adapters[0]).merge_bytes
    assert costs.of(blend).merge_bytes == alone + 10 + 30


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


# --- costs: what is wrong with the files, the preflight says ---------------------------------------------------------


def cost_of(place: Path, named: bytes | None) -> Cost:
    """The cost of an adapter of 10 bytes whose adapter_config.json holds this."""
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 10)
    if named is not None:
        (place / "adapter" / "adapter_config.json").write_bytes(named)
    (place / "gate.yml").write_text("version: 1\nadapters: [./adapter]\n", encoding="utf-8")
    config = load_config(str(place / "gate.yml"))
    return Costs(config).of(config.adapters[0])


def config_of(name: object) -> bytes:
    return json.dumps({"base_model_name_or_path": name}).encode()


@pytest.mark.parametrize(
    ("named", "base"),
    [
        (config_of("acme/base"), "acme/base"),
        (config_of("x" * 5000), "x" * 5000),
        (config_of("a\0b"), "a\0b"),
        (config_of(3), ""),
        (config_of(None), ""),
        (b"[]", ""),
        (b"{", ""),
        (b"[" * 100_000, ""),
        (b" " * (1 << 21), ""),
        (None, ""),
    ],
)
def test_a_base_is_known_by_the_name_that_the_adapter_gives(tmp_path: Path, named: bytes | None, base: str) -> None:
    found = cost_of(tmp_path, named)
    assert found == Cost(base=(base, ""), read_bytes=LOAD_BYTES, merge_bytes=MERGE_BYTES + 10)


def test_a_base_that_is_not_there_has_no_size(tmp_path: Path) -> None:
    found = cost_of(tmp_path, config_of("/nowhere/base"))
    assert found.base[0].endswith("../nowhere/base")
    assert found.read_bytes == LOAD_BYTES


@pytest.mark.parametrize("hangs", ["sizes", "directory"])
def test_a_base_on_a_mount_that_does_not_answer_has_no_size(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    never, asked = threading.Event(), list[str]()
    own = Path.is_dir

    def hang(directory: str) -> None:
        asked.append(directory)
        never.wait()

    def is_dir(self: Path) -> bool:
        if self.name == "base":
            hang(str(self))
        return own(self)

    if hangs == "sizes":
        monkeypatch.setattr(identity, "base_identity", hang)
    else:
        monkeypatch.setattr(Path, "is_dir", is_dir)
    for module in (identity, partition):
        monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.05)
    found = cost_of(tmp_path, config_of("./base"))
    never.set()
    assert asked == [str(tmp_path / "base")]
    assert found.read_bytes == LOAD_BYTES


def test_a_base_beside_the_config_has_its_size(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"0" * 1000)
    found = cost_of(tmp_path, config_of("./base"))
    assert found == Cost(base=("base", ""), read_bytes=LOAD_BYTES + 1000, merge_bytes=MERGE_BYTES + 1010)


def test_an_adapter_that_is_gone_has_no_size(tmp_path: Path) -> None:
    cost_of(tmp_path, None)
    config = load_config(str(tmp_path / "gate.yml"))
    shutil.rmtree(tmp_path / "adapter")
    assert Costs(config).of(config.adapters[0]).merge_bytes == MERGE_BYTES
