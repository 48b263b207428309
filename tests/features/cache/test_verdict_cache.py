"""A verdict that one run stores is a hit for another one, as long as base, adapter, secret, and device are the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.features.cache.store import ABANDONED_S, KINDS
from merge_gate.features.cache.verdict_cache import Cache
from merge_gate.files.base_watch import base_directory
from merge_gate.files.identity import base_identity
from merge_gate.records.files import Entry
from merge_gate.records.terms import Verdict
from tests.support.cache.caches import CARD, CPU, is_hit, open_cache, store
from tests.support.cache.verdicts import BASE, based_entry

SECRET = "a secret of this test"
OPEN_FILES = Path("/proc/self/fd")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def one(tmp_path: Path) -> Entry:
    return based_entry(tmp_path)


def test_a_stored_verdict_is_a_hit(one: Entry) -> None:
    with closing(open_cache(one)) as cache:
        assert not cache.may_hit
        assert not is_hit(cache, one)
        stored = store(cache, one)
        assert cache.may_hit
    assert stored is not None
    assert stored.judged is not None
    with closing(open_cache(one)) as cache:
        assert is_hit(cache, one)
    with closing(open_cache(one, refresh=True)) as cache:
        assert not cache.may_hit
        assert not is_hit(cache, one)
    with closing(open_cache(one, secret=SECRET)) as cache:
        assert not is_hit(cache, one)


def test_another_base_is_a_miss(one: Entry) -> None:
    with closing(open_cache(one)) as cache:
        store(cache, one)
        for other in (replace(BASE, weights="0" * 64), replace(BASE, settings="0" * 64)):
            assert cache.lookup(one, other) is None


def test_without_a_directory_a_verdict_has_a_time_and_is_not_a_hit(one: Entry) -> None:
    with closing(open_cache(one, directory=False)) as cache:
        stored = store(cache, one)
        assert not is_hit(cache, one)
        assert cache.seen_bases is None
    assert stored is not None
    assert stored.judged is not None


def test_closing_releases_the_directory_and_removes_old_unfinished_files(one: Entry, tmp_path: Path) -> None:
    with closing(open_cache(one)):
        unfinished = tmp_path / "cache" / "verdicts" / f".{'a' * 64}.{'1' * 16}.tmp"
        unfinished.write_text("half")
        os.utime(unfinished, (0, time.time() - ABANDONED_S - 60))
        open_files = len([*OPEN_FILES.iterdir()])
    assert not unfinished.exists()
    assert len([*OPEN_FILES.iterdir()]) == open_files - len(KINDS)


def test_digests_of_earlier_runs_are_reused_unless_verdicts_are_not(one: Entry) -> None:
    directory = base_directory(one)
    identity = base_identity(directory)
    digests = {WEIGHTS: "d" * 64}
    for refresh, found in ((True, None), (False, digests), (True, None)):
        with closing(open_cache(one, refresh=refresh)) as cache:
            assert cache.seen_bases is not None
            cache.seen_bases.store(directory, identity, digests, time.time_ns() + 3_000_000_000)
            assert cache.seen_bases.lookup(directory, identity) == found


# --- what may not be stored ------------------------------------------------------------------------------------------


def rewrite(one: Entry) -> None:
    Path(one.members[0].directory, WEIGHTS).write_bytes(b"WEIGHTS")


def remove(one: Entry) -> None:
    Path(one.members[0].directory, WEIGHTS).unlink()


@pytest.mark.parametrize("change", [rewrite, remove])
def test_an_adapter_that_changed_since_it_was_hashed_is_a_miss_and_not_stored(
    one: Entry, change: Callable[[Entry], None]
) -> None:
    with closing(open_cache(one)) as cache:
        assert store(cache, one) is not None
        change(one)
        assert store(cache, one) is None
    with closing(open_cache(one)) as cache:
        assert not is_hit(cache, one)


def test_an_error_is_not_stored(one: Entry) -> None:
    with closing(open_cache(one)) as cache:
        assert store(cache, one, verdict=Verdict.ERROR) is None
        assert not cache.may_hit


def test_nothing_is_stored_and_all_is_a_miss_until_the_device_is_known(one: Entry) -> None:
    with closing(open_cache(one, device=None)) as cache:
        assert store(cache, one) is None
        cache.set_device(CPU)
        assert store(cache, one) is not None
    with closing(open_cache(one, device=None)) as cache:
        assert cache.may_hit
        assert not is_hit(cache, one)


def test_a_verdict_of_another_device_is_a_miss(one: Entry) -> None:
    with closing(open_cache(one)) as cache:
        assert store(cache, one) is not None
    with closing(open_cache(one, requested="cuda", device=CARD)) as cache:
        assert not is_hit(cache, one)
    with closing(open_cache(one)) as cache:
        assert is_hit(cache, one)


def test_the_device_of_an_earlier_run_is_known(one: Entry) -> None:
    def known(cache: Cache) -> bool:
        with closing(cache):
            return cache.known_device() == CARD

    assert not known(open_cache(one, requested="cuda", device=None))
    with closing(open_cache(one, requested="cuda", device=CARD)):
        pass
    assert known(open_cache(one, requested="cuda", device=None))
    assert not known(open_cache(one, requested="cuda", device=None, secret=SECRET))
