"""Writes what a GitHub runner reads: workflow commands in the log, and the files for outputs and the summary.

Foreign text (such as the gate's log) goes in. Commands, outputs, and a log in which no foreign line is a command
come out. The runner's own Python uses it, and so does `merge-gate ci github`.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from merge_gate.report.wording.untrusted import inert, safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_ANNOTATIONS = 9
"""A step shows 10 errors. The tenth gives the number of the others."""
_LINE_LIMIT = 32_768
_TAIL_LINES = 12
_SUMMARY_LIMIT = 1_000_000
"""The runner drops a summary above 1 MiB."""
_HEADLINE_LIMIT = 200
NO_REPORT = {
    "failed": "[]", "passed": "[]", "counts": "{}", "published": "[]", "report-path": "", "report-json": "",
    "report-html": "", "sarif": "", "summary": "", "upload": "false", "upload-path": "",
}  # fmt: skip
"""Outputs of a run without a report."""


@dataclass(frozen=True)
class JobFacts:
    """What `merge-gate ci github` knows of the job besides the report. It travels as JSON, so it has no paths.

    Attributes:
        fail_on: `failed`, `warning` or `never`.
        fail_on_not_judged: whether an adapter that could not be judged fails the job, also if another one failed.
        uploads_report: whether the report becomes an artifact.
        uploads_sarif: whether the findings go to code scanning.
        lacks_token: whether it is a run for a fork, which has no token of the Hub.
        file: the configuration as annotations name it; empty if it is outside the workspace, or if there is none.
        publish: the directory of published models; empty for none.
        output_file: the runner's file for outputs.
        summary_file: the runner's file for the summary.
        exit_code: the gate's exit code.
        problem: the reason why there is no verdict, whatever the report says; empty if there is none.
        last_lines: the end of the gate's log. Without a report, it is the only explanation.
    """

    fail_on: str = "failed"
    fail_on_not_judged: bool = True
    uploads_report: bool = False
    uploads_sarif: bool = False
    lacks_token: bool = False
    file: str = ""
    publish: str = ""
    output_file: str = ""
    summary_file: str = ""
    exit_code: int = 3
    problem: str = ""
    last_lines: str = ""


# --- the log -------------------------------------------------------------------------------------------------------


class Log:
    """Passes foreign text on to the runner's log, line by line, and makes it harmless.

    Between `open` and `close` the runner obeys no command (`::stop-commands::`). In addition, text that looks like a
    command is altered, and a lone carriage return ends a line, as for the runner. `secret` becomes `***`. Lines that
    name a place in `config`, the path that the gate got, are collected in `places`; none if it is empty.
    """

    def __init__(self, stream: BinaryIO, secret: str = "", config: str = "") -> None:
        self._stream = stream
        self._secret = secret
        self._place = re.compile(re.escape(config) + r":(\d+):(\d+): (.+)") if config else None
        self.places: list[tuple[str, str, str]] = []
        self._token = secrets.token_hex(16)
        self._rest = b""
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def tail(self) -> list[str]:
        """The last lines of foreign text, in their harmless form."""
        return [line for line in self._tail if line.strip()]

    def open(self) -> None:
        """Start foreign text."""
        self._put(f"::stop-commands::{self._token}")

    def close(self) -> None:
        """Write the rest of the last line, and end foreign text."""
        with self._lock:
            if self._rest:
                self._foreign(self._rest)
            self._rest = b""
        self._put(f"::{self._token}::")

    def write(self, data: bytes) -> None:
        """Pass on a piece of foreign text. Any thread may call this."""
        with self._lock:
            *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            if len(self._rest) > _LINE_LIMIT:
                lines.append(self._rest)
                self._rest = b""
            for line in lines:
                self._foreign(line)

    def _foreign(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        harmless = safe_text(text.replace(self._secret, "***") if self._secret else text)
        self._tail.append(harmless)
        match = self._place.fullmatch(harmless) if self._place else None
        if match and len(self.places) < MAX_ANNOTATIONS:
            self.places.append((match[1], match[2], match[3]))
        self._put(harmless)

    def _put(self, line: str) -> None:
        self._stream.write(line.encode("utf-8") + b"\n")
        self._stream.flush()


# --- commands ------------------------------------------------------------------------------------------------------


def command(name: str, message: str, **properties: str) -> str:
    """Return one workflow command, escaped by the runner's rules (actions/runner, ActionCommand.cs)."""
    listed = ",".join(
        f"{key}={_data(value).replace(':', '%3A').replace(',', '%2C')}" for key, value in properties.items()
    )
    return f"::{name}{' ' if listed else ''}{listed}::{_data(message)}"


