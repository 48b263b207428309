"""Words the findings of a kind that a format does not show one by one.

In: the findings after the first. Out: one sentence without its final period, such as `11 more: NaN in 10 (layers 10–19,
mlp.down_proj), +Inf in 1 (layer 20, self_attn.o_proj)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.report.wording import words
from merge_gate.report.wording.grid import LAYER
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from merge_gate.records.terms import Finding

_MOST_NAMES = 3
_NAME_LIMIT = 60
_MESSAGE_LIMIT = 120


def more_findings(rest: Sequence[Finding]) -> str:
    """The number of the findings, what they have in common, and where they are; empty if there are none."""
    if not rest:
        return ""
    counted = [finding for finding in rest if not _more(finding)]
    total = len(counted) + sum(map(_more, rest))
    parts = [_part(values, findings) for values, findings in words.by(counted, _values).items()]
    described = listing(filter(None, parts), _MOST_NAMES)
    return f"{total:,} more: {described}" if described else f"{total:,} more"


def _more(finding: Finding) -> int:
    """How many findings the last finding counts (judging/limits.py); 0 for any other."""
    more = dict(finding.measured).get("more", 0.0)
    return int(more) if finding.message.startswith("and ") and 0 < more < 1 << 53 else 0


def _values(finding: Finding) -> str:
    kinds = ((finding.nan, "NaN"), (finding.posinf, "+Inf"), (finding.neginf, "-Inf"))
    return " and ".join(kind for count, kind in kinds if count)


def _part(values: str, findings: Sequence[Finding]) -> str:
    places = _places(findings)
    if values:
        return f"{values} in {len(findings):,}" + (f" ({places})" if places else "")
    if places:
        return f"in {places}"
    messages = dict.fromkeys(one_line(finding.message, _MESSAGE_LIMIT) for finding in findings)
    return listing(messages, _MOST_NAMES)


def _places(findings: Iterable[Finding]) -> str:
    """`layers 10–19, mlp.down_proj`; names without a layer as they are."""
    layers: set[int] = set()
    names: dict[str, None] = {}
    for finding in findings:
        name = finding.module or finding.tensor or ""
        match = LAYER.search(name)
        if match is not None:
            layers.add(int(match[0]))
            name = name[match.end() :].removeprefix(".")
        if name:
            names[one_line(name, _NAME_LIMIT)] = None
    word = "layer" if len(layers) == 1 else "layers"
    parts = [f"{word} {_ranges(sorted(layers))}"] if layers else []
    return ", ".join([*parts, *([listing(names, _MOST_NAMES)] if names else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] → 1–3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    shown = [str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans]  # noqa: RUF001 - as above
    return listing(shown, _MOST_NAMES * 2)
