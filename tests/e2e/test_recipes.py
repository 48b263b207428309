"""The recipes, as far as they run without the services they are for: workflows by act, gh and the Hub on loopback."""

import re
import shutil
from pathlib import Path

import pytest

from merge_gate.demo import EXPECTED
from tests.support.e2e.act import ROOT, ActRun, make_repository, run_act
from tests.support.e2e.github import BOT, GitHub, archive, serving
from tests.support.hub import LoopbackHub, files_of

pytestmark = pytest.mark.e2e

RECIPES = ROOT / "recipes"
SHA = "1f" * 20
TOKEN = "ghs_thisTokenMustStayHidden0123456789"
SUMMARY = "## ❌ merge-gate: 1 of 2 adapters failed\n\nAsk @somebody; see `a@b`.\n"


def ended(sha: str = SHA, event: str = "pull_request") -> dict:
    """What GitHub tells of a workflow that has ended, on a fork: `pull_requests` is empty then."""
    run = {
        "id": 77, "event": event, "head_sha": sha, "head_branch": "fix/it", "pull_requests": [],
        "html_url": "https://example.org/runs/77",
        "head_repository": {"full_name": "stranger/adapters", "owner": {"login": "stranger"}},
    }  # fmt: skip
    return {"action": "completed", "workflow_run": run}


@pytest.fixture
def comment(tool, tmp_path: Path, installed: Path):
    assert shutil.which("gh"), "no gh: run .ci/install-e2e.sh first"
    (tmp_path / "repository").mkdir()
    repository = make_repository(tmp_path / "repository", "comment.yml", recipe("comment.yml"))

    def comment(github: GitHub, payload: dict) -> ActRun:
        scratch = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        with serving(github, scratch) as certificate:
            return run_act(
                tool("act"), repository, "comment.yml", scratch,
                python=installed, event="workflow_run", payload=payload, secrets={"GITHUB_TOKEN": TOKEN},
                environ={"GH_HOST": github.url.removeprefix("https://"), "GH_ENTERPRISE_TOKEN": TOKEN,
                         "SSL_CERT_FILE": str(certificate)},
            )  # fmt: skip

    return comment


def of_the_fork(sha: str = SHA) -> list[dict]:
    return [{"number": 5, "head": {"label": "stranger:fix/it", "sha": sha}}]


def test_a_pull_request_from_a_fork_gets_one_edited_comment(comment) -> None:
    github = GitHub(pulls=of_the_fork(), artifacts={"merge-gate-report-gate--x1": archive(summary__md=SUMMARY)})
    github.comments.append({"id": 1, "user": {"login": "stranger"}, "body": "<!-- merge-gate --> not the bot's"})
    run = comment(github, ended())
    assert run.code == 0, run.text
    assert [one["user"]["login"] for one in github.comments] == ["stranger", BOT]
    body = github.comments[1]["body"]
    assert body.startswith("<!-- merge-gate -->\n## ❌ merge-gate: 1 of 2 adapters failed")
    assert "@somebody" not in body
    assert "[Run and report](https://example.org/runs/77)" in body
    github.artifacts = {"merge-gate-report-gate--x2": archive(summary__md="## ✅ merge-gate: 2 adapters passed\n")}
    assert comment(github, ended()).code == 0
    assert len(github.comments) == 2
    assert "## ✅ merge-gate: 2 adapters passed" in github.comments[1]["body"]
    assert TOKEN not in run.raw


def test_what_a_stranger_packs_into_the_artifact_reads_nothing(comment) -> None:
    evil = archive(summary__md="->/proc/self/environ", other__md="->/etc/passwd")
    github = GitHub(pulls=of_the_fork(), artifacts={"merge-gate-report-gate--x1": evil})
    run = comment(github, ended())
    assert run.code == 0, run.text
    (made,) = github.comments
    assert TOKEN not in made["body"]
    assert "root:" not in made["body"]


def test_a_long_report_is_cut_to_what_a_comment_holds(comment) -> None:
    github = GitHub(pulls=of_the_fork(), artifacts={"merge-gate-report-gate--x1": archive(summary__md="名" * 60_000)})
    assert comment(github, ended()).code == 0
    assert 20_000 < len(github.comments[0]["body"]) < 65_536


