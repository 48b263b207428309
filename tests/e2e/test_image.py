"""The image by itself: what it holds, and that it runs without the launcher, by hand and as a job's container."""

import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import yaml

from merge_gate.report.stored.report_files import FORMATS
from tests.support.e2e.act import ROOT
from tests.support.e2e.engines import pip_settings

pytestmark = pytest.mark.e2e

LIMIT_BYTES = 1_250_000_000
"""The CPU variant on the tests' base, which is 120 MB larger than python:slim."""


@pytest.fixture(scope="module")
def inspected(podman, image: str) -> dict:
    return json.loads(podman("image", "inspect", image))[0]


def test_what_the_image_says_of_itself(inspected: dict) -> None:
    config = inspected["Config"]
    labels = config["Labels"]
    for name in ("title", "description", "licenses", "version", "revision", "base.digest"):
        assert labels[f"org.opencontainers.image.{name}"], name
    assert labels.get("org.opencontainers.image.source", "") == "", "only the release workflow knows the address"
    assert config.get("User", "") == "", "a job's container must be able to run as root"
    assert config["Entrypoint"] == ["/opt/merge-gate/bin/python", "-I", "/opt/merge-gate/entrypoint.py"]
    environ = dict(pair.split("=", 1) for pair in config["Env"])
    assert environ["MERGE_GATE_IMAGE"] == "cpu"
    assert environ["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_REQUIRE_CUDA" not in environ
    assert inspected["Size"] < LIMIT_BYTES


def test_nothing_of_the_building_machine_is_in_it(inspected: dict, podman, image: str) -> None:
    history = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + json.dumps(inspected)
    for value in pip_settings().values():
        assert len(value) < 5 or value not in history
    script = (
        "command -v gcc cc g++ make git; cat /etc/pip.conf /run/secrets/pip-conf; "
        "ls /var/cache/pip /requirements /source"
    )
    found = podman("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", f"{script} 2>/dev/null; true")
    assert found.strip() == ""


def test_it_holds_what_the_gate_uses_and_gives_no_more_rights(podman, image: str) -> None:
    script = (
        "find / -xdev -type f -perm /6000; command -v pip pip3; ls -d /usr/local/lib/python3*/ensurepip; "
        "find /opt/merge-gate -name '*.h' -o -name '*.a' -o -type d -name tests | head -n 20"
    )
    found = podman("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", f"{script} 2>/dev/null; true")
    assert found.strip() == ""


@pytest.mark.parametrize(("flag", "mended"), [("F", True), (" ", False)])
def test_a_release_stops_at_a_package_that_debian_has_mended(
    podman_environment: dict[str, str], image: str, tmp_path: Path, flag: str, mended: bool
) -> None:
    """What Debian's security tracker would say is put beside it, in the tracker's own format."""
    told = f"VERSION 1\nCVE-2026-0001,,made up\n\nlibc6,0,BH?{flag},999:1,\n\n"
    (tmp_path / "trixie").write_bytes(zlib.compress(told.encode()))
    done = subprocess.run(
        [ROOT / ".ci" / "scan-debian.sh", image],
        env={**podman_environment, "ENGINE": "podman", "DEBSECAN_SOURCE": tmp_path.as_uri()},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == mended, done.stderr
    assert ("CVE-2026-0001 libc6" in done.stdout) is mended
    assert ("none with a vulnerability that is mended there" in done.stdout) is not mended


def test_the_packages_are_those_of_the_lock(podman, image: str) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    listed = podman("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", code)
    installed = {re.sub(r"[._]", "-", name.lower()): version for name, version in json.loads(listed).items()}
    lock = (ROOT / "requirements" / "image-cpu.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock, re.MULTILINE))
    assert installed.pop("merge-gate")
    assert installed == {re.sub(r"[._]", "-", name.lower()): version for name, version in locked.items()}


@pytest.mark.parametrize("user", ["0:0", "1001:1001", "4242:100"])
def test_it_runs_by_hand_as_anybody(podman, image: str, demo: Path, tmp_path: Path, user: str) -> None:
    """As the head of the Dockerfile has it; an uid without a passwd entry has a name and a home all the same."""
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    alone = ("--network=none", "--read-only", "--tmpfs=/tmp")
    words = ("run", "--rm", *alone, f"--user={user}", f"-v={demo}:/workspace:ro", f"-v={out}:/out", image)
    log = podman(*words, "run", "green.yml", "--output", "/out")
    report = json.loads((out / "report.json").read_text())
    assert report["result"] == "pass", log
    assert {path.stat().st_uid for path in out.iterdir()} == {int(user.split(":", maxsplit=1)[0])}
    name = podman(
        "run", "--rm", f"--user={user}", "--entrypoint=python", image, "-c", "import getpass; print(getpass.getuser())"
    )
    assert name.strip() == "merge-gate"


def recipes_without_github() -> dict[str, str]:
    """The document's commands for other runners: by hand, and what Buildkite's agent gives to a shell."""
    section = (ROOT / "docs" / "guides/github-actions.md").read_text(encoding="utf-8").partition("## Without GitHub")[2]
    by_hand, buildkite = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[:2]
    (step,) = yaml.safe_load(buildkite)["steps"]
    assert step["artifact_paths"] == "out/*"
    return {"by hand": by_hand, "Buildkite": step["command"]}


@pytest.mark.parametrize("runner", recipes_without_github())
def test_the_recipes_without_github_judge_and_keep_the_report(
    podman_environment: dict[str, str], image: str, demo: Path, tmp_path: Path, runner: str
) -> None:
    """As they stand there, with podman for docker and the tests' image for the released one."""
    checkout, bin_ = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(demo, checkout)
    bin_.mkdir()
    (bin_ / "docker").write_text('#!/bin/sh\nexec podman "$@"\n', encoding="utf-8")
    (bin_ / "docker").chmod(0o755)
    command, found = re.subn(r"ghcr\.io/OWNER/merge-gate:[0-9.]+-cpu", image, recipes_without_github()[runner])
    assert found == 1
    environ = {**podman_environment, "PATH": f"{bin_}:{podman_environment['PATH']}"}
    done = subprocess.run(["bash", "-e", "-c", command], cwd=checkout, env=environ, check=False, capture_output=True)
    assert done.returncode == 1, done.stdout.decode() + done.stderr.decode()
    assert {path.name for path in (checkout / "out").iterdir()} == set(FORMATS)
    assert json.loads((checkout / "out" / "report.json").read_text())["counts"]["failed"] == 5


TIMED = """
import resource, subprocess
before = 0.0
for _ in range(3):
    subprocess.run(["/opt/merge-gate/bin/python", "-I", "/opt/merge-gate/entrypoint.py", "--help"], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("took", used.ru_utime + used.ru_stime - before)
    before = used.ru_utime + used.ru_stime
"""


def test_it_says_what_it_can_do_at_once(podman, image: str) -> None:
    """Time of the processor, which other work on this machine does not lengthen."""
    said = podman("run", "--rm", "--network=none", "--read-only", "--entrypoint=python", image, "-c", TIMED)
    assert "usage: merge-gate" in said
    assert min(float(took) for took in re.findall(r"^took (\S+)", said, re.MULTILINE)) < 0.25
    done = subprocess.run(["podman", "run", "--rm", "--network=none", image, "judge"], capture_output=True, check=False)
    assert done.returncode == 2


def test_a_job_in_the_image_gates_natively(play, own_repository: Path, image: str, engine: str) -> None:
    environ = {"DOCKER_HOST": engine}
    run = play(own_repository, "job-container.yml", consumer_of=None, platform=image, environ=environ)
    assert run.code == 1, run.text
    assert "runtime native" in run.text
    assert run.outputs("gate")["result"] == "fail"
    assert len(json.loads(run.outputs("gate")["failed"])) == 5
    assert '"result": "fail"' in run.text
