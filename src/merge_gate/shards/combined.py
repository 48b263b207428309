"""The reports of all shards → one report, as one machine would have written it.

In: what was found. Out: a `Report`; what keeps the shards from being one run is in its `problems`, and it is then never
`pass`. Reads no file. Nothing that a shard says of itself is taken for more than what the others say of it.

1. Reports of one plan belong together: the plan that most of them have is the run's; others are left out, and named.
2. A shard counts once, and only where it is complete and holds just the entries that it announced.
3. Entries stand in the order of the file, bases once.
4. Versions must be the same everywhere, and the bytes of a base; devices may differ, and are all named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from merge_gate.errors import GateError
from merge_gate.judging.baseline import WORST_LAST
from merge_gate.records.report import BaselineEntry, BaseReport, Environment, Report, Sandbox, Shard
from merge_gate.records.terms import Acceptance, Result, record
from merge_gate.report.wording.untrusted import one_line
from merge_gate.shards.base_order import Used, in_order
from merge_gate.shards.shard_files import Found
from merge_gate.text import counted, listing

_WORST = {Result.FAIL: 0, Result.ERROR: 1, Result.PASS: 2}
_VERSIONS = ("python", "torch", "peft", "transformers", "bitsandbytes")
_SHOWN = 80
_MOST_SHARDS = 99_999


@record
class _Part:
    """The report of a shard, and where it lay."""

    place: str
    report: Report
    shard: Shard

    @property
    def name(self) -> str:
        return f"shard {self.shard.index} of {self.shard.count} ({one_line(self.place, _SHOWN)})"


def combined(found: Sequence[Found]) -> Report:
    """One report of all.

    Raises:
        GateError: there is no report of a shard at all.
    """
    problems = [f"{one_line(one.place, _SHOWN)} {one.problem}" for one in found if one.report is None]
    parts = []
    for one in found:
        if one.report is not None:
            said = _unfit(one.report)
            if said or one.report.shard is None:
                problems.append(f"{one_line(one.place, _SHOWN)} {said}")
            else:
                parts.append(_Part(place=one.place, report=one.report, shard=one.report.shard))
    if not parts:
        raise GateError(
            f"there is no report of a shard: {'; '.join(problems[:5]) or 'no directory was named'}",
            hint="name the directories that the shards' reports were downloaded to, each with its report.json",
        )
    parts, strangers = _of_one_plan(parts)
    parts, doubled = _each_once(parts)
    problems += [*strangers, *doubled, *_missing(parts), *_unfinished(parts), *_other_versions(parts)]
    bases, other_bases = _bases(parts)
    problems += other_bases
    return _whole(parts, bases, tuple(problems))


def _unfit(report: Report) -> str:
    """Why a report is not that of a shard; empty where it is."""
    shard = report.shard
    if shard is None:
        return "holds the report of a whole run, expected that of a shard (merge-gate run --shard I/N)"
    ascending = all(first < then for first, then in zip(shard.positions, shard.positions[1:], strict=False))
    inside = not shard.positions or shard.positions[-1] < shard.entries
    numbered = 1 <= shard.index <= shard.count <= _MOST_SHARDS and shard.entries > 0
    fits = len(report.adapters) <= len(shard.positions) and len(shard.bases_from) == len(report.bases)
    whole = not report.complete or len(report.adapters) == len(shard.positions)
    if report.problems or not (ascending and inside and numbered and fits and whole):
        return "holds a report that contradicts itself about its shard"
    return ""


def _of_one_plan(parts: list[_Part]) -> tuple[list[_Part], list[str]]:
    """The plan that most have; among equals, the first."""
    plans = Counter(_plan(part) for part in parts)
    plan = max(plans, key=lambda one: plans[one])
    kept = [part for part in parts if _plan(part) == plan]
    return kept, [f"{part.name} is left out: {_difference(part, kept[0])}" for part in parts if _plan(part) != plan]


def _plan(part: _Part) -> tuple[object, ...]:
    shard, report = part.shard, part.report
    return shard.plan_sha256, shard.count, shard.entries, report.config.sha256, report.tool.version


def _difference(part: _Part, others: _Part) -> str:
    if part.report.tool.version != others.report.tool.version:
        theirs, ours = one_line(part.report.tool.version, _SHOWN), one_line(others.report.tool.version, _SHOWN)
        return f"merge-gate {theirs} wrote it, and {ours} the others"
    if part.report.config.sha256 != others.report.config.sha256:
        return "its configuration is another one than the others'"
    if part.shard.count != others.shard.count:
        return f"the others are of {others.shard.count} shards"
    return "its machine saw other adapters, other sizes of files or other options than the others did"


def _each_once(parts: list[_Part]) -> tuple[list[_Part], list[str]]:
    """Of a shard that is there twice the worse one: what it proved is not lost."""
    kept: dict[int, _Part] = {}
    said = []
    for part in sorted(parts, key=lambda one: _WORST[one.report.result]):
        first = kept.setdefault(part.shard.index, part)
        if first is not part:
            said.append(f"{part.name} is there twice, also in {one_line(first.place, _SHOWN)}")
    return [kept[index] for index in sorted(kept)], said


def _missing(parts: list[_Part]) -> Iterator[str]:
    count, there = parts[0].shard.count, {part.shard.index for part in parts}
    missing = [str(index) for index in range(1, count + 1) if index not in there]
    if missing:
        one, is_ = ("shard", "is") if len(missing) == 1 else ("shards", "are")
        yield f"{one} {listing(missing, 10)} of {count} {is_} missing"


def _unfinished(parts: list[_Part]) -> Iterator[str]:
    for part in parts:
        if not part.report.complete:
            done, all_of_it = len(part.report.adapters), len(part.shard.positions)
            yield f"{part.name} did not finish: it judged {done:,} of {counted(all_of_it, 'entry', 'entries')}"
    holders: dict[int, _Part] = {}
    for part in parts:
        for position in part.shard.positions:
            if holders.setdefault(position, part) is not part:
                yield f"{part.name} and {holders[position].name} judged the same entry"
                return
    entries = parts[0].shard.entries
    if len(parts) == parts[0].shard.count and len(holders) < entries:
        yield f"all shards together have {len(holders):,} of {counted(entries, 'entry', 'entries')}"


def _other_versions(parts: list[_Part]) -> Iterator[str]:
    """Other versions of the libraries may judge otherwise."""
    first = parts[0]
    for part in parts[1:]:
        if part.shard.versions_sha256 != first.shard.versions_sha256:
            theirs, ours = part.report.environment, first.report.environment
            differing = [name for name in _VERSIONS if getattr(theirs, name) != getattr(ours, name)]
            told = "other versions of the libraries, or other code of merge-gate"
            if differing:
                got, expected = (one_line(getattr(one, differing[0]) or "absent", _SHOWN) for one in (theirs, ours))
                told = f"{differing[0]} {got}, expected {expected}"
            yield f"{part.name} ran on {told}, unlike {first.name}"


def _bases(parts: list[_Part]) -> tuple[tuple[BaseReport, ...], list[str]]:
    """Bases once. One whose digest differs from machine to machine is not one base."""
    digests: dict[BaseReport, str] = {}
    used: list[Used] = []
    problems: list[str] = []
    for part in parts:
        for base, position in zip(part.report.bases, part.shard.bases_from, strict=True):
            bare = replace(base, sha256=None)
            used.append(Used(base=bare, position=position))
            if base.sha256 is not None and digests.setdefault(bare, base.sha256) != base.sha256:
                problems.append(
                    f"{part.name} read other bytes of base {one_line(base.model, _SHOWN)} than another shard"
                )
    return tuple(replace(one.base, sha256=digests.get(one.base)) for one in in_order(used)), problems


def _whole(parts: list[_Part], bases: tuple[BaseReport, ...], problems: tuple[str, ...]) -> Report:
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


def _baseline(parts: list[_Part]) -> tuple[BaselineEntry, ...]:
    """An entry that one shard has a use for is used, though it matches nothing in the others."""
    known: dict[BaselineEntry, BaselineEntry] = {}
    for part in parts:
        for one in part.report.baseline:
            bare = replace(one, outcome=Acceptance.UNMATCHED)
            known[bare] = max(one, known.get(bare, one), key=lambda entry: WORST_LAST.index(entry.outcome))
    return tuple(known.values())


def _environment(known: Sequence[Environment]) -> Environment:
    """That of the shards which merged something; where they differ, each device and all that was missing."""
    merged = [one for one in known if one.sandbox != Sandbox()] or list(known[:1])
    held = [part for part in merged[0].sandbox.held if all(part in one.sandbox.held for one in merged)]
    return replace(
        merged[0],
        device=", ".join(_once(one.device for one in merged)),
        device_name=", ".join(_once(one.device_name for one in merged if one.device_name)),
        sandbox=Sandbox(held=tuple(held), missing=tuple(_once(why for one in merged for why in one.sandbox.missing))),
    )


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
