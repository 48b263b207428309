"""Renders a first baseline: YAML with an entry for each failed adapter and cause of a report.

Reason and owner are empty, and the gate refuses a baseline with empty ones, so someone has to fill them in.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING

from merge_gate.judging.baseline import adapter_digest, failing_checks
from merge_gate.records.terms import Verdict
from merge_gate.report.wording.untrusted import one_line
from merge_gate.report.wording.words import NAME_LIMIT, precision

if TYPE_CHECKING:
    from merge_gate.records.report import Report

DAYS = 90
"""How many days the entries of a first baseline are valid."""

_HEAD = """\
# Known failures: each entry accepts one adapter with these files and this cause until the end of a day.
# The verdict stays `failed`, but does not fail the run. Write a reason and an owner for each entry: without them, the
# gate refuses this file. Name the file in the config: `baseline: FILE`.
version: 1
"""


def render(report: Report, today: dt.date) -> str:
    """The YAML of a first baseline."""
    names: dict[tuple[str, str], list[str]] = {}
    also: dict[tuple[str, str], set[str]] = {}
    for adapter in report.adapters:
        digest = adapter_digest(adapter.files)
        if adapter.verdict is Verdict.FAILED and digest and adapter.cause:
            key = digest, adapter.cause
            name = f"{one_line(adapter.name, NAME_LIMIT)} ({precision(adapter.base)})"
            names.setdefault(key, []).append(name)
            also.setdefault(key, set()).update(failing_checks(adapter) - {adapter.cause})
    until = (today + dt.timedelta(days=DAYS)).isoformat()
    entries = []
    for (digest, cause), listed in names.items():
        more = sorted(also[digest, cause])
        entries += [
            f"  # {', '.join(dict.fromkeys(listed))}",
            f"  - adapter: {json.dumps(digest)}",
            f"    cause: {json.dumps(cause)}",
            *([f"    also: {json.dumps(more)}"] if more else []),
            '    reason: ""',
            '    owner: ""',
            f'    until: "{until}"',
        ]
    return _HEAD + ("\n".join(["accept:", *entries]) if entries else "accept: []") + "\n"
