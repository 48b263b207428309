"""Compares the stored tensors of a finished directory with those of the base, by name, dtype, and file.

In: the headers of both directories, and what transformers makes of them. Out: findings. Imports no torch, and opens no
files.

A name that is missing may be stored under another one: transformers renames tensors while it loads them. So names are
compared as stored, and then by the tensors of the model that they make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from merge_gate.judging.kinds import finding
from merge_gate.records.comparison import Comparison, LoadedKeys
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Finding
from merge_gate.text import counted, listing, quoted

_LISTED = 5

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def stored_findings(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    """The findings on names, ties, dtypes, and files."""
    yield from _names(base, merged, comparison)
    yield from _ties(comparison)
    yield from _files(merged)
    yield from _dtypes(base, merged, comparison)


def _names(base: BaseFiles, merged: BaseFiles, comparison: Comparison) -> Iterator[Finding]:
    before, after = comparison.base_keys, comparison.merged_keys
    of_base, of_merged = dict(before.targets), dict(after.targets)
    ties = dict(before.ties) | dict(after.ties)
    stored, own = ({one.name: None for one in files.tensors} for files in (base, merged))
    lacking = [name for name in stored if name not in own and name not in before.stale_buffers]
    extra = [name for name in own if name not in stored]
    renamed = [name for name in lacking if _makes(of_base.get(name), _made(after))]
    gone = [name for name in lacking if not _makes(of_base.get(name), _with_tied(_made(after), ties))]
    made = {target for name in gone for target in of_base.get(name, ())}
    gone += [name for name in comparison.absent if name not in made and name not in gone and name not in stored]
    expected = _with_tied(_made(before), ties) | {one.name for one in comparison.tensors if one.touched}
    expected -= {target for name in own if name in stored for target in of_merged.get(name, ())}  # made already
    added = [name for name in extra if not _makes(of_merged.get(name), expected)]
    if gone:
        what = counted(len(gone), "tensor of the base or the merge is", "tensors of the base or the merge are")
        message = f"{what} not in the directory: {_groups(gone)}"
        yield finding("not-carried", message, tensor=gone[0], tensors=len(gone))
    if added:
        what = counted(len(added), "tensor is", "tensors are")
        message = f"{what} in the directory and not in the merge: {_groups(added)}"
        yield finding("added", message, tensor=added[0], tensors=len(added))
    if renamed and not comparison.is_other_class:
        first = renamed[0]
        new = next((name for name in extra if {*of_base[first]}.intersection(of_merged.get(name, ()))), "")
        what = counted(len(renamed), "tensor of the base is", "tensors of the base are")
        message = f"{what} stored under other names or in another layout: {quoted(first, 120)} as {quoted(new, 120)}"
        yield finding("renamed", message, tensor=first, tensors=len(renamed))


def _made(keys: LoadedKeys) -> set[str]:
    """The tensors of the model that stored tensors make."""
    return {target for _, targets in keys.targets for target in targets}


def _makes(targets: Collection[str] | None, those: set[str]) -> bool:
    """Whether a stored tensor is loaded, and makes only tensors that are among those."""
    return bool(targets) and those.issuperset(targets or ())


def _with_tied(made: set[str], ties: Mapping[str, str]) -> set[str]:
    """With every tensor that is tied to one of these."""
    firsts = {ties.get(name, name) for name in made}
    return made | firsts | {name for name, first in ties.items() if first in firsts}


def _groups(names: Sequence[str]) -> str:
    """Names by their first part: 15 of `mtp.*`."""
    heads = Counter(name.partition(".")[0] for name in names)
    if len(names) <= _LISTED:
        return listing([quoted(name, 120) for name in names])
    return listing([f"{count:,} {quoted(f'{head}.*', 80, '`')}" for head, count in heads.most_common()])


def _ties(comparison: Comparison) -> Iterator[Finding]:
    before, after = dict(comparison.base_keys.ties), dict(comparison.merged_keys.ties)
    own = {*_made(comparison.base_keys), *comparison.base_keys.without_source}
    tied = [name for name in after if name not in before and name in own]
    made = _made(comparison.merged_keys).difference(comparison.untied)
    untied = [name for name in before if name not in after and name in made]
    for lost, how in (
        (tied, "one tensor in the directory and two in the base"),
        (untied, "two tensors in the directory and one in the base"),
    ):
        if lost:
            other = (after | before)[lost[0]]
            yield finding("tied", f"{quoted(lost[0], 120)} and {quoted(other, 120)} are {how}", tensor=lost[0])


# --- files -----------------------------------------------------------------------------------------------------------


def _files(merged: BaseFiles) -> Iterator[Finding]:
    """The findings on the directory's weight files alone."""
    for one in merged.findings:
        yield finding("broken-files", one.message, tensor=one.tensor, hint=one.hint)
    if names := [name for name, _ in merged.ghosts]:
        what = f"the index names {counted(len(names), 'tensor')} that the weight files do not have"
        yield finding("ghost-index", f"{what}: {_groups(names)}", tensor=names[0])
    if names := [*merged.unlisted]:
        what = f"the weight files have {counted(len(names), 'tensor')} that the index does not name"
        yield finding("ghost-index", f"{what}: {_groups(names)}", tensor=names[0])


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
        message = f"{what}, expected {quoted(old, 20)} as in the base: {_groups(names)}"
        yield finding("dtype-changed", message, tensor=names[0])
