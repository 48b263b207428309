"""What an adapter's files say without torch: every check, healthy variants, the safetensors library as oracle."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from merge_gate._internal.errors import EngineError
from merge_gate.files.adapter_config import MAX_BYTES
from merge_gate.files.headers import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    CorruptFileError,
    open_regular,
    parse_file,
    parse_places,
)
from merge_gate.files.identity import identity_of
from merge_gate.files.preflight import preflight
from merge_gate.records.files import EXPORT_NAME, AdapterFiles, StoredTensor
from merge_gate.records.terms import Finding
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
from tests.support.models import VARIANTS, Shelf
from tests.support.properties import examples
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
        assert record.identity == identity_of(record.path, (tmp_path / record.path).stat()), "it can be known again"
    assert [record.path for record in files.files] == [CONFIG_NAME, WEIGHTS_NAME]
    assert files.directory == str(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_torch_pickles_is_read_as_safetensors_are(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    if variant == "pickled":  # it has no other weights
        found = look(shelf.adapter(variant), allow_pickle=True)
        assert found.tensors
        assert found.findings == ()
        return
    shutil.copytree(shelf.adapter(variant), tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / WEIGHTS_NAME), tmp_path / "pickled" / PICKLE_NAME)
    (tmp_path / "pickled" / WEIGHTS_NAME).unlink()
    found, safe = look(tmp_path / "pickled", allow_pickle=True), look(shelf.adapter(variant))
    assert found.findings == safe.findings == ()
    assert set(found.tensors) == set(safe.tensors)


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


def test_a_file_of_the_hub_further_down_is_not_what_lies_here(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    message = only(look(tmp_path, withheld=("further/down.bin", "here.bin")), "file-missing").message
    assert "here.bin" in message
    assert "down.bin" not in message


def test_an_adapter_of_the_hub_in_folders_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    finding = only(look(tmp_path, withheld=("runs/german/adapter_config.json",)), "file-missing")
    assert "'runs/german'" in finding.hint


# --- file-lfs-pointer, file-corrupt, pickle-refused ----------------------------------------------------------------


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


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_or_a_directory_does_not_hang(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "pipe" in only(look(tmp_path), "file-corrupt").message
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "directory" in only(look(tmp_path), "file-corrupt").message


def test_the_tensors_of_an_allowed_pickle_are_known_with_torch(shelf: Shelf) -> None:
    without = preflight(str(shelf.adapter("pickled")), allow_pickle=True)
    assert (without.weights, without.tensors, without.findings) == (PICKLE_NAME, (), ())
    files = look(shelf.adapter("pickled"), allow_pickle=True)
    assert files.weights == PICKLE_NAME
    assert set(files.tensors) == set(look(shelf.adapter("plain")).tensors)
    assert [record.path for record in files.files] == [CONFIG_NAME, PICKLE_NAME]


SOUND = weights(SHAPES)


class ShrinkingFile(io.FileIO):
    """Which is cut off after it was measured: eight bytes are left."""

    def readinto(self, buffer: Any) -> int:
        left = max(0, 8 - self.tell())
        return super().readinto(memoryview(buffer)[:left])


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "file").write_bytes(SOUND)
    size = int.from_bytes(SOUND[:8], "little")
    with io.BufferedReader(ShrinkingFile(tmp_path / "file")) as file, wording.of(CorruptFileError) as raised:
        parse_file(file)
    assert re.findall(r"\d+", str(raised.value)) == ["0", str(size)]


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
    with (tmp_path / "file").open("rb") as file, wording.of(CorruptFileError):
        parse_file(file)


def test_two_files_are_found_among_any_number(tmp_path: Path) -> None:
    """Of ten thousand others not all are listed."""
    make(tmp_path)
    for number in range(10_001):
        (tmp_path / f"{number}").touch()
    assert look(tmp_path).findings == ()
    (tmp_path / WEIGHTS_NAME).unlink()
    assert re.search(r"\b9,\d{3}\b", only(look(tmp_path), "file-missing").message)


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


def test_only_the_first_two_thousand_expressions_are_compiled(tmp_path: Path) -> None:
    """The worker compiles all of them, within a time limit."""
    valid = {f"q{number}|": 4 for number in range(2_000)}
    first, last = ({"(": 4} | valid, valid | {"(": 4})
    only(look(make(tmp_path, CONFIG | {"rank_pattern": first})), "config-invalid")
    assert look(make(tmp_path, CONFIG | {"rank_pattern": last})).findings == ()


# --- the safetensors library as oracle -----------------------------------------------------------------------------


def accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            return file.keys() is not None
    except SafetensorError:
        return False


def header_of(path: Path) -> tuple[StoredTensor, ...]:
    with open_regular(str(path)) as file:
        return parse_file(file)


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
def test_what_the_library_refuses_is_refused(header, data, ascii_only, tmp_path) -> None:
    raw = json.dumps(header, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    (tmp_path / "file").write_bytes(pack(raw, bytes(data)))
    if reads(tmp_path / "file"):
        assert accepts(tmp_path / "file")


@_SETTINGS
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2), st.integers(0, 3)), min_size=1, max_size=3))
def test_a_damaged_file_is_never_accepted_if_the_library_refuses(edits, tmp_path) -> None:
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
def test_sound_files_are_accepted_as_the_library_does(sound, padding, tmp_path) -> None:
    header, size = sound
    path = tmp_path / "file"
    path.write_bytes(pack(json.dumps(header).encode() + b" " * padding, bytes(size)))
    assert accepts(path)
    described = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in header_of(path)}
    assert described == {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"}


def test_a_pickle_on_the_hub_is_refused_too(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    only(look(tmp_path, withheld=(PICKLE_NAME,)), "pickle-refused")
