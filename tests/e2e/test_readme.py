"""The README's commands, word for word, in a fresh Debian with Python 3.11; and Python 3.13 without torch.

Only the address of torch's CPU index is left out: this machine's pip may reach another index only.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e.act import ROOT
from tests.support.e2e.engines import BASE_IMAGE, pip_settings
from tests.support.generated import blocks

pytestmark = pytest.mark.e2e

README = (ROOT / "README.md").read_text(encoding="utf-8")
TORCH_INDEX = " --index-url https://download.pytorch.org/whl/cpu"
WITHIN_CPU_S = 200
"""Twice what it takes on a busy machine, nearly all of it pip's. The time by the clock is only printed."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, as git lists them."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    directory = tmp_path_factory.mktemp("readme") / "clone"
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    return directory


# --- Python 3.11, in a fresh Debian ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def followed(
    podman_environment: dict[str, str], clone: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A user with an adapter and a base in the clone types what the README says."""
    install, own, _ = blocks(README, "console")
    assert install.count(TORCH_INDEX) == 1
    shutil.copytree(demo / "adapters" / "good", clone / "my-adapter")
    shutil.copytree(demo / "base", clone / "my-base")
    commands = f"{install.replace(TORCH_INDEX, '')}{own}pip list --format json > packages.json\ntimes > times\n"
    settings = pip_settings("constraint")
    config = tmp_path_factory.mktemp("pip") / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="utf-8")
    places = (*settings.get("find-links", "").split(), *settings.get("constraint", "").split(), "/etc/ssl/certs")
    began = time.monotonic()
    done = subprocess.run(
        [
            "podman", "run", "--rm", "--network=host", "--pull=never",
            *(f"--volume={place}:{place}:ro" for place in sorted(set(places)) if Path(place).exists()),
            f"--volume={config}:/etc/pip.conf:ro", f"--volume={clone}:/clone", "--workdir=/clone",
            BASE_IMAGE, "bash", "-exc", commands,
        ],
        env=podman_environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    return done, time.monotonic() - began


def test_the_readme_s_commands_work_in_a_fresh_debian(
    followed: tuple[subprocess.CompletedProcess[str], float], clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, seconds = followed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    installed = {one["name"]: one["version"] for one in json.loads((clone / "packages.json").read_text())}
    size = sum(path.stat().st_size for path in (clone / ".merge-gate").rglob("*") if path.is_file())
    times = re.findall(r"(\d+)m([\d.]+)s", (clone / "times").read_text(encoding="utf-8"))
    cpu_seconds = sum(60 * int(minutes) + float(rest) for minutes, rest in times)
    with capsys.disabled():
        sys.stdout.write(
            f"\nREADME: {seconds:.0f} s, {cpu_seconds:.0f} CPU s, {len(installed)} packages, {size / 1e9:.2f} GB\n"
        )
    assert cpu_seconds < WITHIN_CPU_S
    assert {"torch", "peft", "transformers", "merge-gate"} <= set(installed)
    assert (clone / "merge-gate-demo" / "merge-gate-report" / "report.html").is_file()
    report = json.loads((clone / "merge-gate-report" / "report.json").read_text(encoding="utf-8"))
    assert {(one["base"]["dtype"], one["verdict"]) for one in report["adapters"]} == {
        ("bfloat16", "passed"),
        ("float16", "passed"),
    }
    assert report["environment"]["python"].startswith("3.11.")


# --- Python 3.13, without torch --------------------------------------------------------------------------------------

LIGHT = ("huggingface_hub", "PyYAML", "pydantic", "rich", "Jinja2")


@pytest.fixture(scope="module")
def light(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of Python 3.13 with merge-gate and the packages of `check`, `report`, and `explain`."""
    candidates = ("/usr/bin/python3.13", shutil.which("python3.13"))
    python = next((name for name in candidates if name and Path(name).exists()), None)
    assert python, "no Python 3.13: install Debian's python3.13"
    directory = tmp_path_factory.mktemp("light") / "environment"
    subprocess.run([python, "-m", "venv", "--without-pip", str(directory)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, *LIGHT], check=True)
    subprocess.run([*pip, "--no-deps", str(clone)], check=True)
    return directory


@pytest.fixture
def command(light: Path, demo: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(light / "bin" / "merge-gate"), *words], cwd=demo, check=False, capture_output=True, text=True
        )

    return run


def test_the_package_describes_itself(light: Path) -> None:
    (site,) = light.glob("lib/python3.13/site-packages")
    installed: dict[str, Distribution] = {one.metadata["Name"]: one for one in distributions(path=[str(site)])}
    assert "torch" not in installed
    facts: Any = installed["merge-gate"].metadata
    assert facts["Requires-Python"] == ">=3.11"
    assert facts["License-Expression"] == "Apache-2.0"
    assert "maintainers" in facts["Author"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(
        facts.get_all("Classifier")
    )
    assert facts["Keywords"]
    assert facts["Description-Content-Type"] == "text/markdown"


def test_commands_without_a_merge_need_no_torch(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    report = str(ROOT / "tests" / "report" / "goldens" / "report.json")
    for words, code, shown in (
        (("--version",), 0, r"merge-gate \d+\.\d+\.\d+"),
        (("--help",), 0, "merge-gate demo"),
        (("check", "./adapters/good", "--base", "./base"), 0, "good"),
        (("check", "./adapters/lfs-pointer", "--base", "./base"), 1, "file-lfs-pointer"),
        (("report", "show", report), 0, "FAIL"),
        (("explain", "rounding-loss"), 0, "bfloat16"),
    ):
        done = command(*words)
        assert (done.returncode, bool(re.search(shown, done.stdout))) == (code, True), (words, done.stdout, done.stderr)


def test_a_merge_without_torch_names_the_package(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("run", "./adapters/good", "--base", "./base", "--output", "./report-without-torch")
    assert done.returncode == 3
    assert "torch" in done.stdout + done.stderr
