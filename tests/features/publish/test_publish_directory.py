"""The directory that models are published to: what it may be, what may be in it, and what is never replaced."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate.features.publish import publish_directory
from merge_gate.features.publish.partial import PartialDirectory
from merge_gate.files.identity import directory_identity
from merge_gate.records.files import MANIFEST_NAME
from tests.support.command import entries
from tests.support.played_merges import configure, expected, play, stored
from tests.support.publish_kills import digests
from tests.support.published import CHANGES, flip, link

OTHERS: dict[str, Callable[[Path], object]] = {
    "link": lambda one: one.symlink_to("../mine"),
    "dangling link": lambda one: one.symlink_to("../absent"),
    "file": lambda one: one.write_text("mine"),
    "pipe": os.mkfifo,
    "empty": lambda one: one.mkdir(),
    "directory": lambda one: (one.mkdir(), (one / "mine").write_text("mine")),
    "partial directory": lambda one: (
        one.with_name(".one.partial").mkdir(),
        (one.with_name(".one.partial") / "x").touch(),
    ),
}


@pytest.mark.attempt("P03", "DIR/NAME is a link, a dangling link, a file, or a pipe", "exit 2, and it stays")
@pytest.mark.attempt("P03b", "DIR/NAME is a user's directory", "exit 2, and it stays")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_publication_is_refused_and_stays(place: Path, kind: str) -> None:
    (place / "merged").mkdir()
    (place / "mine").mkdir()
    OTHERS[kind](place / "merged" / "one")
    before = directory_identity(place / "merged")
    assert play(place, "--publish", "merged") == 2
    assert directory_identity(place / "merged") == before


MORE_CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the manifest": lambda model: flip(model / MANIFEST_NAME),
    "a link to the directory": link,
}


@pytest.mark.attempt("P04", "own publication edited, at equal size too: files, card, manifest", "exit 2, and it stays")
@pytest.mark.attempt("P05", "files, pipe, hidden file, empty folder, or link added to it", "exit 2, and it stays")
@pytest.mark.parametrize("change", [*CHANGES, *MORE_CHANGES])
def test_only_an_unchanged_earlier_publication_is_replaced(place: Path, change: str) -> None:
    assert play(place, "--publish", "merged") == 0
    assert play(place, "--publish", "merged") == 0
    model = place / "merged" / "one"
    assert stored(model) == expected(stored(place / "base"))
    assert [path.name for path in (place / "merged").iterdir()] == ["one"]
    (CHANGES | MORE_CHANGES)[change](model)
    before = digests(place)
    assert play(place, "--publish", "merged", "-o", "second") == 2
    shutil.rmtree(place / "second", ignore_errors=True)
    assert digests(place) == before


@pytest.mark.attempt("A04", "publish leads through a link of the checkout", "exit 2, and nothing outside")
@pytest.mark.parametrize("target", ["link", "link/below", "inner/link", "inner/../link/below", "dangling", "./link/"])
@pytest.mark.parametrize("by", ["option", "absolute option", "configuration"])
def test_a_link_below_the_current_directory_is_refused(place: Path, target: str, by: str) -> None:
    outside = place.with_name(f"{place.name}-outside")
    (outside / "below").mkdir(parents=True)
    (place / "inner").mkdir()
    for name, to in (("link", outside), ("inner/link", outside), ("dangling", outside / "absent")):
        (place / name).symlink_to(to)
    configure(place, publish=target)
    if by == "configuration":
        assert play(place, adapters=["gate.yml"]) == 2
    else:
        assert play(place, "--publish", target if by == "option" else f"{place}/{target}") == 2
    assert digests(outside) == {}
    assert not (outside / "absent").exists()


def test_a_link_above_the_current_directory_is_followed(place: Path) -> None:
    """Many homes and disks are behind links."""
    home = place.with_name(f"{place.name}-home")
    home.symlink_to(place)
    assert play(place, "--publish", f"{home}/merged") == 0
    assert (place / "merged" / "one").is_dir()


@pytest.mark.attempt("P12", "YAML publishes to an absolute place, ../.. and ~, with the action's limit", "exit 2")
@pytest.mark.parametrize("target", ["../outside", "../../outside", "/tmp/merge-gate-outside", "checkout/../.."])
@pytest.mark.parametrize("by", ["option", "configuration"])
def test_a_limit_keeps_models_inside(place: Path, variables, target: str, by: str) -> None:
    variables["MERGE_GATE_PUBLISH_WITHIN"] = str(place)
    configure(place, publish=target)
    words = {"adapters": ["gate.yml"]} if by == "configuration" else {}
    assert play(place, *(["--publish", target] if by == "option" else []), **words) == 2  # type: ignore[arg-type]
    assert not (place.parent / "outside").exists()
    assert not Path("/tmp/merge-gate-outside").exists()
    assert play(place, "--publish", "~/merged") == 0
    assert (place / "~" / "merged" / "one").is_dir()


@pytest.mark.parametrize("target", ["base", "base/merged", ".", "one/merged"])
@pytest.mark.attempt("P01", "publish into the base, below it, or over it", "exit 2, and nothing changes")
@pytest.mark.attempt("P02", "publish into the adapter", "exit 2, and nothing changes")
def test_no_input_is_written_to_or_replaced(place: Path, target: str) -> None:
    before = digests(place)
    assert play(place, "--publish", target, "-o", "report") == 2
    shutil.rmtree(place / "report", ignore_errors=True)
    assert digests(place) == before


def test_a_published_base_is_not_replaced_by_its_own_merge(place: Path) -> None:
    assert play(place, "--publish", "merged") == 0
    before = digests(place / "merged")
    assert play(place, "--publish", "merged", "-o", "second", base="merged/one") == 3
    assert digests(place / "merged") == before


@pytest.mark.parametrize("target", ["/proc/merged", "base/config.json", "base/config.json/merged"])
@pytest.mark.attempt("P14", "DIR is a file, below a file, or in /proc", "exit 2")
def test_a_target_that_cannot_be_written_is_refused(place: Path, target: str) -> None:
    assert play(place, "--publish", target) == 2


@pytest.mark.parametrize("name", [".one", "a/b", "x" * 250])
@pytest.mark.attempt("P11", "adapters named .one, a/b, or with 200 characters", "used as a name, or exit 2")
def test_a_name_that_is_no_directory_is_refused(place: Path, name: str) -> None:
    configure(place, adapters=[{"path": "one", "name": name[:200]}], publish="merged")
    assert play(place, adapters=["gate.yml"]) == (0 if name.startswith("x") else 2)


@pytest.mark.attempt("F12", "a disk that is too small", "exit 3 before the first merge")
def test_a_disk_that_is_too_small_is_refused_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = os.statvfs(place)
    full = os.statvfs_result((*real[:4], 0, *real[5:]))
    monkeypatch.setattr(publish_directory.os, "statvfs", lambda _: full)
    assert play(place, "--publish", "outer/merged", send=lambda *_: pytest.fail("nothing is merged")) == 3
    assert not (place / "outer").exists()
    assert "and 0.0 MiB are free" in capfd.readouterr().err


def test_a_directory_that_is_not_writable_is_refused(place: Path) -> None:
    (place / "merged").mkdir(mode=0o555)
    user, effective = os.getuid(), os.geteuid()
    os.setreuid(user or 65534, effective)  # root may write to any directory
    try:
        assert play(place, "--publish", "merged") == 2
    finally:
        os.setreuid(user, effective)


@pytest.mark.attempt("P04c", "weights of an earlier publication edited at equal size", "not published, and they stay")
def test_edited_weights_are_noticed_before_they_are_replaced(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert play(place, "--publish", "merged") == 0
    assert "is compared with" not in capfd.readouterr().err, "there was no earlier model"
    flip(place / "merged" / "one" / "model-00001-of-00002.safetensors")
    before = digests(place / "merged")
    assert play(place, "--publish", "merged", "-o", "second") == 3
    assert digests(place / "merged") == before
    assert "is compared with" in capfd.readouterr().err
    (adapter,) = entries(place / "second")
    assert (adapter["verdict"], adapter["cause"]) == ("error", "not-published")


@pytest.mark.attempt("F07", "a second run publishes to the same name", "exit 2")
@pytest.mark.attempt("F07b", "two writers of one name, at the lock", "the second is refused")
def test_a_second_publisher_is_refused_while_the_first_is_alive(place: Path) -> None:
    (place / "merged").mkdir()
    first = PartialDirectory(place / "merged" / "one")
    (first.model / "model.safetensors").touch()
    before = digests(place / "merged")
    assert play(place, "--publish", "merged") == 2
    assert digests(place / "merged") == before
    PartialDirectory(place / "merged" / "two").remove()
    first.remove()
    assert play(place, "--publish", "merged") == 0
