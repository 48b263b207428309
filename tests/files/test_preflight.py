"""What an adapter's files say without torch: every check, healthy variants, the safetensors library as oracle."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from merge_gate._internal.errors import EngineError
from merge_gate.files.adapter_config import MAX_BYTES
from merge_gate.files.headers import DTYPE_BITS, MAX_HEADER_BYTES, CorruptFileError, parse_file, parse_places
from merge_gate.files.identity import identity_of
from merge_gate.files.preflight import base_of, preflight
from merge_gate.records.files import EXPORT_NAME
from merge_gate.records.terms import Origin
from tests.support import methods
from tests.support.files.adapter_files import (
    CONFIG,
    CONFIG_NAME,
    LFS,
    LORA_A,
    LORA_B,
    PICKLE_NAME,
    SHAPES,
    WEIGHTS_NAME,
    look,
    make,
    pack,
    weights,
)
from tests.support.files.headers_of import header_of
from tests.support.models import VARIANTS
from tests.support.properties import examples

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.files import AdapterFiles
    from merge_gate.records.terms import Finding
    from tests.support.models import Shelf
    from tests.support.wording import Wording

NEWLINES = {
    name: {"dtype": "F32", "shape": [4, 4], "data_offsets": [at, at + 64]} for name, at in ((LORA_A, 0), (LORA_B, 64))
}
"""The header of a file whose data is line ends."""
HINTED = "*.safetensors -text"


def only(files: AdapterFiles, check: str) -> Finding:
    assert [finding.check for finding in files.findings] == [check], files.findings
    return files.findings[0]


# --- healthy -------------------------------------------------------------------------------------------------------


def test_it_reads_what_the_later_stages_need(tmp_path: Path) -> None:
    files = look(make(tmp_path))
    assert files.findings == ()
    config = files.config
    assert (config.peft_type, config.task_type, config.base_name, config.base_revision) == (
        "LORA", "CAUSAL_LM", "acme/base", "v1",
    )  # fmt: skip
    assert config.keys == set(CONFIG)
    assert dict(config.values) == {key: json.dumps(value) for key, value in CONFIG.items() if value}
    assert files.weights == WEIGHTS_NAME
    assert [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in files.tensors] == [
        (name, "F32", shape) for name, shape in SHAPES.items()
    ]
    for record in files.files:
        content = (tmp_path / record.path).read_bytes()
        assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [record.path for record in files.files] == [CONFIG_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saves_has_no_finding(variant: str, shelf: Shelf) -> None:
    files = look(shelf.adapter(variant), allow_pickle=True)
    assert files.findings == ()
    assert files.config.peft_type


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_torch_pickles_is_read_as_safetensors_are(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    if variant == "pickled":  # it has no other weights
        assert look(shelf.adapter(variant), allow_pickle=True).tensors
        return
    shutil.copytree(shelf.adapter(variant), tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / WEIGHTS_NAME), tmp_path / "pickled" / PICKLE_NAME)
    (tmp_path / "pickled" / WEIGHTS_NAME).unlink()
    found = look(tmp_path / "pickled", allow_pickle=True)
    assert found.findings == ()
    assert set(found.tensors) == set(look(shelf.adapter(variant)).tensors)


@pytest.fixture(scope="session")
def method_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("method-bases")
    return {name: methods.load_base(name, methods.save_base(name, root / name)) for name in methods.BASES}


@pytest.mark.parametrize("case", methods.CASES, ids=lambda case: case.name)
def test_what_every_method_saves_has_no_finding(
    case: methods.Case, method_bases: dict[str, Any], tmp_path: Path
) -> None:
    with methods.quiet():
        methods.save_adapter(case, method_bases[case.base], tmp_path / "adapter")
    assert look(tmp_path / "adapter").findings == ()


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / PICKLE_NAME).write_bytes(b"\x80\x02}.")
    assert look(tmp_path, withheld=(PICKLE_NAME,)).weights == WEIGHTS_NAME


def test_files_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    make(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert look(tmp_path / "snapshot").findings == ()


def test_the_class_of_a_base_with_its_own_code_is_not_unsafe(tmp_path: Path) -> None:
    """PEFT writes this itself, and from_pretrained does not read it."""
    mapping = {"base_model_class": "GLMForCausalLM", "parent_library": "transformers_modules.glm.0a1b.modeling_glm"}
    assert look(make(tmp_path, CONFIG | {"task_type": None, "auto_mapping": mapping})).findings == ()


# --- file-missing --------------------------------------------------------------------------------------------------


def test_an_empty_directory(tmp_path: Path) -> None:
    checks = [(finding.check, finding.origin) for finding in look(tmp_path).findings]
    assert checks == [("file-missing", Origin.FILE)]
    message = look(tmp_path).findings[0].message
    assert CONFIG_NAME in message
    assert WEIGHTS_NAME in message


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "model.pt")
    finding = only(look(tmp_path), "file-missing")
    assert WEIGHTS_NAME in finding.message
    assert "model.pt" in finding.message


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (("run/german", "run/french"), ["'run/french'", "'run/german'"]),
        (("german", "french"), ["'french'", "'german'"]),
        (("run/checkpoint-5", "run/checkpoint-10"), ["'run/checkpoint-10'"]),
    ],
)
def test_adapters_further_down_are_named_by_their_paths(
    paths: tuple[str, ...], named: list[str], tmp_path: Path
) -> None:
    for path in paths:
        make(tmp_path / path)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "README.md").touch()
    assert re.findall(r"'[^']+'", only(look(tmp_path), "file-missing").hint) == named


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("config.json", "model.safetensors"), "model"),
        (("config.json", "pytorch_model-00001-of-00002.bin"), "model"),
        (("checkpoint-500/adapter_config.json", "checkpoint-1000/adapter_config.json"), "'checkpoint-1000'"),
        (("final/adapter_config.json",), "'final'"),
        (("adapter_model-00001-of-00002.safetensors",), "sharded"),
        (("README.md",), "save_pretrained"),
        (("pytorch_lora_weights.safetensors",), "diffusers"),
        (("adapters.safetensors",), "MLX"),
        (("lora-f16.gguf",), "llama.cpp"),
        (("pytorch_adapter.bin",), "AdapterHub"),
        (("Copy of adapter_model.safetensors",), "names"),
        (("adapter_config (1).json",), "names"),
        (("my-style.safetensors",), "kohya"),
    ],
)
@pytest.mark.parametrize("is_on_the_hub", [False, True])
def test_the_hint_fits_what_is_there_instead(
    names: tuple[str, ...], hint: str, is_on_the_hub: bool, tmp_path: Path
) -> None:
    for name in () if is_on_the_hub else names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for finding in look(tmp_path, withheld=names if is_on_the_hub else ()).findings:
        assert finding.check == "file-missing"
        assert hint in finding.hint


def test_a_file_of_the_hub_further_down_is_not_what_lies_here(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    message = only(look(tmp_path, withheld=("further/down.bin", "here.bin")), "file-missing").message
    assert "here.bin" in message
    assert "down.bin" not in message


def test_an_adapter_of_the_hub_in_folders_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    finding = only(look(tmp_path, withheld=("runs/german/adapter_config.json",)), "file-missing")
    assert "'runs/german'" in finding.hint


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    make(tmp_path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "absent")
    assert [finding.check for finding in look(tmp_path).findings] == ["file-missing"] * 2


# --- file-lfs-pointer, file-corrupt, pickle-refused ----------------------------------------------------------------


def test_lfs_pointers_in_both_places(tmp_path: Path) -> None:
    config, tensors = look(make(tmp_path, LFS, weights=LFS)).findings
    assert config.check == tensors.check == "file-lfs-pointer"
    assert {"12,345,678", str(len(LFS))} <= set(tensors.message.split())
    assert "git lfs pull" in tensors.hint
    assert "lfs: true" in tensors.hint


def test_a_pointer_in_place_of_a_refused_pickle_comes_first(tmp_path: Path) -> None:
    pointer, refused = look(make_pickled(tmp_path, LFS)).findings
    assert (pointer.check, refused.check) == ("file-lfs-pointer", "pickle-refused")
    assert "12,345,678" in pointer.message


@pytest.mark.parametrize("content", [LFS, b"", b"GGUF" + bytes(60)], ids=["pointer", "empty", "other"])
def test_a_file_that_is_not_taken_is_named_and_has_its_digest(content: bytes, tmp_path: Path) -> None:
    """What was judged can be told from what stands there later."""
    files = look(make(tmp_path, weights=content))
    assert files.weights == WEIGHTS_NAME
    (record,) = (one for one in files.files if one.path == WEIGHTS_NAME)
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("content", [LFS, b"", b"[]", b" " * 10_000_001], ids=["pointer", "empty", "list", "large"])
def test_a_config_that_is_not_taken_has_its_digest(content: bytes, tmp_path: Path) -> None:
    record, _ = look(make(tmp_path, content)).files
    assert record.path == CONFIG_NAME
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_config_of_the_largest_size_is_read(tmp_path: Path) -> None:
    raw = json.dumps(CONFIG).encode()
    files = look(make(tmp_path, b" " * (MAX_BYTES - len(raw)) + raw))
    assert files.findings == ()
    assert files.config.r == CONFIG["r"]


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_file_that_cannot_be_opened_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(EngineError) as raised:
        look(tmp_path)
    assert f"'{name}'" in raised.value.message
    assert os.strerror(errno.ELOOP) in raised.value.message


def test_weights_that_are_absent_or_no_file_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / WEIGHTS_NAME).symlink_to("gone")
    assert look(tmp_path).weights == WEIGHTS_NAME
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / WEIGHTS_NAME).mkdir()
    assert look(tmp_path).weights == WEIGHTS_NAME


@pytest.mark.parametrize(
    ("content", "padding"),
    [
        ('{"padding": ["a.b", 3, null]}', {"a.b"}),
        ('{"padding": "a.b"}', set()),
        ("[]", set()),
        ("{", set()),
        ("version https://git-lfs.github.com/spec/v1\n", set()),
    ],
)
def test_the_padding_of_an_export_is_read(content: str, padding: set[str], tmp_path: Path) -> None:
    """A broken record is no fault of the adapter: only its padding is not known. Its digest counts as a file's."""
    make(tmp_path)
    (tmp_path / EXPORT_NAME).write_text(content)
    found = look(tmp_path)
    assert found.padding == padding
    assert found.findings == ()
    assert [file.path for file in found.files] == [CONFIG_NAME, WEIGHTS_NAME, EXPORT_NAME]


