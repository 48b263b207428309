"""What a GitHub runner reads: workflow commands in the log, and the files that carry outputs and the summary.

In: foreign text (the gate's log, report.json) and the files that the runner names. Out: a log in which no foreign
line is a command, annotations, outputs. Knows nothing of containers or of how the gate runs; works from report.json.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from merge_gate.report.wording.untrusted import inert, one_line, safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ANNOTATIONS = 9
"""A step shows 10 errors; the tenth says how many more there are."""
_MESSAGE_LIMIT = 600
_NAME_LIMIT = 80
_LINE_LIMIT = 32_768
_TAIL_LINES = 12
_SUMMARY_LIMIT = 1_000_000
"""The runner drops a summary above 1 MiB."""


# --- the log -------------------------------------------------------------------------------------------------------


class Log:
    """Passes foreign text on to the runner's log, line by line, harmless.

    Between `open` and `close` the runner obeys no command (`::stop-commands::`), and each line is broken besides
    where it looks like one; the runner splits lines at a lone carriage return too. `secret` becomes `***`. Lines that
    name a place in `config`, the configuration as the gate was told it, are kept.
    """

    def __init__(self, stream: BinaryIO, secret: str = "", config: str = "") -> None:
        self._stream = stream
        self._secret = secret
        self._place = re.compile(re.escape(config) + r":(\d+):(\d+): (.+)")
        self.places: list[tuple[str, str, str]] = []
        self._token = secrets.token_hex(16)
        self._rest = b""
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def tail(self) -> list[str]:
        """The last lines of foreign text, as they were passed on."""
        return [line for line in self._tail if line.strip()]

    def open(self) -> None:
        """Begin foreign text."""
        self._put(f"::stop-commands::{self._token}")

    def close(self) -> None:
        """End foreign text, with what is left of its last line."""
        with self._lock:
            if self._rest:
                self._foreign(self._rest)
            self._rest = b""
        self._put(f"::{self._token}::")

    def write(self, data: bytes) -> None:
        """Pass on a piece of foreign text; may be called from any thread."""
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
        if (found := self._place.fullmatch(harmless)) and len(self.places) < ANNOTATIONS:
            self.places.append((found[1], found[2], found[3]))
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
    """Escape a message. `::` in it is broken besides: act, and the runners built on it, split at the last one."""
    return re.sub(":(?=:)", ": ", inert(text)).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def annotate_config(places: Sequence[tuple[str, str, str]], file: str) -> list[str]:
    """Return an error for each problem of the configuration, at its line; none where `file` is empty."""
    title = "merge-gate: configuration"
    return [
        command("error", what, file=file, line=line, col=column, title=title) for line, column, what in places if file
    ]


def annotate(report: Mapping[str, Any], file: str) -> list[str]:
    """Return an error for each adapter that failed or could not be judged, failed ones first.

    What is so of an adapter in several dtypes is one error. A failure that the baseline accepts is a warning, after the
    others.

    `file` is the configuration relative to the workspace, as the job's page shows it; empty where it lies outside.
    """
    blocked = [adapter for adapter in report["adapters"] if adapter["verdict"] != "passed"]
    blocked.sort(key=lambda adapter: (bool(adapter.get("accepted")), adapter["verdict"] != "failed"))
    told = list(dict.fromkeys(_annotation(adapter, file) for adapter in blocked))
    shown = told[:ANNOTATIONS]
    left = len(told) - len(shown)
    if left:
        shown.append(command("error", f"and {left} more; see the job summary or report.json", title="merge-gate"))
    return shown


def _annotation(adapter: Mapping[str, Any], file: str) -> str:
    cause = adapter["cause"] or "not judged"
    title = f"{one_line(str(adapter['name']), _NAME_LIMIT)} {adapter['verdict']}: {one_line(cause, _NAME_LIMIT)}"
    place = {"file": file, "line": str(adapter["line"]), "col": str(adapter["column"])} if file else {}
    level = "warning" if adapter["verdict"] == "failed" and adapter.get("accepted") else "error"
    return command(level, _sentences(adapter), **place, title=title)


def _sentences(adapter: Mapping[str, Any]) -> str:
    errors = [finding for finding in adapter["findings"] if finding["severity"] == "error"]
    deciding = [finding for finding in errors if finding["check"] == adapter["cause"]]
    for finding in [*deciding, *errors][:1]:
        lines = [one_line(finding["message"], _MESSAGE_LIMIT)]
        tensor = finding["tensor"]
        lines += [f"Where: {one_line(tensor, _MESSAGE_LIMIT)}"] if tensor and tensor not in finding["message"] else []
        lines += [f"What to do: {one_line(finding['hint'], _MESSAGE_LIMIT)}"] if finding["hint"] else []
        return "\n".join(lines)
    return "No finding was recorded; the log may say more."


def file_in_workspace(path: Path, workspace: Path) -> str:
    """Return `path` relative to the workspace with forward slashes, or an empty string where it lies outside."""
    inside = os.path.relpath(path, workspace).replace(os.sep, "/")
    return "" if inside == ".." or inside.startswith("../") else inside


def missing_artifacts(server: str) -> str:
    """Say why a server takes no artifact, nothing where it does: only GitHub's own have artifacts of version 4."""
    host = (urlsplit(server).hostname or "").lower()
    if not host or host == "github.com" or host.endswith((".ghe.com", ".localhost")):
        return ""
    return (
        f"{host} is GitHub Enterprise Server, which lacks the artifacts that actions/upload-artifact makes: the "
        "report is not uploaded and lies in the output report-path; upload it with actions/upload-artifact@v3"
    )


def literal_patterns(paths: Sequence[Path]) -> str:
    """Return absolute paths as actions/upload-artifact reads them: one pattern a line, with its wildcards escaped."""
    return "\n".join(re.sub(r"([\\*?\[])", r"\\\1", str(path)) for path in paths)


# --- files of the runner -------------------------------------------------------------------------------------------


def write_outputs(file: str, outputs: Mapping[str, str]) -> None:
    """Append `outputs` to the file GITHUB_OUTPUT, each between delimiters that nobody can guess."""
    lines: Sequence[str] = [
        line
        for name, value in outputs.items()
        for delimiter in (f"merge-gate-{secrets.token_hex(16)}",)
        for line in (f"{name}<<{delimiter}", value, delimiter)
    ]
    _append(file, "\n".join(lines) + "\n")


def write_summary(file: str, text: str) -> None:
    """Append `text` to the file GITHUB_STEP_SUMMARY, cut at the end of a line where it is too long."""
    data = text.encode("utf-8")
    if len(data) > _SUMMARY_LIMIT:
        text = data[:_SUMMARY_LIMIT].decode("utf-8", "ignore").rpartition("\n")[0]
        text += "\n\n_The rest is in the report's files._\n"
    _append(file, text if text.endswith("\n") else text + "\n")


def _append(file: str, text: str) -> None:
    if file:
        with Path(file).open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