@pytest.mark.parametrize("payload", [ended(event="push"), ended(sha="2e" * 20)])
def test_no_other_run_comments(comment, payload: dict) -> None:
    github = GitHub(pulls=of_the_fork(), artifacts={"merge-gate-report-gate--x1": archive(summary__md=SUMMARY)})
    assert comment(github, payload).code == 0
    assert github.comments == []


def test_a_run_without_a_report_says_so(comment) -> None:
    github = GitHub(pulls=of_the_fork())
    assert comment(github, ended()).code == 0
    assert "[Run and report]" in github.comments[0]["body"]


def recipe(name: str) -> str:
    return (RECIPES / name).read_text(encoding="utf-8").replace("OWNER/", "acme/")


# --- a fleet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(play, tmp_path: Path, demo: Path):
    """The matrix over the demo's adapters; its last job runs on this machine instead of in the image."""

    def fleet(config: str, *changes: tuple[str, str]) -> ActRun:
        (tmp_path / "repository").mkdir()
        shutil.copytree(demo, tmp_path / "repository", dirs_exist_ok=True)
        shutil.copy(demo / config, tmp_path / "repository" / "merge-gate.yml")
        text = re.sub(r"^    container: .*\n", "", recipe("fleet-matrix.yml"), flags=re.MULTILINE)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return play(tmp_path / "repository", "fleet-matrix.yml", text=text, event="pull_request")

    return fleet


def test_a_broken_adapter_in_one_shard_is_the_verdict_of_all(fleet) -> None:
    run = fleet("merge-gate.yml")
    assert run.code == 1, run.text
    names = {f"merge-gate-shard-{number}" for number in (1, 2, 3, 4)}
    assert set(run.artifacts) == {*names, "merge-gate-report"}, run.text
    report = run.report("merge-gate-report")
    assert (report["result"], report["complete"], report["problems"]) == ("fail", True, [])
    assert {(one["name"], one["base"]["dtype"]): (one["verdict"], one["cause"]) for one in report["adapters"]} == {
        key: (str(verdict), cause) for key, (verdict, cause) in EXPECTED.items()
    }
    assert {run.report(name)["result"] for name in names} >= {"fail"}


def test_a_sound_fleet_is_green_with_more_shards_than_adapters(fleet) -> None:
    run = fleet("green.yml")
    assert run.code == 0, run.text
    assert [len(run.report(f"merge-gate-shard-{number}")["adapters"]) for number in (1, 2, 3, 4)] == [1, 0, 0, 0]
    report = run.report("merge-gate-report")
    assert (report["result"], len(report["adapters"])) == ("pass", 1)


def test_an_artifact_that_is_missing_leaves_no_verdict(fleet) -> None:
    """Also of a shard that had nothing to judge."""
    run = fleet("green.yml", ("fail-on: never", "upload-report: ${{ matrix.shard != 3 }}\n          fail-on: never"))
    assert run.code == 1, run.text
    report = run.report("merge-gate-report")
    assert (report["result"], report["problems"]) == ("error", ["shard 3 of 4 is missing"])


# --- a push to the Hub -----------------------------------------------------------------------------------------------


def test_a_push_to_the_hub_is_gated_at_its_commit(play, tmp_path: Path, demo: Path) -> None:
    (tmp_path / "repository").mkdir()
    with LoopbackHub() as hub:
        hub.add_repo("acme/base", files_of(demo / "base"))
        commit = hub.add_repo("acme/nan", files_of(demo / "adapters" / "nan", base_model_name_or_path="acme/base"))
        run = play(
            tmp_path / "repository", "hub-push.yml", text=recipe("hub-push.yml"), event="repository_dispatch",
            payload={"action": "hub-push", "client_payload": {"repo": "acme/nan", "revision": commit}},
            environ={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
        )  # fmt: skip
    assert run.code == 1, run.text
    (adapter,) = run.report()["adapters"]
    assert (adapter["name"], adapter["revision"], adapter["cause"]) == ("nan", commit, "adapter-nonfinite")
