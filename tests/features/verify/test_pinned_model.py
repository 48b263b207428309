"""A finished model that is written to or replaced while it is verified: no answer is about other bytes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.features.verify import answer
from merge_gate.files.identity import directory_identity
from tests.support import published
from tests.support.command import entries
from tests.support.verify.merges import Scene

VARIANT = "bfloat16-base"


def swap_file(file: Path) -> None:
    """Another file of the same bytes."""
    shutil.copy(file, file.with_name("new"))
    file.with_name("new").rename(file)


def swap_and_back(folder: Path) -> None:
    """The directory moves away and comes back: in between, another one had its name."""
    folder.rename(folder.with_name("away"))
    folder.with_name("away").rename(folder)


SWAPS: dict[str, Callable[[Path], object]] = {
    "weights": lambda model: swap_file(model / "model.safetensors"),
    "config.json": lambda model: swap_file(model / "config.json"),
    "a file more": lambda model: (model / "tokenizer.json").write_text("{}"),
    "a file less": lambda model: (model / "config.json").unlink(),
    "the directory, and back": swap_and_back,
}


def swap_after(monkeypatch: pytest.MonkeyPatch, function: str, swap: Callable[[], object]) -> None:
    """Swap something as soon as an answer has been found, and before it is given."""
    own = getattr(answer, function)

    def swapped(*words: Any) -> Any:
        found = own(*words)
        swap()
        return found

    monkeypatch.setattr(answer, function, swapped)


@pytest.mark.attempt("W06", "weights of MERGED are swapped while it is verified", "error, and no answer")
@pytest.mark.attempt("W07", "config.json of MERGED is swapped while it is verified", "error, and no answer")
@pytest.mark.parametrize("what", ["weights", pytest.param("config.json", marks=pytest.mark.slow)])
def test_a_model_that_is_swapped_during_the_comparison(
    scene: Scene, tmp_path: Path, cwd, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    shutil.copytree(scene.merge(VARIANT), tmp_path / "model")
    swap_after(monkeypatch, "findings_of", lambda: SWAPS[what](tmp_path / "model"))
    words = ["--base", str(scene.base(VARIANT)), "--adapter", str(scene.adapter(VARIANT))]
    assert main(["verify", "model", *words]) == 3
    (found,) = entries(tmp_path / "merge-gate-verify")
    assert (found["verdict"], found["cause"], found["findings"][0]["origin"]) == ("error", "not-judged", "model")


@pytest.mark.attempt("W10g", "--output of verify is below MERGED", "exit 2, nothing written")
def test_a_report_inside_of_the_model_is_refused(tmp_path: Path, cwd, capsys: pytest.CaptureFixture[str]) -> None:
    published.publish(tmp_path / "model")
    os.chdir(tmp_path / "model")
    assert main(["verify", ".", "--output", "reports/of-verify"]) == 2
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "model" / "reports").exists()


@pytest.mark.attempt("W06b", "a published directory is swapped while it is compared", "error, no answer")
@pytest.mark.parametrize("what", [None, *SWAPS])
def test_a_model_that_is_swapped_while_its_record_is_compared(
    tmp_path: Path, cwd, monkeypatch: pytest.MonkeyPatch, what: str | None
) -> None:
    published.publish(tmp_path / "model")
    if what is not None:
        swap_after(monkeypatch, "recorded_report", lambda: SWAPS[what](tmp_path / "model"))
    assert main(["verify", "model"]) == (0 if what is None else 3)
    (found,) = entries(tmp_path / "merge-gate-verify")
    assert (found["verdict"], found["cause"]) == (("passed", None) if what is None else ("error", "not-judged"))


def test_the_identity_of_a_directory_is_that_of_everything_in_it(tmp_path: Path) -> None:
    (tmp_path / "model" / "a" / "empty").mkdir(parents=True)
    (tmp_path / "model" / ".hidden").touch()
    (tmp_path / "model" / "dangling").symlink_to("absent")
    (tmp_path / "model" / "loop").symlink_to("loop")
    (tmp_path / "elsewhere").touch()
    (tmp_path / "model" / "link").symlink_to("../elsewhere")
    before = directory_identity(tmp_path / "model")
    assert [one.name for one in before] == [".", ".hidden", "a", "a/empty", "dangling", "link", "loop"]
    assert directory_identity(str(tmp_path / "model")) == before
    (tmp_path / "elsewhere").write_text("more")
    assert directory_identity(tmp_path / "model") != before
