"""A verdict that one run stores is a hit for another one, as long as base, adapter, secret, and device are the same."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from merge_gate.features.cache.feature import VerdictCache
from merge_gate.features.cache.store import ABANDONED_S, KINDS, Seal
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.identity import base_identity
from merge_gate.records.files import Entry
from merge_gate.records.options import RunOptions
from merge_gate.run.flow import Run
from merge_gate.run.verdict_key import device_name, keyed
from merge_gate.worker.protocol import DeviceChosen
from tests.support.cache.verdicts import judged
from tests.support.judged_entry import BASE, based_entry

SECRET = "a secret of this test"
OPEN_FILES = Path("/proc/self/fd")
WEIGHTS = "adapter_model.safetensors"


CPU = DeviceChosen(device="cpu", device_name="a CPU")
CARD = DeviceChosen(device="cuda", device_name="a card")


def a_run(
    options: RunOptions,
    notify: Callable[[str], object] = pytest.fail,
    choose_device: Callable[[str], object] = lambda _: CARD,
) -> Run:
    """A run without inputs, as far as a cache knows it. Its worker finds a card."""
    made = SimpleNamespace(
        options=options,
        inputs=(),
        config=SimpleNamespace(trusts=()),
        view=SimpleNamespace(note=notify),
        watch=BaseWatch(),
        worker=SimpleNamespace(choose_device=choose_device),
        groups=(),
    )
    return cast("Run", made)


def open_cache(
    entry: Entry,
    *,
    requested: str = "cpu",
    secret: str = "",
    notify: Callable[[str], object] = pytest.fail,
    run: Run | None = None,
    **options: Any,
) -> VerdictCache:
    """A cache in a directory next to the entry's base."""
    place = Path(base_directory(entry)).parent / "cache"
    own = RunOptions(device=requested, features=options)
    return VerdictCache(run or a_run(own, notify), str(place), Seal(secret))


def store(cache: VerdictCache, entry: Entry, device: DeviceChosen = CPU) -> None:
    """Store the verdict of a run on this entry."""
    verdict = judged(entry)
    made = keyed(entry, verdict.adapter, BASE, device_name(device), ())
    cache.decided(made[0], verdict.base, made[1])


def is_hit(cache: VerdictCache, entry: Entry, device: DeviceChosen = CPU) -> bool:
    found = cache.lookup(entry, BASE, device)
    assert found is None or found.adapter.cached
    return found is not None


@pytest.fixture
def one(tmp_path: Path) -> Entry:
    return based_entry(tmp_path)


def test_a_stored_verdict_is_a_hit(one: Entry) -> None:
    with closing(open_cache(one)) as cache:
        assert not cache.may_decide_all
        assert not is_hit(cache, one)
        store(cache, one)
        assert cache.may_decide_all
    with closing(open_cache(one)) as cache:
        assert is_hit(cache, one)
        assert not is_hit(cache, one, CARD)
        assert cache.lookup(one, replace(BASE, weights="0" * 64), CPU) is None
    with closing(open_cache(one, refresh=True)) as cache:
        assert not cache.may_decide_all
        assert not is_hit(cache, one)
    with closing(open_cache(one, secret=SECRET)) as cache:
        assert not is_hit(cache, one)
    Path(one.members[0].directory, WEIGHTS).write_bytes(b"WEIGHTS")
    with closing(open_cache(one)) as cache:
        assert not is_hit(cache, one), "it changed since it was hashed"


def test_closing_removes_old_unfinished_files(one: Entry, tmp_path: Path) -> None:
    with closing(open_cache(one)):
        unfinished = tmp_path / "cache" / "verdicts" / f".{'a' * 64}.{'1' * 16}.tmp"
        unfinished.write_text("half")
        os.utime(unfinished, (0, time.time() - ABANDONED_S - 60))
        open_files = len([*OPEN_FILES.iterdir()])
    assert not unfinished.exists()
    assert len([*OPEN_FILES.iterdir()]) == open_files - len(KINDS)


def test_digests_are_reused_unless_verdicts_are_not(one: Entry) -> None:
    directory = base_directory(one)
    identity = base_identity(directory)
    digests = {WEIGHTS: "d" * 64}
    for refresh, found in ((True, None), (False, digests), (True, None)):
        run = a_run(RunOptions(features={"refresh": refresh}))
        with closing(open_cache(one, run=run)):
            seen_bases = run.watch.remembered
            seen_bases.store(directory, identity, digests, time.time_ns() + 3_000_000_000)
            assert seen_bases.lookup(directory, identity) == found


def test_the_device_of_an_earlier_run_is_known(one: Entry) -> None:
    def is_known(secret: str = "") -> bool:
        asked = list[str]()
        run = a_run(RunOptions(device="cuda"), choose_device=asked.append)
        with closing(open_cache(one, run=run, secret=secret)) as cache:
            store(cache, one)  # else, no verdict could be reused
            cache.choose({})
        return not asked

    assert not is_known()
    with closing(open_cache(one, requested="cuda")) as cache:
        cache.received(CARD)
    assert is_known()
    assert not is_known(SECRET)
