"""Compares the stored tensors of a finished directory with those of the base, by name, dtype, and file.

In: the headers of both directories, and what transformers makes of them. Out: findings. Imports no torch, and opens no
files.

A name that is missing may be stored under another one: transformers renames tensors while it loads them. So names are
compared as stored, and then by the tensors of the model that they make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from merge_gate.judging.answer_kinds import finding
from merge_gate.records.comparison import Comparison
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Finding
from merge_gate.text import counted, listing, quoted

_LISTED = 5

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def stored_findings(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    """The findings on names, ties, dtypes, and files."""
    names = _Names(base, merged, comparison)
    yield from names.findings()
    yield from _ties(comparison, names)
    yield from file_findings(merged)
    yield from _dtypes(base, merged, comparison)


class _Names:
    """The stored names of both directories."""

    def __init__(self, base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> None:
        self.base = {one.name: one for one in base.tensors}
        self.merged = {one.name: one for one in merged.tensors}
        self._base_targets = dict(comparison.base_keys.targets)
        self._merged_targets = dict(comparison.merged_keys.targets)
        self.base_made = {target for targets in self._base_targets.values() for target in targets}
        self.merged_made = {target for targets in self._merged_targets.values() for target in targets}
        self._ties = dict(comparison.base_keys.ties) | dict(comparison.merged_keys.ties)
        self._absent = comparison.absent
        self._stale_buffers = frozenset(comparison.base_keys.stale_buffers)
        self._is_other_class = comparison.is_other_class
        self._from_adapter = {one.name for one in comparison.tensors if one.touched}

    def findings(self) -> Iterator[Finding]:
        lacking = [name for name in self.base if name not in self.merged and name not in self._stale_buffers]
        extra = [name for name in self.merged if name not in self.base]
        renamed = [name for name in lacking if self._is_stored_otherwise(name)]
        gone = [name for name in lacking if not self._has_a_source(name)]
        made = {target for name in gone for target in self._targets(name)}
        gone += [name for name in self._absent if name not in made and name not in gone and name not in self.base]
        added = [name for name in extra if not self._is_expected(name)]
        if gone:
            what = counted(len(gone), "tensor of the base or the merge is", "tensors of the base or the merge are")
            message = f"{what} not in the directory: {groups_of(gone)}"
            yield finding("not-carried", message, tensor=gone[0], tensors=len(gone))
        if added:
            what = counted(len(added), "tensor is", "tensors are")
            message = f"{what} in the directory and not in the merge: {groups_of(added)}"
            yield finding("added", message, tensor=added[0], tensors=len(added))
        if renamed and not self._is_other_class:
            first = renamed[0]
            new = next((name for name in extra if self._makes_the_same(first, name)), "")
            what = counted(len(renamed), "tensor of the base is", "tensors of the base are")
            how = f"{quoted(first, 120)} as {quoted(new, 120)}"
            message = f"{what} stored under other names or in another layout: {how}"
            yield finding("renamed", message, tensor=first, tensors=len(renamed))

    def _targets(self, name: str) -> tuple[str, ...]:
        return self._base_targets.get(name, ())

    def _is_stored_otherwise(self, name: str) -> bool:
        """Whether other stored tensors of the directory make the same tensors of the model."""
        targets = self._targets(name)
        return bool(targets) and self.merged_made.issuperset(targets)

    def _has_a_source(self, name: str) -> bool:
        """The same, or the tensors are tied to others that the directory stores."""
        targets = self._targets(name)
        return bool(targets) and all(
            target in self.merged_made or self._tied(target) & self.merged_made for target in targets
        )

    def _tied(self, target: str) -> frozenset[str]:
        first = self._ties.get(target, target)
        return frozenset({first} | {name for name, other in self._ties.items() if other == first}) - {target}

    def _makes_the_same(self, of_base: str, of_merged: str) -> bool:
        return bool(set(self._targets(of_base)) & set(self._merged_targets.get(of_merged, ())))

    def _is_expected(self, name: str) -> bool:
        """Whether an additional stored tensor makes tensors that the base or the adapter has, too."""
        targets = self._merged_targets.get(name, ())
        return bool(targets) and all(
            target in self.base_made or target in self._from_adapter or self._tied(target) & self.base_made
            for target in targets
        )


def groups_of(names: Sequence[str]) -> str:
    """Names by their first part: 15 of `mtp.*`."""
    heads = Counter(name.partition(".")[0] for name in names)
    if len(names) <= _LISTED:
        return listing([quoted(name, 120) for name in names], _LISTED)
    return listing([f"{count:,} {quoted(f'{head}.*', 80, '`')}" for head, count in heads.most_common()], _LISTED)


def _ties(comparison: Comparison, names: _Names) -> Iterator[Finding]:
    before, after = dict(comparison.base_keys.ties), dict(comparison.merged_keys.ties)
    own = {*names.base_made, *comparison.base_keys.without_source}
    tied = [name for name in after if name not in before and name in own]
    untied = [name for name in before if name not in after and name in names.merged_made]
    untied = [name for name in untied if name not in comparison.untied]
    for lost, how in (
        (tied, "one tensor in the directory and two in the base"),
        (untied, "two tensors in the directory and one in the base"),
    ):
        if lost:
            other = (after | before)[lost[0]]
            yield finding("tied", f"{quoted(lost[0], 120)} and {quoted(other, 120)} are {how}", tensor=lost[0])


# --- files -----------------------------------------------------------------------------------------------------------


def file_findings(merged: BaseFiles) -> Iterator[Finding]:
    """The findings on the directory's weight files alone."""
    for one in merged.findings:
        yield finding("broken-files", one.message, tensor=one.tensor, hint=one.hint)
    if merged.ghosts:
        names = [name for name, _ in merged.ghosts]
        what = f"the index names {counted(len(names), 'tensor')} that the weight files do not have"
        yield finding("ghost-index", f"{what}: {groups_of(names)}", tensor=names[0])
    if names := [*merged.unlisted]:
        what = f"the weight files have {counted(len(names), 'tensor')} that the index does not name"
        yield finding("ghost-index", f"{what}: {groups_of(names)}", tensor=names[0])


def _dtypes(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    before = {one.name: one for one in base.tensors}
    expected = {one.name: one.expected_dtype for one in comparison.tensors if one.touched}
    targets: Mapping[str, tuple[str, ...]] = dict(comparison.merged_keys.targets)
    changed: dict[tuple[str, str], list[str]] = {}
    for one in merged.tensors:
        was = before.get(one.name)
        merged_dtypes = {expected.get(target) for target in targets.get(one.name, (one.name,))}
        if was is None or was.dtype == one.dtype or merged_dtypes == {_DTYPES.get(one.dtype, "")}:
            continue
        changed.setdefault((was.dtype, one.dtype), []).append(one.name)
    for (old, new), names in sorted(changed.items(), key=lambda item: -len(item[1])):
        what = f"{counted(len(names), 'tensor is', 'tensors are')} stored as {quoted(new, 20)}"
        message = f"{what}, expected {quoted(old, 20)} as in the base: {groups_of(names)}"
        yield finding("dtype-changed", message, tensor=names[0])
