"""The comment on a pull request: one for each job, with text that addresses no one, and none for forks."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate.action import comment
from merge_gate.report.wording.markdown import code, plain
from tests.support.e2e.github import BOT, GitHub, serving

SUMMARY = "## ❌ merge-gate FAIL: 1 of 2 adapters failed\n\nAsk @somebody about #12; <!-- x -->\n"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "summary.md").write_text(SUMMARY, encoding="utf-8")
    payload = {"pull_request": {"number": 5, "head": {"repo": {"full_name": "acme/adapters"}}}}
    (tmp_path / "event.json").write_text(json.dumps(payload), encoding="utf-8")
    return {
        "GITHUB_EVENT_NAME": "pull_request",
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "GITHUB_REPOSITORY": "acme/adapters",
        "GH_TOKEN": "ghs_x",
        "COMMENT_ID": "0a1b",
        "SUMMARY": str(tmp_path / "summary.md"),
        "REPORT_URL": "https://example.org/artifact",
    }


@pytest.fixture
def github(environ: dict[str, str], tmp_path: Path, variables) -> Iterator[GitHub]:
    """The API that the environment names."""
    github = GitHub()
    with serving(github, tmp_path) as certificate:
        variables["SSL_CERT_FILE"] = str(certificate)
        environ["GITHUB_API_URL"] = github.url
        yield github


def test_a_comment_is_written_once_and_then_edited(github, environ, tmp_path, capsys) -> None:
    github.comments += [
        {"id": 4, "user": None, "body": "<!-- merge-gate 0a1b -->"},
        {"id": 1, "user": {"login": "stranger"}, "body": "<!-- merge-gate 0a1b -->"},
        {"id": 2, "user": {"login": BOT}, "body": "<!-- merge-gate ffff --> of another job"},
    ]
    assert comment.main(environ) == 0
    (tmp_path / "summary.md").write_text("## ✅ merge-gate PASS: 2 adapters passed\n", encoding="utf-8")
    assert comment.main(environ) == 0
    assert "::warning" not in capsys.readouterr().out
    assert len(github.comments) == 4
    body = github.comments[3]["body"]
    assert body.startswith("<!-- merge-gate 0a1b -->\n## ✅ merge-gate PASS: 2 adapters passed")
    assert body.endswith("\n\n[The whole report](https://example.org/artifact)\n")
    assert github.comments[2]["body"].endswith("of another job")


def test_foreign_text_addresses_no_one_and_is_cut() -> None:
    body = comment.comment_body(SUMMARY + "名" * 70_000, "<!-- m -->", "https://example.org")
    assert "@somebody" not in body
    assert "#12" not in body
    assert "\n## ❌ merge-gate FAIL" in body
    assert 60_000 < len(body) <= 65_536
    assert body.endswith("(https://example.org)\n")


@pytest.mark.parametrize("name", ["#1", "GH-1", "gh-12", "acme/llama#3", "(GH-4)"])
def test_no_text_refers_to_an_issue(name: str) -> None:
    body = comment.comment_body(f"an adapter {name} failed", "<!-- m -->", "")
    assert re.search(r"(#|GH-)\d", body, re.IGNORECASE) is None
    assert body.replace("\u200b", "") == f"<!-- m -->\nan adapter {name} failed\n"


def test_without_a_report_it_has_the_headline(environ: dict[str, str]) -> None:
    given = {**environ, "SUMMARY": "", "HEADLINE": "merge-gate ERROR: no engine"}
    assert comment._summary(given) == "## `merge-gate ERROR: no engine`"


def test_entities_of_the_summary_stay_whole() -> None:
    """A name with an address: the summary's own escaping keeps it from being a link."""
    text = f"{code('a:b')} {plain('see http://evil.example')}"
    assert text in comment.comment_body(text, "<!-- m -->", "")


@pytest.mark.attempt("A03a", "the API redirects the comment to another host", "the token stays")
def test_the_token_follows_no_redirect(github, environ, tmp_path, variables, capsys) -> None:
    other = GitHub()
    (tmp_path / "other").mkdir()
    with serving(other, tmp_path / "other") as trusted:
        both = tmp_path / "both.pem"
        both.write_bytes(Path(os.environ["SSL_CERT_FILE"]).read_bytes() + trusted.read_bytes())
        variables["SSL_CERT_FILE"] = str(both)
        github.redirect = f"{other.url}/repos/acme/adapters/issues/5/comments"
        assert comment.main(environ) == 0
    assert "::warning" in capsys.readouterr().out
    assert github.tokens == ["Bearer ghs_x"]
    assert other.requests == []


def _is_slow(*_: object) -> Any:
    time.sleep(2)
    return []


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(answer, marks=pytest.mark.attempt(f"A03{letter}", what, "a warning"))
        for letter, what, answer in (
            ("b", "the API answers with an object instead of a list of comments", lambda *_: {"id": 1}),
            ("c", "the API answers with a list of numbers", lambda *_: [1, 2]),
            ("d", "the API answers with more than a page can have", lambda *_: b"[" + b" " * (33 << 20) + b"]"),
            ("e", "the API answers with deep JSON", lambda *_: b"[" * 4_000),
            ("f", "the API does not end its answer", _is_slow),
            ("g", "the API answers without JSON", lambda *_: b"<html>"),
        )
    ],
)
def test_an_odd_answer_is_a_warning(answer, github, environ, monkeypatch, capsys) -> None:
    github.answer = answer  # type: ignore[method-assign]
    monkeypatch.setattr(comment, "TIMEOUT_S", 1.0)
    assert comment.main(environ) == 0
    assert "::warning" in capsys.readouterr().out


@pytest.mark.parametrize(("event", "head"), [("pull_request", "stranger/adapters"), ("push", "acme/adapters")])
def test_no_other_run_comments(environ: dict[str, str], event: str, head: str, capsys) -> None:
    """The address is none that a comment is sent to, so a request would be a warning."""
    payload = {"pull_request": {"number": 5, "head": {"repo": {"full_name": head}}}}
    Path(environ["GITHUB_EVENT_PATH"]).write_text(json.dumps(payload), encoding="utf-8")
    assert comment.main({**environ, "GITHUB_EVENT_NAME": event, "GITHUB_API_URL": "http://127.0.0.1:1"}) == 0
    assert "::warning" not in capsys.readouterr().out


def test_a_comment_that_cannot_be_written_is_a_warning(github, environ, capsys, wording) -> None:
    github.answer = lambda *_: None  # type: ignore[method-assign]
    assert comment.main(environ) == 0
    wording(capsys.readouterr().out)
    assert comment.main({**environ, "GITHUB_API_URL": "http://127.0.0.1:1"}) == 0
    wording(capsys.readouterr().out)
