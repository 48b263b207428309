"""What a report shows of the published models: the texts of one row for each model."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from merge_gate.report.wording import words

if TYPE_CHECKING:
    from merge_gate.records.report import PublishedModel, Report

_MANIFEST = "merge-gate.json"
_GB = 10**9
_MB = 10**6


class PublishedRow(NamedTuple):
    """One published model. All texts but `size` may come from strangers."""

    name: str
    directory: str
    dtype: str
    size: str
    sha256: str
    """The digest of its merge-gate.json, which lists all other files."""


def published_rows(report: Report) -> list[PublishedRow]:
    """The published models, in the order of the report."""
    return [_row(adapter.name, adapter.published) for adapter in report.adapters if adapter.published is not None]


def _row(name: str, model: PublishedModel) -> PublishedRow:
    digests = (file.sha256 for file in model.files if PurePosixPath(file.path) == PurePosixPath(_MANIFEST))
    size_bytes = sum(file.size_bytes for file in model.files)
    amount = f"{size_bytes / _GB:,.2f} GB" if size_bytes >= _GB else f"{size_bytes / _MB:,.1f} MB"
    return PublishedRow(
        name=name,
        directory=model.directory,
        dtype=model.dtype,
        size=f"{amount} in {words.counted(len(model.files), 'file')}",
        sha256=next(digests, ""),
    )
