"""The hooks of .pre-commit-hooks.yaml, by pre-commit itself, in a git repository that somebody commits to."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command import environment, merge_gate
from tests.support.faults import LFS_POINTER
from tests.support.models import ADAPTER_WEIGHTS, Shelf, to_pickle

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / ".pre-commit-hooks.yaml"
PRE_COMMIT = (sys.executable, "-m", "pre_commit")
CPU_SECONDS = 1.0


class Repository:
    """Somebody's adapters under git, with pre-commit installed as its hook."""

    def __init__(self, root: Path, hooks: Path, home: Path) -> None:
        self.root, self.hooks = root, hooks
        self.environ = environment(
            PRE_COMMIT_HOME=str(home),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            GIT_CONFIG_GLOBAL=os.devnull,
            GIT_CONFIG_NOSYSTEM="1",
        )
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.root, env=self.environ, check=False, capture_output=True, text=True)

    def git(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0", *words)

    def use(self, hook: str, **settings: Any) -> None:
        """What docs/guides/other-ci.md says: the hook in .pre-commit-config.yaml, then `pre-commit install`."""
        revision = subprocess.run(
            ["git", "-C", self.hooks, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        config = {"repos": [{"repo": str(self.hooks), "rev": revision, "hooks": [{"id": hook, **settings}]}]}
        (self.root / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
        assert self.run(*PRE_COMMIT, "install").returncode == 0

    def commit(self, *places: str) -> subprocess.CompletedProcess[str]:
        self.git("add", "--", *places)
        return self.git("commit", "-m", "adapters")


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """The repository that users name under `repo:`."""
    directory = tmp_path / "hooks"
    directory.mkdir()
    for name in (MANIFEST.name, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / name)
    shutil.copytree(ROOT / "src", directory / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    git = ["git", "-C", str(directory), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--no-verify", "-m", "hooks"]):
        subprocess.run([*git, *words], check=True)
    return directory


@pytest.fixture
def repository(tmp_path: Path, hooks: Path) -> Repository:
    return Repository(tmp_path / "theirs", hooks, tmp_path / "pre-commit")


def put(shelf: Shelf, directory: Path, break_: Callable[[Path], None] | None = None) -> None:
    shutil.copytree(shelf.adapter("plain"), directory)
    if break_ is not None:
        break_(directory)


def unfetched(directory: Path) -> None:
    (directory / ADAPTER_WEIGHTS).write_bytes(LFS_POINTER)


def test_the_manifest_is_one() -> None:
    done = subprocess.run([*PRE_COMMIT, "validate-manifest", MANIFEST], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_changed_adapters_are_checked_and_no_others(shelf: Shelf, repository: Repository) -> None:
    put(shelf, repository.root / "adapters" / "old", unfetched)
    assert repository.commit("adapters").returncode == 0  # before there was a hook
    repository.use("merge-gate", language="unsupported")
    put(shelf, repository.root / "adapters" / "sound")
    done = repository.commit("adapters", ".pre-commit-config.yaml")
    assert done.returncode == 0, done.stderr
    assert "merge-gate check, files of changed adapters" in done.stderr
    assert "Passed" in done.stderr
    put(shelf, repository.root / "adapters" / "broken", unfetched)
    done = repository.commit("adapters")
    assert done.returncode == 1
    assert "broken failed: file-lfs-pointer" in done.stderr
    assert "the only adapter failed" in done.stderr
    (repository.root / "notes.md").write_text("no adapter")
    repository.git("reset", "-q")
    assert "(no files to check)" in repository.commit("notes.md").stderr


@pytest.mark.slow
def test_the_configs_own_settings_hold_for_what_it_lists(shelf: Shelf, repository: Repository) -> None:
    put(shelf, repository.root / "adapters" / "pickled", to_pickle)
    config = repository.root / "merge-gate.yml"
    config.write_text("version: 1\nallow-pickle: true\nadapters: [./adapters/pickled]\n")
    repository.use("merge-gate-config", language="unsupported")
    assert repository.commit(".").returncode == 0
    config.write_text("version: 1\nadapters: [./adapters/pickled]\n")
    done = repository.commit(".")
    assert done.returncode == 1
    assert "pickle-refused" in done.stderr
    config.write_text("version: 1\nadaptres: []\n")
    assert "adaptres" in repository.commit(".").stderr


@pytest.mark.slow
def test_pre_commit_installs_it_by_itself(shelf: Shelf, repository: Repository) -> None:
    """As by default, in an environment of pre-commit's own; torch and the other dependencies are lent by this one."""
    packages = str(Path(yaml.__file__).parents[1])
    repository.environ |= {
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": packages,
    }
    repository.use("merge-gate")
    put(shelf, repository.root / "adapters" / "broken", unfetched)
    done = repository.commit(".")
    assert done.returncode == 1
    assert "file-lfs-pointer" in done.stderr, done.stderr


def test_it_takes_less_than_a_second(shelf: Shelf, tmp_path: Path) -> None:
    put(shelf, tmp_path / "sound")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert merge_gate("check", "sound/adapter_config.json", cwd=tmp_path).code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < CPU_SECONDS
