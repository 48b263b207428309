"""One place holds the version. Tags, images, and addresses in documents, recipes, and workflows follow it."""

import ast
import email
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from merge_gate import __version__

ROOT = Path(__file__).resolve().parents[1]
RELEASE = Version(__version__).base_version
"""The release that the documents speak of: this version, or the one that this development version leads to."""

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
VARIANTS = WORKFLOW["jobs"]["image"]["strategy"]["matrix"]["variant"]
PATTERNS = {
    "an action": (r"/merge-gate@(v[\w.]+)", {f"v{RELEASE.split('.')[0]}"}),
    "an image": (r"/merge-gate:([\w.-]+)", {f"{RELEASE}-{variant}" for variant in VARIANTS}),
    "a tag": (r"(?:/merge-gate/|release verify |rev: )(v\d[\w.]*)", {f"v{RELEASE}"}),
    "a package": (r"\bmerge-gate(?:\[[\w,]+\])?==([\w.]+)", {RELEASE}),
}
FILES = sorted(
    path
    for pattern in ("*.md", "*.yml", "*.yaml", "docs/**/*.md", "recipes/*", "examples/*", "Dockerfile")
    for path in ROOT.glob(pattern)
    if path.is_file()
)


def named(kind: str) -> list[tuple[str, str]]:
    """Where a version is named, and which one."""
    pattern, _ = PATTERNS[kind]
    return [
        (str(path.relative_to(ROOT)), version)
        for path in FILES
        for version in re.findall(pattern, path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_version_in_documents_and_recipes_is_the_release(kind: str) -> None:
    _, right = PATTERNS[kind]
    assert [(path, version) for path, version in named(kind) if version not in right] == []


def test_versions_are_found_at_all() -> None:
    assert {"README.md", "recipes/fleet-matrix.yml"} <= {path for path, _ in named("an action")}
    assert {"recipes/fleet-matrix.yml", "recipes/gitlab.yml", "recipes/Jenkinsfile"} <= {
        path for path, _ in named("an image")
    }
    assert named("a tag")


def test_the_release_names_its_images_as_the_documents_do() -> None:
    (step,) = [step for step in WORKFLOW["jobs"]["tag"]["steps"] if step.get("name") == "The images' names"]
    (variants,) = re.findall(r"for variant in ([\w ]+); do", step["run"])
    assert variants.split() == VARIANTS
    assert '--tag "$REGISTRY_NAME:$VERSION-$variant"' in step["run"]
    tags = "".join(step.get("run", "") for step in WORKFLOW["jobs"]["tag"]["steps"])
    assert 'git tag --force "v${VERSION%%.*}"' in tags


CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
REPOSITORY = "https://github.com/acme/merge-gate"
NOTES = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["notes"]


def test_the_changelog_begins_with_the_release() -> None:
    assert re.findall(r"^## (\S+) - .+$", CHANGELOG, re.MULTILINE)[0] == RELEASE


def test_the_notes_are_the_section_of_the_release() -> None:
    dated = CHANGELOG.replace(f"## {RELEASE} - not released yet", f"## {RELEASE} - 2027-01-31")
    notes = NOTES(dated, RELEASE, REPOSITORY)
    assert notes.startswith("The first release.")
    assert "## " not in notes
    links = re.findall(r"\]\(([^)\s]+)\)", notes)
    assert links
    for link in links:
        path = link.removeprefix(f"{REPOSITORY}/blob/v{RELEASE}/")
        assert path != link
        assert (ROOT / path.partition("#")[0]).is_file()


def test_the_notes_end_where_the_next_version_begins() -> None:
    changelog = "# C\n\n## 1.1.0 - 2027-02-01\n\n- new [a](#b)\n\n## 1.0.0 - 2027-01-31\n\n- old\n"
    assert NOTES(changelog, "1.1.0", REPOSITORY) == "- new [a](#b)\n"
    assert NOTES(changelog, "1.0.0", REPOSITORY) == "- old\n"


@pytest.mark.parametrize("changelog", ["# C\n", "# C\n\n## 1.0.0 - not released yet\n", "# C\n\n## 1.0.0\n"])
def test_a_release_without_a_dated_section_stops(changelog: str) -> None:
    with pytest.raises(SystemExit, match="YYYY-MM-DD"):
        NOTES(changelog, "1.0.0", REPOSITORY)


def test_the_release_renders_its_notes_first_and_shows_them() -> None:
    checked = "".join(step.get("run", "") for step in WORKFLOW["jobs"]["check"]["steps"])
    made = "".join(step.get("run", "") for step in WORKFLOW["jobs"]["tag"]["steps"])
    command = 'python3 .ci/release_notes.py "$VERSION" "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"'
    assert command in checked
    assert command in made
    assert "--notes-file" in made


def test_the_readme_s_links_are_absolute_with_an_address() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    absolute = runpy.run_path(str(ROOT / "setup.py"))["absolute"]
    assert absolute(readme, "", "1.0.0") == readme
    shown = absolute(readme, REPOSITORY, "1.0.0")
    targets = re.findall(r'(?:\]\(|src(?:set)?=")([^)"\s]+)', shown)
    assert len(targets) > 20
    for target in targets:
        match = re.fullmatch(rf"{REPOSITORY}/(blob|raw)/v1\.0\.0/([^#]+)(#.*)?", target)
        assert match, target
        assert (ROOT / match[2]).exists()
        assert (match[1] == "raw") is (match[2].endswith(".png"))
    assert f"{REPOSITORY}/blob/HEAD/SECURITY.md" in absolute(readme, REPOSITORY, "1.0.0.dev0")


def test_the_file_with_the_address_imports_the_library_only() -> None:
    tree = ast.parse((ROOT / "src" / "merge_gate" / "records" / "project.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def metadata_of_wheel(copy: Path, address: str) -> Message:
    """The metadata of a wheel of this source with this address, built in a copy."""
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    setting = copy / "src" / "merge_gate" / "records" / "project.py"
    text = setting.read_text(encoding="utf-8")
    changed = re.sub(r'^PROJECT_URL = ".*"$', f'PROJECT_URL = "{address}"', text, flags=re.MULTILINE)
    setting.write_text(changed, encoding="utf-8")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = copy.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode("utf-8"))


LINK = re.compile(r'(?:\]\(|src(?:set)?=")([^)"\s]+)')


def test_a_wheel_has_links_once_there_is_an_address(tmp_path: Path) -> None:
    metadata = metadata_of_wheel(tmp_path, "https://github.com/Acme/gate")
    urls = dict(each.split(", ", 1) for each in metadata.get_all("Project-URL", []))
    assert urls["Repository"] == "https://github.com/Acme/gate"
    assert urls["Documentation"] == f"https://acme.github.io/gate/{__version__}/"
    targets = LINK.findall(metadata.get_payload())
    assert len(targets) > 20
    assert {target for target in targets if not target.startswith(("https://github.com/Acme/gate/", "#"))} == set()


def test_a_wheel_has_no_link_of_its_own_without_an_address(tmp_path: Path) -> None:
    metadata = metadata_of_wheel(tmp_path, "")
    assert metadata.get_all("Project-URL") is None
    assert metadata.get("Home-page") is None
    assert not re.search(r"!\[[^\]]*\]\(https?:|shields\.io|/badge", metadata.get_payload())
