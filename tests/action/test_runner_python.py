"""The runner's own Python: the oldest that is promised runs merge_gate.action, with the standard library alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.9"
SOURCE = ROOT / "src"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in (SOURCE / "merge_gate" / "action").rglob("*.py")
    if path.name != "__init__.py"
)
GATE = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"][0]["run"]


def oldest_python() -> Path | None:
    """python3.9 from the path, or from pyenv."""
    found = shutil.which(f"python{OLDEST}")
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [*sorted(versions.glob(f"{OLDEST}.*/bin/python{OLDEST}")), *([Path(found)] if found else [])]
    return next((path for path in candidates if subprocess.run([path, "-c", ""], check=False).returncode == 0), None)


@pytest.mark.skipif(not oldest_python(), reason=f"no Python {OLDEST} here; CI has one")
def test_every_module_is_imported_by_the_oldest_python() -> None:
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
    code += "".join(f"import {name}\n" for name in MODULES)
    code += (
        "from merge_gate.action.docker.docker_api import vendored_sdk\nwith vendored_sdk({}): import docker, requests\n"
    )
    subprocess.run([str(oldest_python()), "-I", "-S", "-W", "error", "-c", code], check=True)


@pytest.mark.skipif(not oldest_python(), reason=f"no Python {OLDEST} here; CI has one")
@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"MERGE_GATE_INPUT_RUNTIME": "docker", "MERGE_GATE_INPUT_IMAGE": "x"}, "does not answer"),
        ({"MERGE_GATE_INPUT_RUNTIME": "native"}, "expected 3.11 or newer"),
        ({"MERGE_GATE_INPUT_DEVICE": "tpu"}, "device: got"),
    ],
)
def test_the_first_step_runs_on_the_oldest_python(tmp_path: Path, environ: dict[str, str], says: str) -> None:
    (tmp_path / "gate.yml").touch()
    (tmp_path / "temp").mkdir()
    given = {
        "MERGE_GATE_INPUT_CONFIG": "gate.yml",
        "GITHUB_WORKSPACE": str(tmp_path),
        "RUNNER_TEMP": str(tmp_path / "temp"),
        "DOCKER_HOST": "unix:///nowhere",
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        [str(oldest_python()), "-I", ROOT / "entrypoint.py", "action"],
        env={**given, **environ},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert says in done.stdout
    assert "result<<" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("version", ["3.6.15", "2.7.18"])
def test_an_older_python_is_a_sentence(tmp_path: Path, version: str) -> None:
    """Before any of our files is read, which it could not even parse."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "Python {version}"\n', encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-e", "-c", GATE],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "GITHUB_ACTION_PATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.startswith(f"::error title=merge-gate::Python {version} is this runner's python3, expected 3.9")
