"""What a run may do for the default branch, a branch, and a fork. actions/cache and code scanning are stand-ins."""

from pathlib import Path

import pytest

from tests.support.e2e.act import ActRun, make_repository, run_act
from tests.support.e2e.github import GitHub, serving
from tests.support.hub import LoopbackHub, files_of

pytestmark = pytest.mark.e2e

TOKEN, JOBS_TOKEN = "hf_theTokenOfTheGatedBase0123", "ghs_thisTokenMustStayHidden0123456789"
OWN = "nektos/act"
"""The repository that act makes up."""


def payload(head: str | None) -> dict:
    request = {"number": 5, "head": {"ref": "fix", "repo": {"full_name": head}}, "base": {"ref": "main"}}
    return {"repository": {"private": True}, **({"number": 5, "pull_request": request} if head else {})}


def test_a_fork_reads_caches_and_writes_nothing(
    tool, repository: Path, tmp_path: Path, installed: Path, released: Path, demo: Path
) -> None:
    """The default branch saves; a branch restores, and comments; a fork has no token, and can only say so."""
    make_repository(repository, "pull-request.yml")
    store, github = tmp_path / "caches", GitHub()
    with LoopbackHub() as hub, serving(github, tmp_path) as certificate:
        hub.add_repo("acme/base", files_of(demo / "base"), gated=True, token=TOKEN)

        def play(name: str, head: str | None, token: str) -> ActRun:
            return run_act(
                tool("act"), repository, "pull-request.yml", tmp_path / name, python=installed, consumer_of=released,
                event="pull_request" if head else "push", payload=payload(head),
                secrets={"HF_TOKEN": token, "GITHUB_TOKEN": JOBS_TOKEN},
                environ={
                    "HF_ENDPOINT": hub.url, "CACHE_STANDIN": str(store), "GITHUB_API_URL": github.url,
                    "SSL_CERT_FILE": str(certificate), "DOCKER_HOST": "unix:///nowhere",
                },
            )  # fmt: skip

        def saved() -> list[str]:
            return sorted(path.name.split("-")[2] for path in store.rglob("*.tar"))

        first = play("first", None, TOKEN)
        assert (first.code, first.outputs("seen")["RESULT"]) == (0, "pass"), first.text
        assert saved() == ["hub", "verdicts"]
        assert first.outputs("seen")["HEADLINE"] == "merge-gate PASS: the only adapter passed"
        assert "sarif merge-gate-adapters: " in first.text
        assert github.comments == []

        downloads = len([path for path in hub.paths() if path.startswith("/cdn/")])
        branch = play("branch", OWN, TOKEN)
        assert (branch.code, branch.outputs("seen")["PASSED"]) == (0, '["good"]'), branch.text
        assert branch.report()["adapters"][0]["cached"] is True
        assert len([path for path in hub.paths() if path.startswith("/cdn/")]) == downloads, "the base was restored"
        assert saved().count("hub") == 1, "its files are the same"
        kept = saved()
        (comment,) = github.comments
        assert "merge-gate PASS" in comment["body"]

        fork = play("fork", "stranger/act", "")
        assert (fork.code, fork.outputs("seen")["RESULT"]) == (0, "error"), fork.text
        (adapter,) = fork.report()["adapters"]
        assert (adapter["verdict"], adapter["cause"]) == ("error", "not-judged")
        assert "gated" in adapter["findings"][0]["message"]
        assert "GitHub passes no secrets to it" in fork.text
        assert saved() == kept
        assert len(github.comments) == 1
        assert "sarif merge-gate-adapters" not in fork.text
    assert TOKEN not in first.raw + branch.raw
    assert JOBS_TOKEN not in first.raw + branch.raw
