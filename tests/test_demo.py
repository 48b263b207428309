"""The demo's files are what transformers and PEFT would load, and each adapter is broken in the one way it claims."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from merge_gate._internal.errors import ExitCode, UsageError
from merge_gate.demo import CONFIG_NAME, EXPECTED, LFS_POINTER, MARKER, make_demo
from tests.support.command import Answer, merge_gate, strict_json
from tests.support.generated import blocks, without_numbers
from tests.support.terminal_picture import drawn, drawn_demo, plain, text_of
from tests.support.wording import Wording

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "new" / "demo"
    assert make_demo(str(directory)) == str(directory / CONFIG_NAME)
    return directory


def merge(demo: Path, name: str, dtype: str) -> tuple[list[str], list[str], list[str]]:
    """What a user of plain PEFT gets: the merged tensors, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=getattr(torch, dtype))
        before = {key: value.clone() for key, value in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, demo / "adapters" / name).merge_and_unload().state_dict()
    changed = [key for key, value in merged.items() if not torch.equal(value, before[key])]
    infinite = [key for key, value in merged.items() if not torch.isfinite(value).all()]
    return changed, infinite, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("name", "dtype", "changed", "infinite"),
    [
        ("good", "float16", 4, 0),
        ("good", "bfloat16", 4, 0),
        ("nan", "float16", 4, 1),
        ("overflow", "bfloat16", 4, 0),
        ("overflow", "float32", 4, 0),
        ("overflow", "float16", 4, 1),
        ("no-effect", "float16", 0, 0),
        ("lost-keys", "float16", 0, 0),
    ],
)
def test_an_adapter_is_what_it_claims_to_be(demo: Path, name: str, dtype: str, changed: int, infinite: int) -> None:
    found_changed, found_infinite, messages = merge(demo, name, dtype)
    assert (len(found_changed), len(found_infinite)) == (changed, infinite)
    assert any("missing adapter keys" in message for message in messages) == (name == "lost-keys")


def test_the_base_loads_without_a_missing_or_a_surplus_tensor(demo: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(demo / "base", output_loading_info=True)
    assert not any(info.values())
    assert str(model.dtype) == "torch.float16"


def test_every_adapter_is_listed_and_expected(demo: Path) -> None:
    on_disk = {path.name for path in (demo / "adapters").iterdir()}
    assert {name for name, _ in EXPECTED} == on_disk
    assert (demo / "adapters/lfs-pointer/adapter_model.safetensors").read_bytes() == LFS_POINTER
    text = (demo / CONFIG_NAME).read_text()
    assert set(re.findall(r"\./adapters/([\w-]+)", text)) == on_disk


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        make_demo(str(tmp_path / name))
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_a_former_demo_is_made_anew(tmp_path: Path) -> None:
    make_demo(str(tmp_path))
    weights = tmp_path / "adapters/good/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    make_demo(str(tmp_path))
    assert weights.read_bytes() == whole
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert weights.with_name(f"{weights.name}.old").read_bytes() == b""
    for number in ("", "-2", "-3"):
        (tmp_path / CONFIG_NAME).write_text(f"my adapters{number}")
        make_demo(str(tmp_path))
        assert (tmp_path / f"{CONFIG_NAME}.old{number}").read_text() == f"my adapters{number}"
    assert len([*tmp_path.rglob("*.old*")]) == 4, "a file that is as the demo made it is not kept twice"


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))) as caught:
        make_demo(str(tmp_path))
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_directory(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "taken").write_text("x")
    for name in ("taken", "taken/below"):
        with wording.of(UsageError, match=name):
            make_demo(str(tmp_path / name))
    assert (tmp_path / "taken").read_text() == "x"


@pytest.mark.parametrize("link", ["base", "adapters/good/adapter_model.safetensors"])
def test_no_link_leads_out_of_the_demo(tmp_path: Path, link: str, wording: Wording) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    demo = tmp_path / "demo"
    (demo / link).parent.mkdir(parents=True)
    (demo / MARKER).write_text("")
    (demo / link).symlink_to(outside)
    with wording.of(UsageError, match=link):
        make_demo(str(demo))
    assert not list(outside.iterdir())


@pytest.fixture(scope="module")
def without_a_directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """`merge-gate demo`, started in an empty directory."""
    place = tmp_path_factory.mktemp("bare")
    return place, merge_gate("demo", "--color", "always", cwd=place)


def test_the_demo_keeps_its_report_and_ends_with_its_page(without_a_directory: tuple[Path, Answer]) -> None:
    place, answer = without_a_directory
    assert answer.code == 0, answer.said
    assert [path.name for path in place.iterdir()] == ["merge-gate-demo"]
    assert strict_json(place / "merge-gate-demo" / "merge-gate-report" / "report.json")["result"] == "fail"
    (page,) = re.findall(r"^Report: (.+)$", plain(answer.out), re.MULTILINE)
    assert (place / page).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("page", "language"), [("README.md", "text"), ("docs/quickstart.md", "console")])
def test_a_page_has_an_excerpt_of_what_the_demo_prints(page, language, without_a_directory) -> None:
    _, answer = without_a_directory
    printed = {without_numbers(line) for line in plain(answer.out).splitlines()}
    excerpt = blocks((ROOT / page).read_text(encoding="utf-8"), language)[0]
    first, *lines = excerpt.splitlines()
    assert first == "$ merge-gate demo"
    assert [line for line in lines if without_numbers(line) not in printed] == []


PICTURE = ROOT / "docs" / "images" / "demo.svg"


def test_the_picture_of_the_terminal_shows_what_the_demo_prints(without_a_directory: tuple[Path, Answer]) -> None:
    """The figures may differ by machine. UPDATE_GOLDENS=1 draws it again, as `make pictures` does."""
    _, answer = without_a_directory
    if os.environ.get("UPDATE_GOLDENS"):
        PICTURE.write_text(drawn_demo(answer.out), encoding="utf-8")
    shown = text_of(PICTURE.read_text(encoding="utf-8"))
    assert without_numbers(shown) == without_numbers("".join(f"$ merge-gate demo {plain(answer.out)}".split()))


def test_a_picture_of_the_terminal_is_whole_and_asks_for_nothing() -> None:
    svg = drawn("\x1b[31mred\x1b[0m <b>&amp; plain\n\n" + "w" * 250, "title")
    assert text_of(svg) == "red<b>&amp;plain" + "w" * 250
    assert set(re.findall(r"https?://[^\s\"]+", svg)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
    assert "url(http" not in svg
