"""Which bases this process reads for the worker, and when a verdict on a streamed one counts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.cache.base_records import BaseRecords
from merge_gate.cache.seal import Seal
from merge_gate.cache.store import Store
from merge_gate.errors import UsageError
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_identity
from merge_gate.records.files import BaseFiles, Fetched
from merge_gate.records.measured import BaseRecord, TensorStats
from merge_gate.records.terms import BaseKey, Quantization, Read
from merge_gate.run import fed_bases
from merge_gate.run.fed_bases import FedBases, network_file_system
from merge_gate.sources import hub_file
from merge_gate.sources.read_ahead import LocalFiles
from merge_gate.worker.protocol import Group, Task

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


@pytest.mark.parametrize(("note", "system"), [(None, None), ("too large", None), (None, "nfs4"), ("too large", "nfs4")])
def test_a_base_that_is_large_or_on_a_network_is_fed(
    note: str | None, system: str | None, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fed_bases, "too_large", lambda *_: note)
    monkeypatch.setattr(fed_bases, "network_file_system", lambda _: system)
    notes: list[str] = []
    watch = BaseWatch()
    with FedBases(watch, notes.append) as fed:
        scheduled = fed.schedule(group(base))
        watch.wait()
    is_fed = bool(note or system)
    assert (scheduled.one_pass, scheduled.fed) == (note is not None, is_fed)
    assert notes == ([note] if note else [])
    assert (watch.digest(base) is None) == is_fed
    assert fed.unproven(base) is None


def test_a_verdict_on_a_streamed_base_counts_when_all_its_bytes_have_passed(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[str] = []

    def lay_out(_: Fetched, parent: str) -> tuple[str, LocalFiles]:
        parents.append(parent)
        files = LocalFiles(base, [WEIGHTS])
        files.sha256 = digests
        return base, files

    digests: Mapping[str, str] = {WEIGHTS: "0" * 64}
    monkeypatch.setattr(hub_file, "lay_out", lay_out)
    watch = BaseWatch()
    asked = Fetched(repo_id="a/b", commit="c", directory=base, sizes={}, streamable=(WEIGHTS,))
    with FedBases(watch, pytest.fail) as fed:
        assert [fed.lay_out(asked), fed.lay_out(asked)] == [base, base]
        assert parents[0] == parents[1]
        assert Path(parents[0]).is_dir()
        streamed = BaseFiles(directory=base, weights=(WEIGHTS,), is_streamed=True)
        scheduled = fed.schedule(replace(group(base), files=streamed))
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


# --- records of whole bases ------------------------------------------------------------------------------------------


def asked(directory: str) -> Group:
    """A group whose record is kept, with one task."""
    return replace(group(directory), keeps_record=True, tasks=(Task(index=0, files=()),))


FIGURES = TensorStats(name="w", dtype="float32", shape=(1,), numel=1, minimum=0.0, maximum=1.0)


@pytest.mark.parametrize(
    ("read", "is_large", "is_used"),
    [(Read.AUTO, False, True), (Read.AUTO, True, True), (Read.TOUCHED, False, True), (Read.WHOLE, True, False)],
)
def test_the_worker_gets_the_records_of_a_base_that_need_not_be_read_whole(
    read: Read, is_large: bool, is_used: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fed_bases, "too_large", lambda *_: "too large" if is_large else None)
    monkeypatch.setattr(fed_bases, "network_file_system", lambda _: None)
    records = BaseRecords(Store(str(tmp_path / "cache"), Seal(), pytest.fail), "a run")
    watch = BaseWatch()
    with FedBases(watch, lambda _: None, records=records) as fed:
        with pytest.raises(UsageError):
            fed.schedule(group(base), Read.TOUCHED)
        assert fed.schedule(group(base), Read.WHOLE).keeps_record
        watch.wait()
        watch.passed(base, base_identity(base), {WEIGHTS: "0" * 64})
        fed.measured(asked(base), 0, BaseRecord(model_class="A", figures=(FIGURES,)))
        fed.store_records()
        scheduled = fed.schedule(group(base), read)
    assert [one.model_class for one in scheduled.records] == (["A"] if is_used else [])
    assert scheduled.keeps_record, "another class may have no record"
    assert scheduled.one_pass == (is_large or read is Read.TOUCHED)


def test_a_base_without_a_digest_leaves_no_record(base: str, tmp_path: Path) -> None:
    records = BaseRecords(Store(str(tmp_path / "cache"), Seal(), pytest.fail), "a run")
    with FedBases(BaseWatch(), pytest.fail, records=records) as fed:
        fed.measured(asked(base), 0, BaseRecord(model_class="A", figures=(FIGURES,)))
        fed.store_records()
    assert not list((tmp_path / "cache").rglob("*.*"))
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    ("task", "keeps_record", "figures"),
    [(7, True, (FIGURES,)), (0, False, (FIGURES,)), (0, True, (FIGURES, FIGURES)), (0, True, 5), (0, True, (1,))],
)
def test_a_record_that_the_worker_was_not_asked_for_is_not_stored(
    task: int, keeps_record: bool, figures: Any, base: str, tmp_path: Path
) -> None:
    """Code of a base runs in the worker, and can send any."""
    records = BaseRecords(Store(str(tmp_path / "cache"), Seal(), pytest.fail), "a run")
    watch = BaseWatch()
    watch.passed(base, base_identity(base), {WEIGHTS: "0" * 64})
    with FedBases(watch, pytest.fail, records=records) as fed:
        fed.measured(
            replace(asked(base), keeps_record=keeps_record), task, BaseRecord(model_class="A", figures=figures)
        )
        fed.store_records()
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


# --- which files are on a network file system, by the kernel's own list of mounts -------------------------------------


@pytest.mark.parametrize(
    ("system", "is_network"),
    [
        ("nfs4", True),
        ("cifs", True),
        ("fuse.sshfs", True),
        ("fuse", True),
        ("9p", True),
        ("ext4", False),
        ("overlay", False),
        ("fuseblk", False),
        ("fuse.fuse-overlayfs", False),
    ],
)
def test_the_type_of_the_mount_decides(system: str, is_network: bool, tmp_path: Path) -> None:
    weights, mounts = tmp_path / "model.safetensors", tmp_path / "mountinfo"
    weights.touch()
    (tmp_path / "linked.safetensors").symlink_to(weights)
    device = weights.stat().st_dev
    mounts.write_text(
        "21 1 0:999 / /other rw,relatime shared:1 - nfs4 server:/x rw\n"
        f"22 1 {os.major(device)}:{os.minor(device)} / /mnt rw,relatime shared:1 master:2 - {system} source rw\n"
    )
    for path in (weights, tmp_path / "linked.safetensors"):
        assert network_file_system([path], mounts) == (system if is_network else None)


def test_what_cannot_be_looked_up_is_no_network(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    assert network_file_system([tmp_path], mounts) is None
    mounts.write_text("garbled\n")
    assert network_file_system([tmp_path], mounts) is None
    mounts.write_text("")
    assert network_file_system([tmp_path / "absent"], mounts) is None
    assert network_file_system([], Path("/proc/self/mountinfo")) is None
