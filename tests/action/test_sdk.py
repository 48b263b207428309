"""The private copy of the Docker SDK. That its lock installs is shown by tests/e2e, where python3 has only pip."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

from merge_gate.action import sdk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdk") / "bare"
    venv.create(directory, with_pip=False)
    return directory / "bin" / "python"


def in_bare(bare: Path, code: str, temp: Path, *words: str) -> subprocess.CompletedProcess[str]:
    head = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    return subprocess.run(
        [bare, "-I", "-c", head + textwrap.dedent(code), temp, *words], check=False, capture_output=True, text=True
    )


def test_an_sdk_that_is_there_is_used(tmp_path: Path) -> None:
    before = list(sys.path)
    with sdk.available({"RUNNER_TEMP": str(tmp_path)}):
        assert sys.path == before
        assert list(tmp_path.iterdir()) == []


def test_without_pip_the_message_says_what_to_install(bare: Path, tmp_path: Path) -> None:
    code = """
        from merge_gate.action import sdk
        from merge_gate.errors import LauncherError
        try:
            with sdk.available({"RUNNER_TEMP": sys.argv[1]}):
                raise SystemExit("no error")
        except LauncherError as error:
            print(error.message, "|", error.hint)
    """
    done = in_bare(bare, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be installed" in done.stdout
    assert "No module named pip" in done.stdout
    assert "apt-get install python3-pip" in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"docker==7.1.0 --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    links = tmp_path / "links"
    links.mkdir()
    (links / "docker-7.1.0-py3-none-any.whl").write_bytes(b"not the wheel")
    environ = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
        "PIP_CONFIG_FILE": "/dev/null",
        "PATH": "/usr/bin:/bin",
    }
    with pytest.raises(sdk.LauncherError, match="cannot be installed"):
        sdk.install(tmp_path / "target", lock, environ)


def test_every_requirement_of_the_lock_has_its_hash() -> None:
    entries = sdk.LOCK.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    assert {entry.split("==")[0] for entry in entries} >= {"docker", "requests", "urllib3"}
    assert all("--hash=sha256:" in entry for entry in entries)
