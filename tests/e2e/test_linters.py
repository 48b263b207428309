"""zizmor, actionlint, hadolint, shellcheck and the schemas find nothing; and would, if there were something."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.e2e.act import ROOT

pytestmark = pytest.mark.e2e


def lint(home: Path, root: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": f"{home / 'tools' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [root / ".ci" / "lint-workflows.sh"],
        env=environ,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_everything_is_clean(home: Path) -> None:
    done = lint(home, ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "action.yml",
            'exec python3 -I "$GITHUB_ACTION_PATH',
            'exec python3 -I "${{ inputs.config }}',
            "template-injection",
        ),
        ("action.yml", "@043fb46d1a93c77aae656e7c1c64a875d1fc6a0a", "@v7", "unpinned-uses"),
        ("action.yml", "using: composite", "using: composit", "composit"),
        (".github/workflows/ci.yml", "runs-on: ubuntu-24.04", "runs-on: ubuntu-10.04", "ubuntu-10.04"),
        ("tests/e2e/workflows/local-green.yml", "runtime: native", "runtme: native", "runtme"),
        ("Dockerfile", "FROM ${BASE_IMAGE} AS wheel", "FROM python AS wheel", "DL3006"),
        ("recipes/gitlab.yml", "when: always", "when: allways", "allways"),
        ("recipes/comment.yml", "# zizmor: ignore[dangerous-triggers] see above", "", "dangerous-triggers"),
        (".github/dependabot.yml", "default-days: 7", "default-dayz: 7", "default-dayz"),
    ],
)
def test_each_linter_sees_what_it_is_there_for(
    home: Path, tmp_path: Path, name: str, old: str, new: str, says: str
) -> None:
    root = tmp_path / "copy"
    for part in (".ci", ".github", "recipes", "tests/e2e"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("action.yml", "Dockerfile", ".hadolint.yaml"):
        shutil.copy2(ROOT / file, root / file)
    subprocess.run(["git", "init", "-q", root], check=True)  # actionlint finds `uses: ./` by it
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    (root / name).write_text(text.replace(old, new), encoding="utf-8")
    done = lint(home, root)
    assert done.returncode != 0
    assert says in done.stdout


def test_the_recipes_of_the_documents_are_workflows(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = [
        block for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "\njobs:" in block
    ]
    assert len(blocks) >= 12
    for index, block in enumerate(blocks):
        (folder / f"recipe{index}.yml").write_text(block, encoding="utf-8")
    tools, files = home / "tools" / "bin", sorted(folder.iterdir())
    config = ["-config-file", ROOT / ".github" / "actionlint.yaml"]
    commands = [
        [tools / "actionlint", "-no-color", *config, *files],
        [tools / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *files],
        [tools / "zizmor", "--offline", "--no-progress", "--quiet", "--strict-collection", "--no-config", *files],
    ]
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