def _data(text: str) -> str:
    """Escape a message. `::` in it is also altered: act, and the runners built on it, split at the last `::`."""
    return re.sub(":(?=:)", ": ", inert(text)).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def annotate_config(places: Sequence[tuple[str, str, str]], file: str) -> list[str]:
    """Return an error for each problem of the configuration, at its line; no errors if `file` is empty."""
    title = "merge-gate: configuration"
    return [
        command("error", problem, file=file, line=line, col=column, title=title)
        for line, column, problem in places
        if file
    ]


def file_in_workspace(path: Path | None, workspace: Path) -> str:
    """Return `path` relative to the workspace with forward slashes; empty if it is outside, or if there is none."""
    if path is None:
        return ""
    inside = os.path.relpath(path, workspace).replace(os.sep, "/")
    return "" if inside == ".." or inside.startswith("../") else inside


def missing_artifacts(server: str) -> str:
    """Return the reason why a server takes no artifacts of version 4; empty for GitHub's own servers, which do."""
    host = (urlsplit(server).hostname or "").lower()
    if not host or host == "github.com" or host.endswith((".ghe.com", ".localhost")):
        return ""
    return (
        f"{host} is GitHub Enterprise Server, which does not support the artifacts of actions/upload-artifact@v4: the "
        "report was not uploaded; upload the directory in the output report-path with actions/upload-artifact@v3"
    )


def literal_patterns(paths: Sequence[Path]) -> str:
    """Return absolute paths for actions/upload-artifact: one pattern on each line, with escaped wildcards."""
    return "\n".join(re.sub(r"([\\*?\[])", r"\\\1", str(path)) for path in paths)


# --- files of the runner -------------------------------------------------------------------------------------------


def headline(line: str) -> str:
    """The result in a line that a workflow can put anywhere: letters, digits, blanks, and ``,.:;()/_+%-``.

    Other characters are left out, so that a shell finds nothing to run in it.
    """
    return re.sub(r"[^A-Za-z0-9 ,.:;()/_+%-]|:(?=:)", "", f"merge-gate {line}")[:_HEADLINE_LIMIT].strip()


def without_verdict(problem: str) -> dict[str, str]:
    """Outputs of a run that has no verdict, by the reason."""
    return {
        "result": "error",
        "headline": headline(f"ERROR: {problem.splitlines()[0]}"),
        "conclusion": "failure",
        "reason": "the job fails: the run has no complete report",
        "upload-sarif": "false",
    }


def with_problem(summary: str, problem: str) -> str:
    """The summary, after the reason why there is no verdict (if there is one)."""
    if not problem:
        return summary
    quoted = "\n".join(f"    {line}" for line in problem.splitlines())
    return f"### merge-gate: error\n\n{quoted}\n\n{summary}"


def write_outputs(file: str, outputs: Mapping[str, str]) -> None:
    """Append `outputs` to the file GITHUB_OUTPUT, each between random delimiters."""
    lines: Sequence[str] = [
        line
        for name, value in outputs.items()
        for delimiter in (f"merge-gate-{secrets.token_hex(16)}",)
        for line in (f"{name}<<{delimiter}", value, delimiter)
    ]
    _append(file, "\n".join(lines) + "\n")


def write_summary(file: str, text: str) -> None:
    """Append `text` to the file GITHUB_STEP_SUMMARY. A text that is too long is cut at the end of a line."""
    data = text.encode("utf-8")
    if len(data) > _SUMMARY_LIMIT:
        text = data[:_SUMMARY_LIMIT].decode("utf-8", "ignore").rpartition("\n")[0]
        text += "\n\n_The rest is in the report's files._\n"
    _append(file, text if text.endswith("\n") else text + "\n")


def _append(file: str, text: str) -> None:
    if file:
        with Path(file).open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