def test_what_was_read_can_be_known_again(tmp_path: Path) -> None:
    files = look(make(tmp_path))
    assert files.directory == str(tmp_path)
    for record in files.files:
        assert record.identity == identity_of(record.path, (tmp_path / record.path).stat())


def test_a_pointer_is_named_where_pickles_are_refused(tmp_path: Path) -> None:
    pointer, _ = look(make_pickled(tmp_path, LFS)).findings
    assert pointer.check == "file-lfs-pointer"
    assert pointer.message.startswith(PICKLE_NAME)
    assert str(len(LFS)) in pointer.message.split()


def test_an_lfs_pointer_without_a_size(tmp_path: Path) -> None:
    only(look(make(tmp_path, weights=LFS.partition(b"size")[0])), "file-lfs-pointer")


WHOLE = weights(SHAPES)
ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
CORRUPT = {
    "empty": (b"", ""),
    "seven bytes": (WHOLE[:7], ""),
    "cut in the header": (WHOLE[:40], "truncated"),
    "cut in the data": (WHOLE[:-1], "256"),
    "one byte more": (WHOLE + b"\0", "256"),
    "absurd header": (b"\xff" * 64, "18,446,744,073,709,551,615"),
    "zeros": (bytes(64), "JSON"),
    "zip": (b"PK\x03\x04" + bytes(60), ""),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "Python"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "html": (b"<!DOCTYPE html><html>" + bytes(60), "HTML"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "not json": (pack(b"[1, 2"), "JSON"),
    "a list": (pack(b"[]"), "JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "UTF-8"),
    "nested": (pack(b'{"a":' * 50_000), ""),
    "twice": (pack(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(4)), "twice"),
    "unknown dtype": (pack(b'{"a":' + ENTRY.replace(b"F32", b"F31") + b"}", bytes(4)), ""),
    "wrong size": (pack(b'{"a":' + ENTRY.replace(b"[1]", b"[2]") + b"}", bytes(4)), ""),
    "overlap": (pack(b'{"a":' + ENTRY + b',"b":' + ENTRY + b"}", bytes(4)), "overlaps"),
    "hole": (pack(b'{"a":' + ENTRY.replace(b"[0,4]", b"[4,8]") + b"}", bytes(8)), ""),
    "negative": (pack(b'{"a":' + ENTRY.replace(b"[1]", b"[-1]") + b"}", bytes(4)), "unsigned"),
    "overflow": (pack(b'{"a":' + ENTRY.replace(b"[1]", b"[4294967296,4294967296]") + b"}", bytes(4)), ""),
    "fraction": (pack(b'{"a":' + ENTRY.replace(b"[1]", b"[1.0]") + b"}", bytes(4)), "unsigned"),
    "metadata": (pack(b'{"__metadata__":{"a":1}}'), "__metadata__"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_weights_are_named(case: str, tmp_path: Path) -> None:
    content, message = CORRUPT[case]
    finding = only(look(make(tmp_path, weights=content)), "file-corrupt")
    assert message in finding.message
    assert finding.message.startswith(WEIGHTS_NAME)
    assert finding.origin is Origin.FILE
    # The library cannot read it either, but for what is ambiguous, where it silently takes the last.
    assert accepts(tmp_path / WEIGHTS_NAME) is (case == "twice")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_or_a_directory_does_not_hang(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "pipe" in only(look(tmp_path), "file-corrupt").message
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "directory" in only(look(tmp_path), "file-corrupt").message


def test_an_unreadable_directory_is_no_verdict_on_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=os.strerror(errno.ENOENT)):
        look(tmp_path / "absent")


def make_pickled(directory: Path, content: bytes) -> Path:
    make(directory)
    (directory / WEIGHTS_NAME).unlink()
    (directory / PICKLE_NAME).write_bytes(content)
    return directory


def test_pickles_are_refused_here_and_on_the_hub(tmp_path: Path) -> None:
    make_pickled(tmp_path, b"\x80\x02}.")
    assert "allow-pickle" in only(look(tmp_path), "pickle-refused").hint
    (tmp_path / PICKLE_NAME).unlink()
    only(look(tmp_path, withheld=(PICKLE_NAME,)), "pickle-refused")


def test_the_tensors_of_an_allowed_pickle_are_known_with_torch(shelf: Shelf) -> None:
    without = preflight(str(shelf.adapter("pickled")), allow_pickle=True)
    assert (without.weights, without.tensors, without.findings) == (PICKLE_NAME, (), ())
    files = look(shelf.adapter("pickled"), allow_pickle=True)
    assert files.weights == PICKLE_NAME
    assert set(files.tensors) == set(look(shelf.adapter("plain")).tensors)
    assert [record.path for record in files.files] == [CONFIG_NAME, PICKLE_NAME]


def test_broken_pickles(shelf: Shelf, tmp_path: Path) -> None:
    whole = (shelf.adapter("pickled") / PICKLE_NAME).read_bytes()
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    foreign = (tmp_path / "foreign.zip").read_bytes()
    for number, (content, check) in enumerate(
        ((b"", "file-corrupt"), (whole[: len(whole) // 2], "file-corrupt"), (foreign, "file-corrupt"),
         (b"<html>", "file-corrupt"), (b"\x80junk", "file-corrupt"), (LFS, "file-lfs-pointer"))
    ):  # fmt: skip
        only(look(make_pickled(tmp_path / str(number), content), allow_pickle=True), check)


class ShrinkingFile(io.FileIO):
    """Which is cut off after it was measured: eight bytes are left."""

    def readinto(self, buffer: Any) -> int:
        left = max(0, 8 - self.tell())
        return super().readinto(memoryview(buffer)[:left])


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "file").write_bytes(WHOLE)
    size = int.from_bytes(WHOLE[:8], "little")
    with io.BufferedReader(ShrinkingFile(tmp_path / "file")) as file, pytest.raises(CorruptFileError) as raised:
        parse_file(file)
    assert re.findall(r"\d+", str(raised.value)) == ["0", str(size)]
    wording(raised.value)


def test_places_are_those_of_the_bytes(tmp_path: Path) -> None:
    """Tensors may follow each other in another order than their entries, and an empty one shares its place."""
    entries = {"b": ([1], 2, 6), "empty": ([0], 2, 2), "a": ([2], 0, 2)}
    header = {
        name: {"dtype": "F32" if name == "b" else "U8", "shape": shape, "data_offsets": [begin, end]}
        for name, (shape, begin, end) in entries.items()
    }
    (tmp_path / "file").write_bytes(pack(json.dumps(header).encode(), b"aabbbb"))
    content = (tmp_path / "file").read_bytes()
    with (tmp_path / "file").open("rb") as file:
        places = parse_places(file)
    assert {tensor.name: content[begin:end] for tensor, begin, end in places} == {
        "b": b"bbbb",
        "empty": b"",
        "a": b"aa",
    }


def test_a_header_longer_than_the_format_allows_is_refused(tmp_path: Path, wording: Wording) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(8 + MAX_HEADER_BYTES + 1)
    with (tmp_path / "file").open("rb") as file, pytest.raises(CorruptFileError) as raised:
        parse_file(file)
    wording(raised.value)


def test_two_files_are_found_among_any_number(tmp_path: Path) -> None:
    """Of ten thousand others not all are listed."""
    make(tmp_path)
    for number in range(10_001):
        (tmp_path / f"{number}").touch()
    assert look(tmp_path).findings == ()
    (tmp_path / WEIGHTS_NAME).unlink()
    assert re.search(r"\b9,\d{3}\b", only(look(tmp_path), "file-missing").message)


def test_a_base_is_not_known_where_the_config_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).symlink_to(CONFIG_NAME)
    assert base_of(str(tmp_path)) is None


def test_line_ends_that_were_converted(tmp_path: Path) -> None:
    whole = weights({LORA_A: [64, 64]})
    data = bytes(range(256)) * 64
    broken = (whole[: -len(data)] + data).replace(b"\n", b"\r\n")
    assert "CR" in only(look(make(tmp_path, weights=broken)), "file-corrupt").message.split()


def test_line_ends_stay_with_what_the_hint_says(tmp_path: Path) -> None:
    """git converts on checkout what it is told is text; with the hint's line in .gitattributes it leaves it alone."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True)

    make(tmp_path, weights=pack(json.dumps(NEWLINES).encode(), b"\n" * 128))
    sound = (tmp_path / WEIGHTS_NAME).read_bytes()
    git("init", "--quiet")
    git("add", ".")
    attributes = tmp_path / ".gitattributes"
    found = []
    for written in ("* text eol=crlf\n", f"* text eol=crlf\n{HINTED}\n"):
        attributes.write_text(written, encoding="utf-8")
        (tmp_path / WEIGHTS_NAME).unlink()
        git("checkout", "--quiet", "--", WEIGHTS_NAME)
        found.append(look(tmp_path))
    hint = only(found[0], "file-corrupt").hint
    assert f"`{HINTED}`" in hint
    assert not found[1].findings
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == sound


def test_files_that_are_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    assert "README.md" in only(look(tmp_path), "file-missing").message


# --- config-invalid ------------------------------------------------------------------------------------------------

INVALID = {
    "empty": (b"", ""),
    "not json": (b"{", "JSON"),
    "a list": (b"[]", "JSON"),
    "not utf-8": (b'{"peft_type": "\xff"}', "UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "JSON"),
    "lone surrogate": (b'{"peft_type": "\\ud800"}', "UTF-8"),
    "nan": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity"),
    "too large a number": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', ""),
    "twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', ""),
    "nested": (b'{"a":' * 50_000, ""),
    "long number": (b'{"r": ' + b"9" * 5000 + b"}", "64"),
    "huge": (b'{"a": "' + b"x" * 10_000_000 + b'"}', "10,000,000"),
    "no peft_type": ({"r": 4}, "peft_type"),
    "peft_type null": (CONFIG | {"peft_type": None}, "peft_type"),
    "peft_type a number": (CONFIG | {"peft_type": 1}, "LORA"),
    "r a word": (CONFIG | {"r": "four"}, ""),
    "r a flag": (CONFIG | {"r": True}, ""),
    "r a fraction": (CONFIG | {"r": 4.5}, ""),
    "r zero": (CONFIG | {"r": 0}, ""),
    "alpha a word": (CONFIG | {"lora_alpha": "16"}, ""),
    "alpha null": (CONFIG | {"lora_alpha": None}, ""),
    "targets a number": (CONFIG | {"target_modules": 1}, ""),
    "targets of numbers": (CONFIG | {"target_modules": [1]}, ""),
    "targets no regex": (CONFIG | {"target_modules": "*.q"}, ""),
    "bias unknown": (CONFIG | {"bias": "some"}, "lora_only"),
    "bias a flag": (CONFIG | {"bias": True}, ""),
    "dora a word": (CONFIG | {"use_dora": "yes"}, ""),
    "pattern a list": (CONFIG | {"rank_pattern": ["q"]}, ""),
    "pattern of words": (CONFIG | {"rank_pattern": {"q": "8"}}, ""),
    "alphas of words": (CONFIG | {"alpha_pattern": {"q": None}}, ""),
    "base a list": (CONFIG | {"base_model_name_or_path": ["a"]}, ""),
    "layers of words": (CONFIG | {"layers_to_transform": ["1"]}, ""),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_configs(case: str, tmp_path: Path) -> None:
    config, message = INVALID[case]
    finding = only(look(make(tmp_path, config)), "config-invalid")
    assert message in finding.message
    assert finding.origin is Origin.CONFIG
    assert len(finding.message) < 500


def test_only_the_first_two_thousand_expressions_are_compiled(tmp_path: Path) -> None:
    """The worker compiles all of them, within a time limit."""
    valid = {f"q{number}|": 4 for number in range(2_000)}
    first, last = ({"(": 4} | valid, valid | {"(": 4})
    only(look(make(tmp_path, CONFIG | {"rank_pattern": first})), "config-invalid")
    assert look(make(tmp_path, CONFIG | {"rank_pattern": last})).findings == ()


def test_every_problem_is_listed(tmp_path: Path) -> None:
    files = look(make(tmp_path, CONFIG | {"r": "x", "bias": 1, "use_dora": 2}))
    assert [finding.check for finding in files.findings] == ["config-invalid"] * 3


def test_control_characters_do_not_reach_the_message(tmp_path: Path) -> None:
    finding = only(look(make(tmp_path, CONFIG | {"target_modules": "*\x1b[31m\n::error::x"})), "config-invalid")
    assert finding.message.isprintable()


def test_a_rank_that_no_tensor_has(tmp_path: Path) -> None:
    finding = only(look(make(tmp_path, CONFIG | {"r": 16})), "config-invalid")
    assert {"16", "4"} <= set(re.findall(r"\d+", finding.message))
    assert finding.tensor == LORA_A


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        ({"r": 16, "rank_pattern": {"q": 4}}, SHAPES),
        ({"r": 2, "target_parameters": ["experts.w"]}, SHAPES),
        ({"r": 16}, SHAPES | {"base_model.model.k.lora_A.weight": [16, 8]}),
        ({"r": 16, "peft_type": "ADALORA"}, SHAPES),
        ({"r": 0, "rank_pattern": {"q": 4}}, SHAPES),
        ({"r": None}, SHAPES),
        ({"r": 4}, {"base_model.model.e.lora_embedding_A": [4, 99], "base_model.model.e.lora_embedding_B": [8, 4]}),
        ({"r": 4}, {"base_model.model.c.lora_A.weight": [4, 3, 3, 3]}),
        ({"megatron_config": {}}, SHAPES),
        ({"megatron_core": "elsewhere"}, SHAPES),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.llama"}}, SHAPES),
        ({"corda_config": {"a": 1}, "eva_config": {}, "loftq_config": {}, "of_tomorrow": [{}]}, SHAPES),
        ({"peft_type": "OF_TOMORROW"}, SHAPES),
    ],
)
def test_what_another_stage_decides_is_left_alone(
    config: dict[str, Any], shapes: dict[str, list[int]], tmp_path: Path
) -> None:
    assert look(make(tmp_path, CONFIG | config, shapes)).findings == ()


# --- config-unsafe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"megatron_config": {"x": 1}}, "'megatron.core'"),
        ({"megatron_config": {"x": 1}, "megatron_core": "megatron.evil"}, "'megatron.evil'"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "'evil'"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "transformers_modules"}}, "_modules"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": ["os"]}}, "auto_mapping"),
        ({"tokenizer_kwargs": [{"deep": {"trust_remote_code": True}}]}, "tokenizer_kwargs.0.deep.trust_remote_code"),
    ],
)  # fmt: skip
def test_configs_that_would_import_code(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    finding = only(look(make(tmp_path, CONFIG | config)), "config-unsafe")
    assert message in finding.message
    assert finding.origin is Origin.CONFIG


# --- tensors that are not whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{"format":"pt"}}'])
def test_a_file_without_tensors(header: bytes, tmp_path: Path) -> None:
    finding = only(look(make(tmp_path, weights=pack(header))), "keys-missing")
    assert "ZeRO-3" in finding.hint
    assert finding.origin is Origin.ADAPTER


@pytest.mark.parametrize("shape", [[0], [32], [0, 8]])
def test_shards_instead_of_tensors(shape: list[int], tmp_path: Path) -> None:
    finding = only(look(make(tmp_path, shapes={LORA_A: shape, LORA_B: shape})), "shape-mismatch")
    assert finding.tensor == LORA_A
    assert str(shape) in finding.message
    assert "ZeRO-3" in finding.hint


# --- the safetensors library as oracle -----------------------------------------------------------------------------


def accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            return file.keys() is not None
    except SafetensorError:
        return False


def reads(path: Path) -> bool:
    try:
        header_of(path)
    except CorruptFileError:
        return False
    return True


_SETTINGS = settings(
    max_examples=examples(400),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
_SMALL = st.integers(0, 3)
_NUMBER = st.one_of(_SMALL, st.sampled_from([-1, 4, 8, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, True, None, "1", [1]]))
_NAME = st.text(st.sampled_from('ab"\\\ud800é\x00_ '), max_size=3) | st.just("__metadata__")
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F31", None, 1]),
        "shape": st.lists(_NUMBER, max_size=3) | st.none(),
        "data_offsets": st.lists(_NUMBER, min_size=1, max_size=3),
    },
    optional={"more": _NUMBER},
)
_METADATA = st.dictionaries(_NAME, st.text(max_size=2) | _NUMBER, max_size=2) | st.none()


@_SETTINGS
@given(header=st.dictionaries(_NAME, _ENTRY | _METADATA, max_size=3), data=st.integers(0, 16), ascii_only=st.booleans())
def test_what_the_library_refuses_is_refused(
    header: dict[str, Any], data: int, ascii_only: bool, tmp_path: Path
) -> None:
    raw = json.dumps(header, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    (tmp_path / "file").write_bytes(pack(raw, bytes(data)))
    if reads(tmp_path / "file"):
        assert accepts(tmp_path / "file")


@_SETTINGS
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2), st.integers(0, 3)), min_size=1, max_size=3))
def test_a_damaged_file_is_never_accepted_if_the_library_refuses(
    edits: list[tuple[int, bytes, int]], tmp_path: Path
) -> None:
    content = weights(SHAPES)
    for place, insert, removed in edits:
        content = content[:place] + insert + content[place + removed :]
    (tmp_path / "file").write_bytes(content)
    if reads(tmp_path / "file"):
        assert accepts(tmp_path / "file")


@st.composite
def _sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Headers as a writer makes them: tensors side by side, in any order of names, sub-byte ones a whole byte."""
    header: dict[str, Any] = {}
    begin = 0
    for name in draw(st.lists(st.text(max_size=4).filter("__metadata__".__ne__), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=3)), *([4] if DTYPE_BITS[dtype] % 8 else [])]
        bits = DTYPE_BITS[dtype]
        for dim in shape:
            bits *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + bits // 8]}
        begin += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return dict(draw(st.permutations(list(header.items())))), begin


@_SETTINGS
@given(sound=_sound_headers(), padding=st.integers(0, 9))
def test_sound_files_are_accepted_as_the_library_does(
    sound: tuple[dict[str, Any], int], padding: int, tmp_path: Path
) -> None:
    header, size = sound
    path = tmp_path / "file"
    path.write_bytes(pack(json.dumps(header).encode() + b" " * padding, bytes(size)))
    assert accepts(path)
    described = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in header_of(path)}
    assert described == {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"}


# --- cost ----------------------------------------------------------------------------------------------------------


def test_a_thousand_small_adapters_take_seconds(tmp_path: Path) -> None:
    shapes = {f"base_model.model.layers.{n}.q.lora_{f}.weight": [4, 4] for n in range(48) for f in "AB"}
    make(tmp_path, shapes=shapes)
    begin = time.process_time()
    for _ in range(1000):
        look(tmp_path)
    assert time.process_time() - begin < 5


def test_importing_it_imports_no_torch() -> None:
    code = "import merge_gate.files.preflight, sys; print({'torch', 'peft', 'safetensors', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
