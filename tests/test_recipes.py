"""The recipes, as far as they run without a browser, a runner or a service: what they execute is executed here.

tests/e2e/test_recipes.py runs the workflows among them, tests/e2e/test_linters.py holds them against the schemas.
"""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from merge_gate.report.stored.report_files import FORMATS
from tests.support.command import environment, shell, wait_until
from tests.support.faults import cut
from tests.support.hub import LoopbackHub
from tests.support.models import Shelf

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
GITLAB = yaml.safe_load((RECIPES / "gitlab.yml").read_text(encoding="utf-8"))["merge-gate"]
JENKINS = (RECIPES / "Jenkinsfile").read_text(encoding="utf-8")
SECRET, TOKEN, SHA = "the-hub-knows-it", "github_pat_x", "575db8b7a51b6f85eb06eee540738584589f131c"


@pytest.fixture
def checkout(shelf: Shelf, tmp_path: Path) -> Path:
    """A repository with one adapter, whose file is cut off."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "support")
    cut(0.5)(tmp_path / "support")
    (tmp_path / "merge-gate.yml").write_text(
        f"version: 1\nbase: {{model: {json.dumps(str(shelf.base('llama')))}}}\nadapters: [./support]\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("command", "junit", "kept"),
    [
        ("\n".join(GITLAB["script"]), GITLAB["artifacts"]["reports"]["junit"], GITLAB["artifacts"]["paths"][0]),
        (
            re.findall(r"^\s+sh '(.+)'$", JENKINS, re.MULTILINE)[0],
            re.findall(r"junit testResults: '(.+?)'", JENKINS)[0],
            re.findall(r"artifacts: '(.+?)\*'", JENKINS)[0],
        ),
    ],
    ids=["GitLab", "Jenkins"],
)
def test_the_job_fails_and_its_report_is_where_it_should_be(command, junit, kept, checkout) -> None:
    done = shell(command, cwd=checkout, **GITLAB["variables"])
    assert done.code == 1, done.said
    (failure,) = ET.fromstring((checkout / junit).read_bytes()).iter("failure")
    assert failure.get("type") == "file-corrupt"
    assert {path.name for path in (checkout / kept).iterdir()} == set(FORMATS)


def test_gitlab_keeps_the_report_of_a_job_that_failed() -> None:
    assert GITLAB["artifacts"]["when"] == "always"
    assert GITLAB["image"]["entrypoint"] == [""], (
        "the image's own entrypoint would take the runner's shell for a command"
    )


@pytest.fixture
def dispatched() -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """A GitHub that takes events; what it took is (path, token, body)."""
    taken: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            taken.append((self.path, self.headers["Authorization"], body))
            self.send_response(204 if "/acme/" in self.path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", taken
        server.shutdown()


@contextlib.contextmanager
def receiver(api: str, **changes: str) -> Iterator[str]:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {
        "PORT": port,
        "WEBHOOK_SECRET": SECRET,
        "HUB_REPOS": "acme/support-lora,acme/billing-lora",
        "GITHUB_REPOSITORY": "acme/releases",
        "GITHUB_TOKEN": TOKEN,
        "GITHUB_API_URL": api,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", RECIPES / "hub_webhook.py"],
        env=environment() | settings | changes,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: listens(int(port)), process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.communicate()


def listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def post(url: str, payload: Any, secret: str = SECRET) -> tuple[int, str]:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    request = urllib.request.Request(url, data=data, headers={"X-Webhook-Secret": secret})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def push(name: str = "acme/support-lora", scope: str = "repo.content", **ref: Any) -> dict[str, Any]:
    """What the Hub sends when somebody pushes, by its documentation."""
    return {
        "event": {"action": "update", "scope": scope},
        "repo": {"type": "model", "name": name, "private": False, "headSha": SHA},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": None, "newSha": SHA} | ref],
        "webhook": {"id": "6390e855e30d9209411de93b", "version": 3},
    }


def test_a_push_becomes_an_event_with_the_name_and_the_commit(dispatched: Any) -> None:
    api, taken = dispatched
    with receiver(api) as url:
        status, said = post(url, push())
    assert (status, said) == (202, f"gating acme/support-lora at {SHA}\n")
    assert taken == [
        (
            "/repos/acme/releases/dispatches",
            f"Bearer {TOKEN}",
            {"event_type": "hub-push", "client_payload": {"repo": "acme/support-lora", "revision": SHA}},
        )
    ]


def test_nothing_else_goes_on(dispatched: Any) -> None:
    api, taken = dispatched
    others = [
        push(name="stranger/lora"),
        push(scope="discussion"),
        push(ref="refs/pr/3"),
        push(newSha=None),
        push(newSha="$(id)"),
        {"event": 1},
        [],
        "x",
    ]
    with receiver(api) as url:
        assert [post(url, payload)[0] for payload in others] == [200] * len(others)
        assert post(url, push(), secret="wrong")[0] == 401
        assert post(url, push(), secret="")[0] == 401
        assert post(url, b"no json")[0] == 400
    assert taken == []


def test_the_hub_is_told_when_github_did_not_take_it(dispatched: Any) -> None:
    api, _ = dispatched
    with receiver(api, GITHUB_REPOSITORY="other/releases") as url:
        assert post(url, push())[0] == 502


def test_what_is_not_set_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-I", RECIPES / "hub_webhook.py"],
        env=environment(WEBHOOK_SECRET="x", GITHUB_REPOSITORY="a/b"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "not set: HUB_REPOS, GITHUB_TOKEN\n")


HUB_TOKEN = "hf_may_write"
OLD = {".gitattributes": b"*", "model-00001-of-00002.safetensors": b"old", "config.json": b"old", "old/x.py": b""}


def upload(hub: LoopbackHub, model: Path, parent: str, place: Path, token: str = HUB_TOKEN) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", RECIPES / "hub_upload.py", str(model), "acme/support", parent],
        env=environment(HF_ENDPOINT=hub.url, HF_HOME=str(place / "hf"), HF_TOKEN=token, HF_HUB_OFFLINE="0"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert HUB_TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout.strip() or done.stderr


def test_a_published_model_replaces_the_repository_in_one_commit(tmp_path: Path) -> None:
    from tests.support import published  # noqa: PLC0415 - of a feature

    model = tmp_path / "support"
    published.publish(model)
    files = {name: (model / name).read_bytes() for name in (*published.FILES, "merge-gate.json", "README.md")}
    with LoopbackHub() as hub:
        parent = hub.add_repo("acme/support", OLD, token=HUB_TOKEN)
        repo = hub.repos["acme/support"]
        # 1. Nothing is sent with a file that is not as listed, with another token, or on top of another commit.
        (model / "more.py").write_bytes(b"")
        code, said = upload(hub, model, parent, tmp_path)
        assert (code, "more.py" in said) == (1, True)
        (model / "more.py").unlink()
        code, said = upload(hub, model, parent, tmp_path, token="hf_other")
        assert (code, "401" in said) == (1, True)
        later = hub.add_repo("acme/support", OLD | {"x": b""}, token=HUB_TOKEN)
        code, said = upload(hub, model, parent, tmp_path)
        assert (code, "412" in said) == (1, True)
        assert repo.refs["main"] == later
        # 2. One commit, without a trace of the old model.
        code, commit = upload(hub, model, later, tmp_path)
        assert (code, commit) == (0, repo.refs["main"]), commit
        assert len(repo.commits) == 3
        assert repo.commits[commit] == files | {".gitattributes": b"*"}
        # 3. A file that the Hub left out is an error.
        hub.ignored = {"config.json"}
        (model / "config.json").write_bytes(b"{ }")
        published.publish(model, dtype="bfloat16")
        (model / "config.json").write_bytes(b"{}")
        hub.add_repo("acme/support", {".gitattributes": b"*"}, token=HUB_TOKEN)
        code, said = upload(hub, model, repo.refs["main"], tmp_path)
        assert code == 1
        assert "config.json" in said
