"""Order, failures and the number of threads of `spread`, with real threads and real torch."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merge_gate.engine.tensors.threads import AHEAD, MOST_THREADS, spread, threads

TWO = 2


@pytest.fixture
def two_threads(variables) -> None:
    variables["OMP_NUM_THREADS"] = str(TWO)


def test_results_come_in_order_however_long_each_takes(two_threads: None) -> None:
    def wait(item: int) -> int:
        time.sleep(0.02 * (item % 2 == 0))
        return item * item

    assert list(spread(wait, iter(range(10)))) == [item * item for item in range(10)]


def test_it_runs_on_more_than_one_thread_at_a_time(two_threads: None) -> None:
    meeting = threading.Barrier(TWO, timeout=30)
    assert sorted(spread(lambda _: meeting.wait(), range(TWO))) == [0, 1]


def test_each_thread_computes_by_itself(two_threads: None) -> None:
    before = torch.get_num_threads()
    assert set(spread(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [1, TWO])
def test_items_may_follow_from_results(count: int, variables) -> None:
    variables["OMP_NUM_THREADS"] = str(count)
    seen: list[int] = []
    last = 10 * TWO * AHEAD

    def items() -> Iterator[int]:
        yield from range(last)
        yield seen[0] - 1  # by now the first result is there

    for result in spread(lambda item: item, items()):
        seen.append(result)  # noqa: PERF402 - read while it grows
    assert seen == [*range(last), -1]


@pytest.mark.parametrize("count", [1, TWO])
def test_an_exception_comes_when_its_turn_does(count: int, variables) -> None:
    variables["OMP_NUM_THREADS"] = str(count)
    results = spread(lambda item: 6 // item, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_one_item_and_none_need_no_thread(two_threads: None) -> None:
    assert list(spread(lambda _: threading.current_thread(), [1])) == [threading.main_thread()]
    assert list(spread(abs, [])) == []


@pytest.mark.parametrize(
    ("quota", "wanted", "expected"),
    [
        (None, "", 6),
        ("\xff\xfe", "", 6),
        ("max 100000", "", 6),
        ("200000 100000", "", 2),
        ("250000 100000", "", 2),
        ("10000 100000", "", 1),
        ("1600000 100000", "", 6),
        ("max 100000", "3", 3),
        ("200000 100000", "3", 2),
        ("200000 100000", "1", 1),
        ("max 100000", "0", 6),
        ("max 100000", "many", 6),
        ("nonsense", "", 6),
        ("", "", 6),
        ("200000", "", 6),
    ],
)
def test_the_number_of_threads(quota, wanted, expected, tmp_path, variables) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota, encoding="latin-1")
    variables["OMP_NUM_THREADS"] = wanted
    assert threads(str(tmp_path / "cpu.max"), cores=6) == expected
    assert threads(str(tmp_path / "cpu.max"), cores=200) == (MOST_THREADS if expected == 6 else expected)


def test_cores_that_this_process_may_not_use_get_no_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))}).result()
        assert pool.submit(threads, "/nowhere").result() == 1
