"""Reads the event that started the workflow, and writes what a GitHub runner reads: commands, outputs, the summary.

Foreign text (the gate's log and report.json) goes in. Annotations, outputs, and a log in which no foreign line is a
command come out.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from merge_gate.report.wording.untrusted import inert, one_line, safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_ANNOTATIONS = 9
"""A step shows 10 errors. The tenth gives the number of the others."""
_MESSAGE_LENGTH = 600
_NAME_LENGTH = 80
_LINE_LENGTH = 32_768
_TAIL_LINES = 12
_SUMMARY_LENGTH = 1_000_000
"""The runner drops a summary above 1 MiB."""
_TRUSTED = ("push", "schedule", "workflow_dispatch", "repository_dispatch", "merge_group", "release")
"""Events that only users with write access to the repository can cause."""
_MOST_EVENT_BYTES = 32 * 1024 * 1024


# --- the event -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """The event that started the workflow.

    Attributes:
        is_trusted: whether only users with write access decide what runs: a branch or a pull request of this
            repository.
        is_fork: whether it is a pull request from another repository. GitHub passes no secrets to `pull_request` then.
        pull_request: number of the pull request; 0 for any other event.
        is_private: whether the repository is known to be private.
    """

    is_trusted: bool
    is_fork: bool
    pull_request: int
    is_private: bool


def read_event(environ: Mapping[str, str]) -> Event:
    """Return the event of this run. A missing or unreadable payload is that of a public repository."""
    name, payload = environ.get("GITHUB_EVENT_NAME", ""), _payload(environ.get("GITHUB_EVENT_PATH", ""))
    pull_request = _mapping(payload, "pull_request")
    head = _mapping(_mapping(pull_request, "head"), "repo").get("full_name")
    is_own = isinstance(head, str) and head == environ.get("GITHUB_REPOSITORY")
    number = pull_request.get("number")
    is_pull_request = name == "pull_request"
    return Event(
        is_trusted=name in _TRUSTED or (is_pull_request and is_own),
        is_fork=is_pull_request and not is_own,
        pull_request=number if is_pull_request and isinstance(number, int) else 0,
        is_private=_mapping(payload, "repository").get("private") is True,
    )


def _payload(path: str) -> Mapping[str, Any]:
    try:
        with Path(path).open("rb") as file:
            payload = json.loads(file.read(_MOST_EVENT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


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
            if len(self._rest) > _LINE_LENGTH:
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


def annotate(report: Mapping[str, Any], file: str, *, warnings: bool = False) -> list[str]:
    """Return an error for each adapter that failed or could not be judged, failed adapters first.

    The same error of an adapter in several dtypes is reported once. A failure that the baseline accepts is a warning,
    after the others; so is the first warning of an adapter that passed, if `warnings` is set. `file` is the
    configuration relative to the workspace; empty if it is outside.
    """
    blocking = [
        adapter
        for adapter in report["adapters"]
        if adapter["verdict"] != "passed" or (warnings and _warning_of(adapter) is not None)
    ]
    blocking.sort(
        key=lambda adapter: (
            adapter["verdict"] == "passed",
            bool(adapter.get("accepted")),
            adapter["verdict"] != "failed",
        )
    )
    annotations = list(dict.fromkeys(_annotation(adapter, file) for adapter in blocking))
    shown = annotations[:MAX_ANNOTATIONS]
    more = len(annotations) - len(shown)
    if more:
        shown.append(command("error", f"and {more} more; see the job summary or report.json", title="merge-gate"))
    return shown


def _annotation(adapter: Mapping[str, Any], file: str) -> str:
    finding = _deciding(adapter)
    cause = adapter["cause"] or (finding["check"] if finding else "not judged")
    title = f"{one_line(str(adapter['name']), _NAME_LENGTH)} {adapter['verdict']}: {one_line(cause, _NAME_LENGTH)}"
    place = {"file": file, "line": str(adapter["line"]), "col": str(adapter["column"])} if file else {}
    is_warning = adapter["verdict"] == "passed" or (adapter["verdict"] == "failed" and adapter.get("accepted"))
    sentences = _sentences(finding) if finding else "No finding was recorded. See the log."
    return command("warning" if is_warning else "error", sentences, **place, title=title)


def _deciding(adapter: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The finding that an annotation shows: the cause, or the first error, or the first warning of a pass."""
    if adapter["verdict"] == "passed":
        return _warning_of(adapter)
    errors = [finding for finding in adapter["findings"] if finding["severity"] == "error"]
    deciding = [finding for finding in errors if finding["check"] == adapter["cause"]]
    return next(iter([*deciding, *errors]), None)


def _warning_of(adapter: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((finding for finding in adapter["findings"] if finding["severity"] == "warning"), None)


def _sentences(finding: Mapping[str, Any]) -> str:
    lines = [one_line(finding["message"], _MESSAGE_LENGTH)]
    tensor = finding["tensor"]
    lines += [f"Where: {one_line(tensor, _MESSAGE_LENGTH)}"] if tensor and tensor not in finding["message"] else []
    lines += [f"What to do: {one_line(finding['hint'], _MESSAGE_LENGTH)}"] if finding["hint"] else []
    # An error's check is one that the command explains. Some warnings belong to no check.
    more = finding.get("url") or (f"merge-gate explain {finding['check']}" if finding["severity"] == "error" else "")
    lines += [f"More: {one_line(more, _MESSAGE_LENGTH)}"] if more else []
    return "\n".join(lines)


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
    if len(data) > _SUMMARY_LENGTH:
        text = data[:_SUMMARY_LENGTH].decode("utf-8", "ignore").rpartition("\n")[0]
        text += "\n\n_The rest is in the report's files._\n"
    _append(file, text if text.endswith("\n") else text + "\n")


def _append(file: str, text: str) -> None:
    if file:
        with Path(file).open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
