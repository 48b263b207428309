"""The table of the files of a report.

It names the module of `report/formats/` that renders each file, and imports none of them: the runner's own Python reads
this table too, when it copies the report out of a container.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MB = 1024 * 1024

GENERATOR_COMMENT = "<!-- generator: merge-gate -->"
"""The generator tag of the formats that have comments."""

TAG_WITHIN_BYTES = 2048
"""How much of a file is read to find its tag."""

PUBLISH_WITHIN = "MERGE_GATE_PUBLISH_WITHIN"
"""The variable that limits the directory of published models. The action sets it for a pull request's configuration."""

_COMMENT = re.escape(GENERATOR_COMMENT.encode())


class OutputFile(NamedTuple):
    """One format. `word` selects it (`merge-gate report show --format`); `made_by` is the module with its `render`.

    `tag` matches the first bytes of a file that merge-gate wrote, and never text further down. A file larger than
    `max_bytes` is not copied out of a container.
    """

    name: str
    word: str
    made_by: str
    readers: str
    content: str
    tag: re.Pattern[bytes]
    max_bytes: int = 256 * _MB


OUTPUT_FILES = (
    OutputFile(
        "report.json",
        "json",
        "json_report",
        "programs",
        "all results in strict JSON, described below",
        re.compile(
            rb'\{\s*"schema_version":\s*"[0-9.]{1,16}",\s*"complete":\s*(?:true|false),\s*'
            rb'(?:"stale":\s*(?:null|"[a-z]{1,16}"),\s*)?"result":\s*"[a-z]{1,16}",'
            rb'\s*"counts":\s*\{[^{}]{0,256}\},\s*"tool":\s*\{\s*"name":\s*"merge-gate"\s*[,}]'
        ),
    ),
    OutputFile(
        "summary.md",
        "markdown",
        "summary",
        "people",
        "the job summary, at most 64 KiB. It has the result, a table with the worst first, and the findings of each "
        "adapter that did not pass: what is wrong, where, and what to do. If a map shows the failure, it is drawn. "
        "Identical findings are shown once. Above 40 merges, those that passed without a warning are folded at the end",
        re.compile(_COMMENT + rb"\r?\n"),
        64 * _MB,
    ),
    OutputFile(
        "report.html",
        "html",
        "html_report",
        "people",
        "one page that loads nothing: the result, counts and causes as filters, and one row for each adapter. A row "
        "has the adapter's chain of causes, findings, a map of the merged tensors, coverage, and provenance",
        re.compile(
            rb'<!DOCTYPE html>\s*<html lang="en">\s*<head>\s*<meta charset="utf-8">\s*'
            rb'<meta name="generator" content="merge-gate">'
        ),
    ),
    OutputFile(
        "junit.xml",
        "junit",
        "junit",
        "test viewers",
        "a suite per base, a case per adapter and dtype. A failed adapter is a `failure`. An adapter that could not be "
        "judged is an `error`, and so is a run that did not finish",
        re.compile(rb'<\?xml version="1\.0" encoding="UTF-8"\?>\s*' + _COMMENT),
    ),
    OutputFile(
        "report.sarif",
        "sarif",
        "sarif",
        "code scanning, editors",
        "SARIF 2.1.0: a rule per check, and a result per kind of finding. It points at the adapter's line of the "
        "configuration file, or without one at its adapter_config.json",
        re.compile(
            rb'\{\s*"\$schema":\s*"[^"\\]{1,256}",\s*"version":\s*"2\.1\.0",\s*"runs":\s*\[\s*\{\s*"tool":\s*\{'
            rb'\s*"driver":\s*\{\s*"name":\s*"merge-gate"\s*[,}]'
        ),
    ),
)
"""The most important file is first. 1,000 adapters make a report.json of about 2 MB."""
