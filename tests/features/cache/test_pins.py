"""A pin of a base counts more than what the cache knows of the base. The worker is played."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.features.cache.remembered import SETTLED_NS, StoredDigests, boot_id
from merge_gate.features.cache.store import Seal, Store
from merge_gate.files import resolve
from merge_gate.files.identity import base_identity
from tests.support.played_merges import base_digest, lay, play, played

OTHER = "0" * 64


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, names=["one"])
    return tmp_path


def report(place: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((place / "merge-gate-report" / "report.json").read_text())
    return loaded


@pytest.mark.attempt("D3e", "a cached verdict, and another pin", "expectation-failed")
def test_a_cached_verdict_does_not_hide_another_pin(place: Path) -> None:
    with played(place / "base"):
        for pin, code in ((None, 0), (base_digest(place), 0), (OTHER, 1)):
            base = {"model": "./base"} | ({"sha256": pin} if pin else {})
            (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./one"]}))
            assert main(["run", "gate.yml", "--cache", "cache"]) == code


@pytest.mark.attempt("Y50a", "a forged digest in --cache bases/, and the pin of another base", "expectation-failed")
def test_a_forged_digest_does_not_match_a_pin(place: Path) -> None:
    files = dict.fromkeys(resolve.base_weight_files(str(place / "base")), "1" * 64)
    forge(place, files)
    assert gate_cached(place, resolve.digest_of_digests(files)) == 1
    (adapter,) = report(place)["adapters"]
    assert (adapter["verdict"], adapter["cause"]) == ("failed", "expectation-failed")
    assert adapter["findings"][0]["origin"] == "base"
    assert gate_cached(place, base_digest(place)) == 0


@pytest.mark.attempt("Y50b", "a forged digest in --cache bases/, and a run that publishes", "the digest of the bytes")
def test_a_forged_digest_is_not_published(place: Path) -> None:
    forge(place, dict.fromkeys(resolve.base_weight_files(str(place / "base")), "1" * 64))
    assert gate_cached(place, None, "--publish", "out") == 0
    (manifest,) = (place / "out").glob("*/merge-gate.json")
    assert base_digest(place) in manifest.read_text()
    assert report(place)["bases"][0]["sha256"] == base_digest(place)


def forge(place: Path, files: dict[str, str]) -> None:
    base = str(place / "base")
    store = Store(str(place / "cache"), Seal(), pytest.fail)
    digests = StoredDigests(store, boot_id())
    digests.store(base, base_identity(base), files, time.time_ns() + 3 * SETTLED_NS)
    assert digests.lookup(base, base_identity(base)) == files
    store.close()


def gate_cached(place: Path, pin: str | None, *words: str) -> int:
    base = {"model": "./base"} | ({"sha256": pin} if pin else {})
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./one"]}))
    return play(place, "--cache", "cache", *words, adapters=["gate.yml"])
