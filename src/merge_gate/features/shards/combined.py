"""Finds the reports of all shards, and combines them into one, as one machine would have written it.

In: directories, each the output of a shard, or a directory of outputs. Out: a `Report`. Its `problems` say why the
shards are not one run, and a report with problems never has the result `pass`. It trusts no shard more than the others.

1. The plan of the run is the plan in most of the reports. Reports with other plans are named and left out.
2. A shard counts once, if it is complete and has exactly the entries that it announces.
3. Versions, and the bytes of a base, must be the same in all shards. Devices may differ, and are all named.
4. Entries are in the order of the configuration. A base is listed once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.earlier_reports import PREVIOUS
from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.regular_file import open_regular_file
from merge_gate._internal.text import counted, listing
from merge_gate.judging.baseline import WORST_LAST
from merge_gate.records.report import BaseReport, Environment, Report, Sandbox, Shard
from merge_gate.records.terms import Acceptance, BaselineEntry, Result, record
from merge_gate.report.stored.report_files import read_report
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.tally import in_order

REPORT = "report.json"
MOST_DIRECTORIES = 1_000
"""The most directories that are read in one directory. A matrix of GitHub has at most 256 jobs."""

_LINK = "is a symbolic link, which is not followed, expected a directory"
_WORST = {Result.FAIL: 0, Result.ERROR: 1, Result.PASS: 2}
_VERSIONS = ("python", "torch", "peft", "transformers", "bitsandbytes")
_SHOWN = 80
_MOST_SHARDS = 99_999


PlacedReport = tuple[str, Report | str]
"""A place, and its report, or the problem with it, which continues a sentence that begins with the place."""


# --- finding ---------------------------------------------------------------------------------------------------------


def reports_in(directories: Sequence[str]) -> list[PlacedReport]:
    """Every report in these directories and directly below them, each file once, in the order of their names.

    The files came over a network: no link is followed, no pipe is waited for, and size and number are bounded.
    """
    seen: set[tuple[int, int]] = set()
    return [report for directory in directories for report in _in(Path(directory), seen)]


def refuse_overwriting(reports: Sequence[PlacedReport], output: str) -> None:
    """Refuse to replace a report that was read.

    Raises:
        UsageError: the output directory is the directory of a shard.
    """
    for place, report in reports:
        if isinstance(report, Report) and Path(place).resolve() == Path(output).resolve():
            raise UsageError(
                f"--output {output} is the directory of a shard, whose report would be lost",
                hint="choose another directory with --output",
            )


def _in(directory: Path, seen: set[tuple[int, int]]) -> Iterator[PlacedReport]:
    if os.path.islink(directory):  # noqa: PTH114 (False for a name that is too long)
        yield str(directory), _LINK
        return
    try:
        with os.scandir(directory) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield str(directory), f"cannot be read: {error.strerror or error}"
        return
    places = [directory] if any(entry.name == REPORT for entry in inside) else []
    links = [entry.path for entry in inside if entry.is_symlink() and entry.name != REPORT]
    below = [Path(entry.path) for entry in inside if entry.is_dir(follow_symlinks=False) and entry.name != PREVIOUS]
    if not places and not below and not links:
        yield str(directory), f"has no {REPORT}, and no directory with one"
    yield from ((link, _LINK) for link in links[:MOST_DIRECTORIES])
    if len(below) > MOST_DIRECTORIES:
        yield str(directory), f"has {len(below):,} directories; only {MOST_DIRECTORIES:,} of them were read"
    for place in (*places, *below[:MOST_DIRECTORIES]):
        if (report := _read(place / REPORT, seen)) is not None:
            yield str(place), report


def _read(path: Path, seen: set[tuple[int, int]]) -> Report | str | None:
    """The report in a file, or the problem with it; None if it was read before."""
    try:
        with open_regular_file(path) as file:
            status = os.fstat(file.fileno())
            report = read_report(file, str(path))
    except FileNotFoundError:
        return f"has no {REPORT}"
    except OSError as error:
        return f"has a {REPORT} that cannot be read: {error.strerror}"
    except GateError as error:
        return f"has a {REPORT} that is not valid: {one_line(error.message, 300)}"
    is_new = (status.st_dev, status.st_ino) not in seen
    seen.add((status.st_dev, status.st_ino))
    return report if is_new else None


# --- combining -------------------------------------------------------------------------------------------------------


@record
class _ShardReport:
    """A report of a shard, and the directory that it is in."""

    place: str
    report: Report
    shard: Shard

    @property
    def name(self) -> str:
        return f"shard {self.shard.index} of {self.shard.count} ({one_line(self.place, _SHOWN)})"


def combined(reports: Sequence[PlacedReport]) -> Report:
    """One report of all shards.

    Raises:
        GateError: none of them is the report of a shard.
    """
    problems, parts = [], []
    for place, report in reports:
        problem = report if isinstance(report, str) else _unfit(report)
        if isinstance(report, Report) and report.shard is not None and not problem:
            parts.append(_ShardReport(place=place, report=report, shard=report.shard))
        else:
            problems.append(f"{one_line(place, _SHOWN)} {problem}")
    if not parts:
        raise GateError(
            f"there is no report of a shard: {'; '.join(problems[:5]) or 'no directory was named'}",
            hint="name the directories that the shards' reports were downloaded to, each with its report.json",
        )
    parts, of_other_plans = _of_one_plan(parts)  # 1
    parts, duplicates = _each_once(parts)  # 2
    problems += [*of_other_plans, *duplicates, *_missing(parts), *_unfinished(parts)]
    problems += _other_versions(parts)  # 3
    bases, other_bases = _bases(parts)
    return _whole(parts, bases, (*problems, *other_bases))  # 4


def _unfit(report: Report) -> str:
    """Why a report is not the report of a shard; empty if it is."""
    shard = report.shard
    if shard is None:
        return "has the report of a whole run, expected the report of a shard (merge-gate run --shard I/N)"
    ascending = all(first < then for first, then in zip(shard.positions, shard.positions[1:], strict=False))
    inside = not shard.positions or shard.positions[-1] < shard.entries
    numbered = 1 <= shard.index <= shard.count <= _MOST_SHARDS and shard.entries > 0
    fits = len(report.adapters) <= len(shard.positions) and len(shard.bases_from) == len(report.bases)
    whole = not report.complete or len(report.adapters) == len(shard.positions)
    if report.problems or not (ascending and inside and numbered and fits and whole):
        return "has a report that contradicts itself about its shard"
    return ""


def _of_one_plan(parts: list[_ShardReport]) -> tuple[list[_ShardReport], list[str]]:
    """The reports of the plan that most have, and why others are left out. The first plan wins a tie."""
    plans = Counter(_plan(part) for part in parts)
    plan = max(plans, key=lambda each: plans[each])
    kept = [part for part in parts if _plan(part) == plan]
    return kept, [f"{part.name} is left out: {_difference(part, kept[0])}" for part in parts if _plan(part) != plan]


def _plan(part: _ShardReport) -> tuple[object, ...]:
    shard, report = part.shard, part.report
    config = report.config.sha256, report.config.policy
    return shard.plan_sha256, shard.count, shard.entries, config, report.tool.version


def _difference(part: _ShardReport, others: _ShardReport) -> str:
    if part.report.tool.version != others.report.tool.version:
        theirs, ours = one_line(part.report.tool.version, _SHOWN), one_line(others.report.tool.version, _SHOWN)
        return f"merge-gate {theirs} wrote it, and {ours} the others"
    if part.report.config.sha256 != others.report.config.sha256:
        return "its configuration differs from the others'"
    if part.report.config.policy != others.report.config.policy:
        return "its policy differs from the others'"
    if part.shard.count != others.shard.count:
        return f"the others are of {others.shard.count} shards"
    return "its machine saw other adapters, file sizes, or options than the others"


def _each_once(parts: list[_ShardReport]) -> tuple[list[_ShardReport], list[str]]:
    """Each shard once. If a shard has two reports, the worse one counts, so that no failure is lost."""
    by_index: dict[int, _ShardReport] = {}
    duplicates = []
    for part in sorted(parts, key=lambda part: _WORST[part.report.result]):
        first = by_index.setdefault(part.shard.index, part)
        if first is not part:
            duplicates.append(f"{part.name} is there twice, also in {one_line(first.place, _SHOWN)}")
    return [by_index[index] for index in sorted(by_index)], duplicates


def _missing(parts: list[_ShardReport]) -> Iterator[str]:
    count, there = parts[0].shard.count, {part.shard.index for part in parts}
    missing = [str(index) for index in range(1, count + 1) if index not in there]
    if missing:
        shards, are = ("shard", "is") if len(missing) == 1 else ("shards", "are")
        yield f"{shards} {listing(missing, 10)} of {count} {are} missing"


def _unfinished(parts: list[_ShardReport]) -> Iterator[str]:
    for part in parts:
        if not part.report.complete:
            done, all_of_it = len(part.report.adapters), len(part.shard.positions)
            yield f"{part.name} did not finish: it judged {done:,} of {counted(all_of_it, 'entry', 'entries')}"
    holders: dict[int, _ShardReport] = {}
    for part in parts:
        for position in part.shard.positions:
            if holders.setdefault(position, part) is not part:
                yield f"{part.name} and {holders[position].name} judged the same entry"
                return
    entries = parts[0].shard.entries
    if len(parts) == parts[0].shard.count and len(holders) < entries:
        yield f"all shards together have {len(holders):,} of {counted(entries, 'entry', 'entries')}"


def _other_versions(parts: list[_ShardReport]) -> Iterator[str]:
    """Shards that ran on other versions, which may reach other verdicts."""
    first = parts[0]
    for part in parts[1:]:
        if part.shard.versions_sha256 != first.shard.versions_sha256:
            theirs, ours = part.report.environment, first.report.environment
            differing = [name for name in _VERSIONS if getattr(theirs, name) != getattr(ours, name)]
            what = "other versions of the libraries, or other code of merge-gate"
            if differing:
                got, expected = (one_line(getattr(each, differing[0]) or "absent", _SHOWN) for each in (theirs, ours))
                what = f"{differing[0]} {got}, expected {expected}"
            yield f"{part.name} ran on {what}, unlike {first.name}"


def _bases(parts: list[_ShardReport]) -> tuple[tuple[BaseReport, ...], list[str]]:
    """Each base once, and the shards whose digest of a base differs: they read another base."""
    digests: dict[BaseReport, BaseReport] = {}
    uses: list[tuple[BaseReport, tuple[int, str]]] = []
    problems: list[str] = []
    for part in parts:
        for base, position in zip(part.report.bases, part.shard.bases_from, strict=True):
            bare = base.bare
            uses.append((bare, (position, base.first_adapter)))
            if base.sha256 is not None and digests.setdefault(bare, base).sha256 != base.sha256:
                problems.append(
                    f"{part.name} read different bytes of base {one_line(base.model, _SHOWN)} than another shard"
                )
    bases = in_order(uses).items()
    return tuple(replace(digests.get(base, base), first_adapter=name) for base, (_, name) in bases), problems


def _whole(parts: list[_ShardReport], bases: tuple[BaseReport, ...], problems: tuple[str, ...]) -> Report:
    first = parts[0].report
    placed = {
        position: adapter
        for part in reversed(parts)
        for position, adapter in zip(part.shard.positions, part.report.adapters, strict=False)
    }
    return Report(
        complete=len(placed) == parts[0].shard.entries and all(part.report.complete for part in parts),
        tool=first.tool,
        environment=_environment([part.report.environment for part in parts]),
        config=first.config,
        bases=bases,
        adapters=tuple(placed[position] for position in sorted(placed)),
        problems=problems,
        baseline=_baseline(parts),
    )


def _baseline(parts: list[_ShardReport]) -> tuple[BaselineEntry, ...]:
    """Each entry once. One that a shard used is used, although it matches nothing in the others."""
    entries: dict[BaselineEntry, BaselineEntry] = {}
    for part in parts:
        for entry in part.report.baseline:
            bare = replace(entry, outcome=Acceptance.UNMATCHED)
            entries[bare] = max(entry, entries.get(bare, entry), key=lambda each: WORST_LAST.index(each.outcome))
    return tuple(entries.values())


def _environment(environments: Sequence[Environment]) -> Environment:
    """The environment of the shards that merged: all devices, and the restrictions that all or only some had."""
    merged = [each for each in environments if each.sandbox != Sandbox()] or list(environments[:1])
    held = [part for part in merged[0].sandbox.held if all(part in each.sandbox.held for each in merged)]
    missing = _once(why for each in merged for why in each.sandbox.missing)
    return replace(
        merged[0],
        device=", ".join(_once(each.device for each in merged)),
        device_name=", ".join(_once(each.device_name for each in merged if each.device_name)),
        sandbox=Sandbox(held=tuple(held), missing=tuple(missing)),
    )


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
