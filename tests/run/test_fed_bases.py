"""Which bases this process reads for the worker, and when a verdict on a streamed one counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_identity
from merge_gate.files.resolve import Streamable
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.run import fed_bases
from merge_gate.run.fed_bases import FedBases
from merge_gate.sources import streamed_bases
from merge_gate.sources.local_files import LocalFiles
from merge_gate.worker.protocol import Group

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / WEIGHTS).write_bytes(b"weights")
    return str(tmp_path / "base")


def group(directory: str) -> Group:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(base=key, directory=directory, files=BaseFiles(directory=directory, weights=(WEIGHTS,)), tasks=())


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize(("note", "system"), [(None, None), ("too large", None), (None, "nfs4"), ("too large", "nfs4")])
def test_a_base_that_is_large_or_on_a_network_is_fed(
    note: str | None, system: str | None, is_remote: bool, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to workers on other machines: these read it themselves, and its digest has to be known."""
    monkeypatch.setattr(fed_bases, "too_large", lambda *_: note)
    monkeypatch.setattr(fed_bases, "network_file_system", lambda _: system)
    notes: list[str] = []
    watch = BaseWatch()
    with FedBases(watch, notes.append, is_remote=is_remote) as fed:
        scheduled = fed.schedule(group(base))
        watch.wait()
    is_fed = bool(note or system) and not is_remote
    assert (scheduled.one_pass, scheduled.fed) == (note is not None, is_fed)
    assert notes == ([note] if note else [])
    assert (watch.digest(base) is None) == is_fed
    assert fed.unproven(base) is None


def test_a_verdict_on_a_streamed_base_counts_when_all_its_bytes_have_passed(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[str] = []

    def lay_out(_: Streamable, parent: str) -> tuple[str, LocalFiles]:
        parents.append(parent)
        files = LocalFiles(base, [WEIGHTS])
        files.sha256 = digests
        return base, files

    digests: Mapping[str, str] = {WEIGHTS: "0" * 64}
    monkeypatch.setattr(streamed_bases, "lay_out", lay_out)
    watch = BaseWatch()
    asked = Streamable(repo_id="a/b", commit="c", directory=base, others=(), weights=(WEIGHTS,), token=None)
    with FedBases(watch, pytest.fail) as fed:
        assert [fed.lay_out(asked), fed.lay_out(asked)] == [base, base]
        assert parents[0] == parents[1]
        assert Path(parents[0]).is_dir()
        scheduled = fed.schedule(group(base))
        assert scheduled.one_pass
        assert scheduled.fed
        assert fed.unproven(base) is not None
        watch.passed(base, base_identity(base), digests)
        assert fed.unproven(base) is None
    assert not Path(parents[0]).exists()


@pytest.mark.parametrize(("system", "limit_s"), [(None, None), ("nfs4", fed_bases.HEADERS_LIMIT_S)])
def test_headers_on_a_network_have_a_time_limit(
    system: str | None, limit_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fed_bases, "network_file_system", lambda _: system)
    assert fed_bases.headers_limit_s("/base") == limit_s
