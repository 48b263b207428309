"""Runs a workflow with act on this machine, offline, and returns what it did as values."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "tests" / "e2e"
UPLOAD = "actions/upload-artifact@043fb46d1a93c77aae656e7c1c64a875d1fc6a0a"
DOWNLOAD = "actions/download-artifact@3e5f45b2cfb9172054b4087a40e8e0b5a5461e7c"
CACHE = "actions/cache@27d5ce7f107fe9357f9df03efb73ab90386fccae"
CODEQL = "github/codeql-action@ff2f1c621b7f889edc0d3c761ac2e6a3f8cdb0dd"
STAND_INS = {UPLOAD: "upload-artifact", DOWNLOAD: "download-artifact", CACHE: "cache", CODEQL: "codeql-action"}
TAG = f"e2e-{os.getpid()}"
"""Tells the images and jobs of this run of the tests from those of another one on the same machine."""
ACTION_FILES = ("action.yml", "entrypoint.py", "vendor", "src")


def copy_action(target: Path) -> None:
    """The action as a checkout has it: the files that its steps use, and nothing that a build left behind."""
    for name in ACTION_FILES:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, copy)


def make_repository(directory: Path, workflow: str, text: str = "") -> Path:
    """A git repository with one workflow: of tests/e2e/workflows, or another text.

    act names a job's container and volumes after workflow and job, so the workflow's name has to be this run's own.
    """
    target = directory / ".github" / "workflows" / workflow
    target.parent.mkdir(parents=True)
    text = (text or (HERE / "workflows" / workflow).read_text(encoding="utf-8")).replace(":e2e", f":{TAG}")
    target.write_text(re.sub(r"^name: .*", rf"\g<0> {TAG}", text, count=1, flags=re.MULTILINE), encoding="utf-8")
    git = ["git", "-C", str(directory), "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    subprocess.run([*git, "add", "-A", "-f"], check=True)
    subprocess.run([*git, "commit", "-qm", "test"], check=True)
    return directory


@dataclass
class ActRun:
    code: int
    raw: str
    records: list[dict]
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def commands(self, name: str) -> list[dict]:
        return [record for record in self.records if record.get("command") == name]

    def outputs(self, step: str) -> dict[str, str]:
        """Outputs of a step, by the id that the workflow gives it."""
        records = [record for record in self.commands("set-output") if record.get("stepID") == [step]]
        return {record["name"]: record["arg"] for record in records}

    @property
    def text(self) -> str:
        return "".join(str(record.get("msg", "")) for record in self.records)

    def lines(self) -> list[str]:
        """What the steps printed, as they printed it."""
        return [line for record in self.records if record.get("raw_output") for line in record["msg"].splitlines()]

    def report(self, name: str | None = None) -> dict:
        name = name or next(iter(self.artifacts))
        return json.loads(self.artifacts[name]["report.json"])


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(path: list[Path], home: Path, **more: str) -> dict[str, str]:
    """A scrubbed environment: nothing of this machine's but what pip and TLS need."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_CA"))}
    search = os.pathsep.join(
        [*map(str, path), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    )
    node = Path(shutil.which("node") or "/usr/bin/node").parent
    return {
        **kept,
        "PATH": f"{search}{os.pathsep}{node}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run_act(
    act: Path,
    repository: Path,
    workflow: str,
    scratch: Path,
    *,
    python: Path,
    consumer_of: Path | None = None,
    secrets: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
    platform: str = "-self-hosted",
    event: str = "push",
    payload: dict | None = None,
    before: tuple[str, ...] = (),
    timeout_s: float = 600,
) -> ActRun:
    """Run one workflow. `python` is the directory where the runner's python3 lies. Secrets travel in a file.

    `platform` is this machine itself, or the image that a hosted runner's jobs run in. `payload` is what GitHub tells
    of the event. `before` is a command that starts act.
    """
    home, store = scratch / "home", scratch / "artifacts"
    home.mkdir(parents=True, exist_ok=True)
    secret_file = home / "secrets"
    secret_file.write_text("".join(f"{name}={value}\n" for name, value in (secrets or {}).items()), encoding="utf-8")
    words = [
        *before, act, event, "-W", f".github/workflows/{workflow}", "--json", "--secret-file", secret_file,
        "-P", f"ubuntu-24.04={platform}", "-P", "self-hosted=-self-hosted", "--pull=false", "--rm",
        "--action-offline-mode", "--no-cache-server", "--action-cache-path", scratch / "actions",
        "--artifact-server-path", store, "--artifact-server-addr", "127.0.0.1",
        "--artifact-server-port", free_port(),
        *(word for pin, name in STAND_INS.items() for word in ("--local-repository", f"{pin}={HERE / name}-standin")),
        *(f"--env={name}={value}" for name, value in (environ or {}).items() if name.startswith("GITHUB_")),
    ]  # fmt: skip
    if payload is not None:
        (home / "event.json").write_text(json.dumps(payload), encoding="utf-8")
        words += ["--eventpath", home / "event.json"]
    if consumer_of:
        words += ["--local-repository", f"acme/merge-gate@v1={consumer_of}"]
    log = scratch / "act.jsonl"
    with log.open("w+", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=repository,
            env=environment([python], home, **{"CACHE_STANDIN": str(scratch / "caches"), **(environ or {})}),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
    raw = log.read_text(encoding="utf-8")
    return ActRun(code, raw, _records(raw), _artifacts(store), _digests(store))


def _records(raw: str) -> list[dict]:
    records = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def _artifacts(store: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for archive in sorted(store.glob("*/*/*.zip")):
        with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as opened:
            assert opened.testzip() is None
            found[archive.stem] = {name: opened.read(name) for name in opened.namelist()}
    return found


def _digests(store: Path) -> dict[str, str]:
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.glob("*/*/*.zip")}
