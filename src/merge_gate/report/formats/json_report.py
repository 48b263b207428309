"""The report for programs: strict JSON (RFC 8259, no bare NaN or Infinity), and back.

In: a `records.Report`, or the bytes of a report.json of unknown origin. Out: `render`, the text of report.json, and
`read`, the report again. Knows neither files nor the other formats. Every key is always there; what is not known is
null.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import NoReturn

from merge_gate.errors import UsageError
from merge_gate.records.report import AdapterReport, BaselineEntry, BaseReport, Environment, Report, Shard
from merge_gate.records.terms import Result, Verdict, record, told
from merge_gate.report.formats.fields import Json, UnreadableError, dump, load
from merge_gate.report.formats.remembered import Remembered
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import is_hidden

SCHEMA_VERSION = "1.0"
TOOL = "merge-gate"

# Escaped although JSON does not ask for it: characters that hide or reorder text in a terminal, and the one sequence
# that a GitHub runner obeys anywhere in a log line. So `cat report.json` in a job is harmless; parsers see no change.
_MAYBE_UNSAFE = re.compile(r"[^\n -~]|#(?=\[)")
# Empty lists as the layout below leaves them. No text holds a line break, so nothing else looks like them.
_NO_ROWS = '\n    "rows": []'
_NO_ADAPTERS, _ADAPTERS = '\n  "adapters": []', '\n  "adapters": [\n    '
_ROW = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


@record
class Counts:
    """The entries of `adapters` by verdict: one for each adapter, base and dtype."""

    passed: int = told("Entries that passed.")
    failed: int = told("Entries that failed.")
    error: int = told("Entries that could not be judged.")


@record
class Tool:
    """What wrote the report."""

    name: str = told("Always `merge-gate`.")
    version: str = told("Its version.")


@record
class ConfigFile:
    """The configuration file."""

    path: str = told("As named on the command line; `the command line` where that names the adapters themselves.")
    sha256: str = told("Digest of its bytes, hex; without a file, of the adapters, base and dtypes that were named.")


@record
class Document:
    """The whole of report.json: a `Report` with what follows from it."""

    schema_version: str = told("Version of this format. Readers accept any 1.x.")
    complete: bool = told("False while the run goes on, and for ever if it was killed.")
    result: Result = told("The run's result. An unfinished run, or one that judged nothing, never passes.")
    counts: Counts = told("Entries of `adapters` by verdict; an adapter has one for each dtype.")
    tool: Tool = told("What wrote this.")
    environment: Environment = told("What the run ran on.")
    config: ConfigFile = told("The configuration file.")
    bases: tuple[BaseReport, ...] = told("Every base that was loaded, once.")
    adapters: tuple[AdapterReport, ...] = told("One entry per adapter, base and dtype, in the order of the file.")
    shard: Shard | None = told(
        "Which part of a larger run this is (`--shard`); null for a whole run, also one combined of shards.",
        default=None,
    )
    accepted: int = told(
        "How many of the failed ones the baseline accepts; where it is all of them, `result` is `pass`.", default=0
    )
    baseline: tuple[BaselineEntry, ...] = told("What came of each entry of the baseline.", default=())
    problems: tuple[str, ...] = told(
        "What keeps the shards that were combined from being one run; with any, `result` is never `pass`.", default=()
    )


def _document(report: Report) -> Document:
    return Document(
        schema_version=SCHEMA_VERSION,
        complete=report.complete,
        result=report.result,
        counts=Counts(**{verdict.value: report.count(verdict) for verdict in Verdict}),
        accepted=report.accepted,
        tool=Tool(name=TOOL, version=report.tool_version),
        environment=report.environment,
        config=ConfigFile(path=report.config_path, sha256=report.config_sha256),
        bases=report.bases,
        adapters=report.adapters,
        shard=report.shard,
        problems=report.problems,
        baseline=report.baseline,
    )


def render(report: Report) -> str:
    """Return report.json. Never raises for what a record may hold: non-finite figures become strings."""
    text = _laid_out(dump(replace(_document(report), adapters=())))
    texts = _TEXTS.texts(_adapter_text, report.adapters)
    if texts:
        before, _, after = text.partition(_NO_ADAPTERS)
        return "".join((before, _ADAPTERS, ",\n    ".join(texts), "\n  ]", after, "\n"))
    return text + "\n"


_TEXTS = Remembered()


def _adapter_text(adapter: AdapterReport) -> str:
    described = dump(adapter)
    rows, described["tensors"]["rows"] = described["tensors"]["rows"], []
    text = _laid_out(described)
    if rows:  # a line for each: with every cell on its own they would be most of the file
        lines = ",\n".join(f"      {_ROW.encode(row)}" for row in rows)
        text = text.replace(_NO_ROWS, f'\n    "rows": [\n{_inert(lines)}\n    ]', 1)
    return text.replace("\n", "\n    ")


def _laid_out(document: Json) -> str:
    return _inert(json.dumps(document, allow_nan=False, ensure_ascii=False, indent=2))


def _inert(text: str) -> str:
    return _MAYBE_UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    if match[0] == "#":
        return "\\u0023"
    return json.dumps(match[0]).strip('"') if is_hidden(match[0]) else match[0]


# --- back ----------------------------------------------------------------------------------------------------------


def read(data: bytes, name: str) -> Report:
    """Return the report that `render` wrote; `name` is the file's, for messages.

    Raises:
        UsageError: it is no report of version 1, or contradicts itself.
    """
    try:
        document: Document = load(Document, parsed(data), "")
        _consistent(document)
    except UnreadableError as error:
        raise UsageError(
            f"{one_line(name)} is not a report of merge-gate: {error}",
            hint="expected the report.json of a run, as `merge-gate schema report` describes it",
        ) from error
    return _report(document)


def parsed(data: bytes) -> Json:
    """JSON of unknown origin, read strictly.

    Raises:
        UnreadableError: it is none, or two readers could read it in two ways.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {error}") from error


def _refuse(constant: str) -> NoReturn:
    raise UnreadableError(f"it holds a bare {constant}, which JSON does not have")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise UnreadableError("it names a key twice in one object")
    return known


def _consistent(document: Document) -> None:
    """What follows from the adapters must follow: a `pass` above a failed adapter is no report."""
    if document.tool.name != TOOL:
        raise UnreadableError(f"tool.name is {one_line(document.tool.name, 20)}, expected {TOOL}")
    if document.schema_version.split(".")[0] != "1":
        raise UnreadableError(f"schema_version is {one_line(document.schema_version, 20)}, expected 1.x")
    expected = _document(_report(document))
    for key in ("result", "counts", "accepted"):
        if getattr(document, key) != getattr(expected, key):
            raise UnreadableError(f"{key} does not follow from the verdicts of its adapters")
    for index, adapter in enumerate(document.adapters):
        if adapter.verdict is Verdict.PASSED and adapter.cause is not None:
            raise UnreadableError(f"adapters[{index}] passed and has a cause")


def _report(document: Document) -> Report:
    return Report(
        complete=document.complete,
        tool_version=document.tool.version,
        environment=document.environment,
        config_path=document.config.path,
        config_sha256=document.config.sha256,
        bases=document.bases,
        adapters=document.adapters,
        shard=document.shard,
        problems=document.problems,
        baseline=document.baseline,
    )
