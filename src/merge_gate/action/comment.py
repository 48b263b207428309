"""Writes the run's summary as a comment on its pull request, and edits its own comment at the next run.

The summary, the event, and the job's token go in. The comment is the only result: an error is a warning in the log,
because a comment informs, and the last step decides the job. Only pull requests of this repository get one.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.regular_file import read_regular_file
from merge_gate.action import workflow
from merge_gate.action.docker import collect
from merge_gate.limits.timeout import within

if TYPE_CHECKING:
    from collections.abc import Mapping

_BOT = "github-actions[bot]"
_LIMIT = 65_000
"""GitHub takes 65,536 characters."""
_PAGES = 30
_PAGE_ENTRIES = 100
TIMEOUT_S = 60.0
_MOST_BYTES = 32 << 20
"""A page of comments of the most characters, as JSON."""
_INVISIBLE_SPACE = "\N{ZERO WIDTH SPACE}"


def main(environ: Mapping[str, str]) -> int:
    """Comment on the pull request of this run, if it is one of this repository. Always return 0."""
    event = workflow.read_event(environ)
    if not event.pull_request or not event.is_trusted:
        _say("no comment: this run is not a pull request from a branch of this repository")
        return 0
    try:
        _put_comment(environ, event.pull_request)
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; the job needs the permission `pull-requests: write`" if error.code in {403, 404} else ""
        _warn(f"the comment was not written: GitHub answered {error.code} {error.reason}{hint}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        _warn(f"the comment was not written: {error}")
    return 0


def comment_body(summary: str, marker: str, link: str) -> str:
    """The text of the comment. Foreign text in the summary mentions no user and refers to no issue."""
    text = re.sub(r"@|(?<!&)#(?=\d)|\bGH-(?=\d)", rf"\g<0>{_INVISIBLE_SPACE}", summary, flags=re.IGNORECASE)
    end = f"\n\n[The whole report]({link})\n" if link else "\n"
    return f"{marker}\n{text}"[: _LIMIT - len(end)].rstrip() + end


def _put_comment(environ: Mapping[str, str], number: int) -> None:
    marker = f"<!-- merge-gate {re.sub('[^0-9a-f]', '', environ.get('COMMENT_ID', ''))} -->"
    body = {"body": comment_body(_summary(environ), marker, environ.get("REPORT_URL", ""))}
    issues = f"repos/{environ['GITHUB_REPOSITORY']}/issues"
    own = _own_comment(environ, f"{issues}/{number}/comments", marker)
    if own is None:
        _request(environ, "POST", f"{issues}/{number}/comments", body)
        _say("wrote a comment")
    else:
        _request(environ, "PATCH", f"{issues}/comments/{own}", body)
        _say("edited its comment")


def _summary(environ: Mapping[str, str]) -> str:
    path = environ.get("SUMMARY", "")
    if path:
        return read_regular_file(Path(path), collect.MAX_BYTES["summary.md"]).decode("utf-8", "replace")
    return f"## `{environ.get('HEADLINE') or 'merge-gate ERROR: there is no verdict'}`"  # code: it may hold an address


def _own_comment(environ: Mapping[str, str], place: str, marker: str) -> int | None:
    """The id of the comment that an earlier run of the same job wrote; None if there is none."""
    for page in range(1, _PAGES + 1):
        listed = _request(environ, "GET", f"{place}?per_page={_PAGE_ENTRIES}&page={page}")
        if not isinstance(listed, list) or not all(isinstance(comment, dict) for comment in listed):
            raise ValueError("GitHub's answer is not a list of comments")
        for comment in listed:
            author = comment.get("user")  # null if the account is gone
            is_bot = isinstance(author, dict) and author.get("login") == _BOT
            if is_bot and str(comment.get("body")).startswith(marker) and isinstance(comment.get("id"), int):
                return int(comment["id"])
        if len(listed) < _PAGE_ENTRIES:
            break
    return None


def _request(environ: Mapping[str, str], method: str, place: str, body: object = None) -> Any:
    server = environ.get("GITHUB_API_URL") or "https://api.github.com"
    if not server.startswith("https://"):
        raise ValueError(f"{server} is not an https address")
    request = urllib.request.Request(  # noqa: S310 - https only
        f"{server}/{place}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {environ.get('GH_TOKEN', '')}",
            "Content-Type": "application/json",
            "User-Agent": "merge-gate",
            "X-GitHub-Api-Version": "2022-11-28",
        },
    )
    return within(TIMEOUT_S, lambda: _answer(request))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes no redirect, which could name another host: the request has the token."""

    def redirect_request(self, *_: object) -> None:
        return None


def _answer(request: urllib.request.Request) -> Any:
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S) as answer:
        content = answer.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"GitHub's answer has more than {_MOST_BYTES >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("GitHub's answer is nested too deeply") from None


def _warn(sentence: str) -> None:
    print(workflow.command("warning", sentence, title="merge-gate"), flush=True)  # noqa: T201


def _say(sentence: str) -> None:
    print(f"merge-gate: {sentence}", flush=True)  # noqa: T201
