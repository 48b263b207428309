"""The files of a report: the one table of its formats.

In: nothing. Out: `OUTPUT_FILES`. Names the module of `report/` that makes each, and imports none: the runner's own
Python reads it too, to know what it may take out of a container.
"""

from __future__ import annotations

from typing import NamedTuple

_MB = 1024 * 1024


class OutputFile(NamedTuple):
    """One format. `word` asks for it (`merge-gate report --format`), `made_by` is the module with its `render`.

    A file larger than `limit_bytes` is not taken out of a container.
    """

    name: str
    word: str
    made_by: str
    readers: str
    content: str
    limit_bytes: int = 256 * _MB


OUTPUT_FILES = (
    OutputFile("report.json", "", "json_report", "programs", "everything that was found, strict JSON, described below"),
    OutputFile(
        "summary.md",
        "markdown",
        "summary",
        "people",
        "the job summary: the result in a sentence, a table with the worst first (of more than 40 merges, those that "
        "passed without a warning are folded away at the end), and for each adapter that is not cleared what is wrong, "
        "where, and what to do; the worst one with its map in characters; what is the same in several dtypes, or of "
        "several adapters, is said once; at most 64 KiB",
        64 * _MB,
    ),
    OutputFile(
        "report.html",
        "html",
        "html_report",
        "people",
        "one page that loads nothing: verdict and counts, all adapters to sort and filter, and for each its chain of "
        "causes, its findings, a map of every merged tensor, coverage and provenance",
    ),
    OutputFile(
        "junit.xml",
        "junit",
        "junit",
        "viewers of tests",
        "a suite per base, a case per adapter and dtype; a failed adapter is a `failure`, one that could not be judged "
        "an `error`, and so is a run that did not finish",
    ),
    OutputFile(
        "report.sarif",
        "sarif",
        "sarif",
        "code scanning, editors",
        "SARIF 2.1.0: a rule per check, a result per kind of finding, at the adapter's line of the configuration file, "
        "without one at its adapter_config.json",
    ),
)
"""The one that must not be lost first. 1,000 adapters make a report.json of about 2 MB."""
