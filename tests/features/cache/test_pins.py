"""A pin of a base counts more than what the cache knows of the base. The worker is played."""

import time
from pathlib import Path

import pytest

from merge_gate.features.cache.remembered import SETTLED_NS, StoredDigests, boot_id
from merge_gate.features.cache.store import Seal, Store
from merge_gate.files import resolve
from merge_gate.files.identity import base_identity
from tests.support.command import entries, strict_json
from tests.support.played_merges import base_digest, configure, play

OTHER = "0" * 64


@pytest.mark.attempt("D3e", "a cached verdict, and another pin", "expectation-failed")
def test_a_cached_verdict_does_not_hide_another_pin(place: Path) -> None:
    for pin, code in ((None, 0), (base_digest(place), 0), (OTHER, 1)):
        assert gate_cached(place, pin) == code


@pytest.mark.attempt("Y50a", "a forged digest in --cache bases/, and the pin of another base", "expectation-failed")
def test_a_forged_digest_does_not_match_a_pin(place: Path) -> None:
    files = dict.fromkeys(resolve.base_weight_files(str(place / "base")), "1" * 64)
    forge(place, files)
    assert gate_cached(place, resolve.digest_of_digests(files)) == 1
    (adapter,) = entries(place / "merge-gate-report")
    assert (adapter["verdict"], adapter["cause"]) == ("failed", "expectation-failed")
    assert adapter["findings"][0]["origin"] == "base"
    assert gate_cached(place, base_digest(place)) == 0


@pytest.mark.attempt("Y50b", "a forged digest in --cache bases/, and a run that publishes", "the digest of the bytes")
def test_a_forged_digest_is_not_published(place: Path) -> None:
    forge(place, dict.fromkeys(resolve.base_weight_files(str(place / "base")), "1" * 64))
    assert gate_cached(place, None, "--publish", "out") == 0
    (manifest,) = (place / "out").glob("*/merge-gate.json")
    assert base_digest(place) in manifest.read_text()
    assert strict_json(place / "merge-gate-report" / "report.json")["bases"][0]["sha256"] == base_digest(place)


def forge(place: Path, files: dict[str, str]) -> None:
    base = str(place / "base")
    store = Store(str(place / "cache"), Seal(), pytest.fail)
    digests = StoredDigests(store, boot_id())
    digests.store(base, base_identity(base), files, time.time_ns() + 3 * SETTLED_NS)
    assert digests.lookup(base, base_identity(base)) == files
    store.close()


def gate_cached(place: Path, pin: str | None, *words: str) -> int:
    base = {"model": "./base"} | ({"sha256": pin} if pin else {})
    configure(place, base=base)
    return play(place, "--cache", "cache", *words, adapters=["gate.yml"])
