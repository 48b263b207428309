"""The Docker SDK that the action carries is the lock's, byte for byte, and the one that is used."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from merge_gate.action.docker import sdk

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "launcher.txt"


def locked() -> dict[str, set[str]]:
    """Package and version → SHA-256 of its files."""
    entries = LOCK.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return {entry.split()[0]: set(re.findall(r"sha256:([0-9a-f]{64})", entry)) for entry in entries}


def test_every_wheel_is_one_of_the_lock_and_the_other_way_round() -> None:
    wheels = sorted(sdk.VENDOR.iterdir())
    named = {"{}=={}".format(*wheel.name.replace("_", "-").split("-py3")[0].rsplit("-", 1)): wheel for wheel in wheels}
    assert set(named) == set(locked())
    for name, wheel in named.items():
        assert wheel.name.endswith("-py3-none-any.whl"), "imported as it lies there, on any machine"
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() in locked()[name], f"run .ci/vendor.sh ({name})"


@pytest.mark.parametrize("own", [None, "99.0"])
def test_whatever_sdk_the_runner_has_the_actions_own_is_used(tmp_path: Path, own: str | None) -> None:
    if own:
        (tmp_path / "site" / "docker").mkdir(parents=True)
        (tmp_path / "site" / "docker" / "__init__.py").write_text(f"__version__ = {own!r}\n", encoding="utf-8")
    temp = tmp_path / "temp"
    temp.mkdir()
    code = """
        import sys
        sys.path[:0] = sys.argv[1:3]
        from merge_gate.action.docker import sdk
        before = list(sys.path)
        with sdk.available({"RUNNER_TEMP": sys.argv[3]}):
            import docker
            print(docker.__version__, docker.__file__)
        assert sys.path == before
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), ROOT / "src", tmp_path / "site", temp],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert f"docker=={version}" in locked()
    assert file.startswith(str(sdk.VENDOR))
    assert list(temp.iterdir()) == [], "nothing is left"
