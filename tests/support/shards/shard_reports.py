"""The reports of the shards of one run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from merge_gate.records.report import BaseReport, Report, Shard
from merge_gate.records.terms import Quantization
from tests.support.reports import SHA256, adapter, report

BASE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, sha256=SHA256)


def shard(index: int, *positions: int, entries: int = 5, count: int = 3, **fields: Any) -> Report:
    defaults = {"plan_sha256": "p" * 64, "versions_sha256": "v" * 64, "bases_from": positions[:1]}
    mark = Shard(index=index, count=count, entries=entries, positions=positions, **defaults)
    return report(*(adapter(f"a{position}") for position in positions), **{
        "shard": mark, "bases": (BASE,) if positions else ()} | fields)  # fmt: skip


SHARDS = (shard(1, 0, 3), shard(2, 1, 2, 4), shard(3))


def mark(one: Report, **changes: Any) -> Report:
    assert one.shard is not None
    return replace(one, shard=replace(one.shard, **changes))
