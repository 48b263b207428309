"""The files next to the weights: which are published, whose copy, and what is changed in config.json."""

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.companion_names import Companion, companion_kind
from merge_gate._internal.errors import NotPublishedError
from merge_gate.features.publish.companions import Chosen, Identities, companion_identities, companions_of, read_inputs
from merge_gate.features.publish.manifest import PublicationFacts
from merge_gate.records.files import BaseFiles, DeclaredQuantization, Snapshot, StoredTensor
from merge_gate.records.terms import PRESERVE, Finding, Severity
from tests.support import published, reports

Companions = tuple[Chosen, list[Finding]]
Shapes = Mapping[str, tuple[int, ...]]

SHAPES = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}
CONFIG = b'{\n  "vocab_size": 32,\n  "eos_token_id": 2,\n  "dtype": "float32"\n}\n'
TOKENIZER = {
    "tokenizer.json": json.dumps(
        {"added_tokens": [{"id": 2, "content": "</s>"}], "model": {"vocab": {"a": 0, "b": 1}}}
    ).encode(),
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
}


def made(place: Path, name: str, files: Mapping[str, bytes]) -> str:
    folder = place / name
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return str(folder)


def facts(
    base_shapes: Shapes = SHAPES,
    shapes: Shapes = SHAPES,
    *,
    dtype: str = PRESERVE,
    is_dequantized: bool = False,
    runs_code: bool = False,
) -> PublicationFacts:
    base, merged = (
        tuple(StoredTensor(name=name, dtype="F32", shape=shape) for name, shape in of_model.items())
        for of_model in (base_shapes, shapes)
    )
    made = published.facts(dtype=dtype, base_tensors=base, tensors=merged)
    declared = DeclaredQuantization(method="fp8", file="config.json") if is_dequantized else None
    files = BaseFiles(directory="/base", quantization=declared)
    return replace(
        made,
        entry=replace(made.entry, base=Snapshot(name="base", directory="/base", base_files=files)),
        config=replace(made.config, trust_remote_code=runs_code),
    )


def chosen_from(
    base: str, adapters: tuple[str, ...], model: PublicationFacts, seen: Identities | None = None
) -> Companions:
    return companions_of(base, read_inputs(base, adapters, model, seen or {}), model)


def chosen(
    tmp_path: Path,
    base: Mapping[str, bytes],
    adapter: Mapping[str, bytes] | None = None,
    *more: Mapping[str, bytes],
    **model: Any,
) -> Companions:
    base_directory = made(tmp_path, "base", {"config.json": CONFIG, "model.safetensors": b""} | dict(base))
    adapters = [
        made(tmp_path, f"adapter{n}", {"adapter_config.json": b"{}"} | dict(a))
        for n, a in enumerate([adapter or {}, *more])
    ]
    return chosen_from(base_directory, tuple(adapters), facts(**model))


def checks(companions: Companions) -> list[tuple[str, Severity]]:
    return [(finding.check, finding.severity) for finding in companions[1]]


# --- which files -----------------------------------------------------------------------------------------------------


ALLOWED = {
    Companion.CONFIG: ["config.json"],
    Companion.GENERATION: ["generation_config.json"],
    Companion.TOKENIZER: ["tokenizer.model", "sentencepiece.bpe.model", "entity_vocab.json", "qwen.tiktoken"],
    Companion.TEMPLATE: ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"],
    Companion.PROCESSOR: ["preprocessor_config.json", "video_preprocessor_config.json"],
    Companion.LICENSE: ["LICENSE", "LICENSE-MODEL.txt", "Notice.md"],
    None: [
        "modeling_x.py", "license.py", "optimizer.pt", "pytorch_model.bin", "sub/tokenizer.json", "README.md",
        "additional_chat_templates/../x.jinja", "tokenizer.json\n",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in ALLOWED.items() for name in names])
def test_the_allow_list(name: str, kind: Companion | None) -> None:
    assert companion_kind(name) is kind


def vocabulary_files() -> Iterator[str]:
    """The values of each `VOCAB_FILES_NAMES` in the source of transformers, which would take minutes to import."""
    spec = find_spec("transformers")
    assert spec.origin is not None
    for path in Path(spec.origin).parent.glob("models/*/tokenization_*.py"):
        text = path.read_text(encoding="utf-8")
        for names in re.findall(r"^VOCAB_FILES_NAMES = ({.*?})", text, re.MULTILINE | re.DOTALL):
            yield from ast.literal_eval(names).values()


def test_every_vocabulary_of_transformers_is_on_the_allow_list() -> None:
    is_file = re.compile(r"[\w.-]+\.(json|txt|model|spm|codes|bpe|tiktoken)", re.ASCII).fullmatch
    names = set(filter(is_file, vocabulary_files()))
    assert len(names) > 20
    assert [name for name in sorted(names) if companion_kind(name) is not Companion.TOKENIZER] == []


def test_files_are_copied_and_others_are_noted(tmp_path: Path) -> None:
    found = chosen(
        tmp_path,
        TOKENIZER | {"LICENSE": b"free", "modeling_x.py": b"import os", "original/x.pth": b"", ".gitattributes": b""},
        {"training_args.bin": b"x", "README.md": b"card"},
    )
    assert found[0] == {
        "config.json": ("base", CONFIG),
        "LICENSE": ("base", b"free"),
        **{name: ("base", data) for name, data in TOKENIZER.items()},
    }
    notes = [finding.message for finding in found[1]]
    assert checks(found) == [("published-files", Severity.NOTE)] * 2
    assert "modeling_x.py" in notes[0]
    assert "original/" in notes[0]
    assert "training_args.bin" in notes[1]


@pytest.mark.attempt("M7", "publish a model of sentence-transformers", "a note says what to copy")
def test_the_pooling_of_sentence_transformers_is_to_be_copied(tmp_path: Path) -> None:
    found = chosen(tmp_path, {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}, {"training_args.bin": b"x"})
    of_base, of_adapter = found[1]
    assert "modules.json" in of_base.hint
    assert "1_Pooling" in of_base.hint
    assert of_adapter.hint
    assert "modules.json" not in of_adapter.hint


def test_the_adapters_tokenizer_replaces_the_bases_as_a_whole(tmp_path: Path) -> None:
    base = TOKENIZER | {"merges.txt": b"a b", "chat_template.jinja": b"base", "preprocessor_config.json": b"{}"}
    own = {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}', "tokenizer_config.json": b'{"chat_template": "own"}'}
    found = chosen(tmp_path, base, own | {"config.json": b'{"vocab_size": 99}'})[0]
    assert {name: origin for name, (origin, _) in found.items()} == {
        "config.json": "base",
        "preprocessor_config.json": "base",
        "tokenizer.json": "adapter",
        "tokenizer_config.json": "adapter",
    }
    assert found["config.json"][1] == CONFIG


def test_the_license_of_the_base_stays_next_to_the_adapters(tmp_path: Path) -> None:
    found = chosen(tmp_path, {"LICENSE": b"base"}, {"LICENSE": b"adapter"})[0]
    assert found["LICENSE"] == ("base", b"base")
    assert found["adapter-LICENSE"] == ("adapter", b"adapter")


def test_a_combination_has_its_members_files_if_they_agree(tmp_path: Path) -> None:
    assert "tokenizer.json" in chosen(tmp_path / "a", {}, TOKENIZER, TOKENIZER)[0]
    assert "tokenizer.json" not in chosen(tmp_path / "b", {}, TOKENIZER, {})[0]


# --- hostile directories ---------------------------------------------------------------------------------------------


@pytest.mark.attempt("P06", "LICENSE, tokenizer, or template is a link to another place", "not published")
def test_a_link_leads_to_the_directory_or_the_hubs_cache_only(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_bytes(b"secret")
    base = made(tmp_path, "base", {"config.json": CONFIG, "model.safetensors": b"", "NOTICE": b"x"})
    adapter = made(tmp_path, "adapter", {"adapter_config.json": b"{}"})
    model = facts()
    Path(base, "LICENSE").symlink_to("NOTICE")
    assert chosen_from(base, (adapter,), model)[0]["LICENSE"] == ("base", b"x")
    made(tmp_path, "adapter/.git", {"config": b"secret"})
    for target in (str(secret), ".git/config", "adapter_config.json"):
        Path(adapter, "NOTICE").symlink_to(target)
        with pytest.raises(NotPublishedError, match="link"):
            chosen_from(base, (adapter,), model)
        Path(adapter, "NOTICE").unlink()
    cached = tmp_path / "hub" / "models--a--b"
    made(cached, "snapshots/0123", {"adapter_config.json": b"{}"})
    made(cached, "blobs", {"aa": b"{}"})
    (cached / "snapshots/0123/generation_config.json").symlink_to("../../blobs/aa")
    files = chosen_from(base, (str(cached / "snapshots/0123"),), model)[0]
    assert files["generation_config.json"] == ("adapter", b"{}")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        ("tokenizer.json", b'{"model"'),
        ("generation_config.json", b"[" * 100_000),
        ("generation_config.json", b"\xff\xfe"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(NotPublishedError):
        chosen(tmp_path, {name: data})


@pytest.mark.attempt("P07", "a pipe next to the weights", "not published, and no hang")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    base = made(tmp_path, "base", {"config.json": CONFIG, "model.safetensors": b""})
    os.mkfifo(f"{base}/LICENSE")
    with pytest.raises(NotPublishedError):
        chosen_from(base, (made(tmp_path, "adapter", {"x": b""}),), facts())


@pytest.mark.attempt("P16", "auto_map, nested and in the tokenizer", "removed")
def test_references_to_code_are_removed(tmp_path: Path) -> None:
    config = b'{"auto_map": {"AutoModel": "modeling_x.X"}, "vocab_size": 32}'
    found = chosen(tmp_path, {"config.json": config, "vocab.json": b'{"auto_map": 1}'})
    assert found[0]["config.json"][1] == b'{"vocab_size": 32}'
    assert found[0]["vocab.json"][1] == b'{"auto_map": 1}'
    escaped = chosen(tmp_path, {"config.json": config.replace(b"_map", b"\\u005fmap")})
    assert escaped[0]["config.json"][1] == b'{"vocab_size": 32}'
    assert ("published-files", Severity.NOTE) in checks(found)
    with pytest.raises(NotPublishedError, match="code"):
        chosen(tmp_path, {"config.json": config}, runs_code=True)


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_changed_config_is_written_as_it_was(tmp_path: Path, indent: int | str | None, is_ascii: bool) -> None:
    code = {"auto_map": {"AutoModel": "modeling_x.X"}, "x": {"y": [{"auto_map": 1}, 1e-05], "auto_map": 3}}
    own = {"b": [], "a": {"n": None, "é": 1.5, "big": 10**30}, "eps": 1e-05}
    before, after = (
        (json.dumps(content, indent=indent, ensure_ascii=is_ascii) + "\n").encode()
        for content in ({"vocab_size": 32} | code | own, {"vocab_size": 40, "x": {"y": [{"auto_map": 1}, 1e-05]}} | own)
    )
    found = chosen(tmp_path, {"config.json": before}, shapes=resized(40))
    assert found[0]["config.json"][1] == after


def resized(rows: int) -> dict[str, tuple[int, ...]]:
    return SHAPES | {"model.embed_tokens.weight": (rows, 8)}


def test_a_resized_vocabulary_changes_one_number(tmp_path: Path) -> None:
    found = chosen(tmp_path, {}, shapes=resized(40))[0]
    assert found["config.json"][1] == CONFIG.replace(b"32,", b"40,")
    nested = b'{"text_config": {"vocab_size": 32}, "audio_config": {"vocab_size": 5}}'
    found = chosen(tmp_path, {"config.json": nested}, shapes=resized(40))[0]
    assert found["config.json"][1] == nested.replace(b"32", b"40")


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (b'{"vocab_size": 31}', resized(40)),
        (b"{}", resized(40)),
        (b'{"vocab_size": 32, "decoder": {"vocab_size": 32}}', resized(40)),
        (b'{"vocab_size": 32}', SHAPES | {"model.norm.weight": (9,)}),
        (b'{"vocab_size": 32}', resized(40) | {"model.norm.weight": (9,)}),
        (b'{"vocab_size": 32}', SHAPES | {"model.embed_tokens.weight": (32, 9)}),
        (b'{"vocab_size": 32}', SHAPES | {"score.weight": (2, 8)}),
        (b"[]", SHAPES),
        (b"{", SHAPES),
    ],
)
def test_a_config_that_would_not_fit_the_tensors_is_refused(
    tmp_path: Path, config: bytes, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(NotPublishedError):
        chosen(tmp_path, {"config.json": config}, shapes=shapes)


def test_a_cast_changes_dtypes_and_dequantizing_the_quantization(tmp_path: Path) -> None:
    config = (
        b'{"dtype": "float32", "vision_config": {"torch_dtype": "float32"}, '
        b'"quantization_config": {"quant_method": "fp8", "dtype": "fp8"}}'
    )
    cast = chosen(tmp_path, {"config.json": config}, dtype="bfloat16")[0]["config.json"][1]
    assert json.loads(cast) == {
        "dtype": "bfloat16",
        "vision_config": {"torch_dtype": "bfloat16"},
        "quantization_config": {"quant_method": "fp8", "dtype": "fp8"},
    }
    unpacked = {"model.norm.weight": (8,)}
    dequantized = chosen(
        tmp_path,
        {"config.json": config},
        dtype="bfloat16",
        is_dequantized=True,
        base_shapes=unpacked,
        shapes=unpacked | {"q.weight": (8, 4)},
    )
    assert "quantization_config" not in json.loads(dequantized[0]["config.json"][1])


# --- stop tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "eos", "disagree"),
    [
        (2, None, "</s>", False),
        (2, 2, "</s>", False),
        (2, [2, 1], "</s>", False),
        ([1, 2], [2, 1], "</s>", False),
        (None, None, "</s>", False),
        (1, None, "</s>", True),
        (2, 1, "</s>", True),
        (2, 1, None, True),
        ([1, 2], 2, "</s>", True),
        (1, 1, "</s>", True),
        (1, 1, "<unknown>", False),
        ("2", [True, None], "</s>", False),
    ],
)
def test_the_three_places_of_the_stop_token(
    tmp_path: Path, config: Any, generation: Any, eos: str | None, disagree: bool
) -> None:
    files = dict(TOKENIZER)
    files["config.json"] = json.dumps({"eos_token_id": config}).encode()
    files["tokenizer_config.json"] = json.dumps({"eos_token": eos}).encode()
    if generation is not None:
        files["generation_config.json"] = json.dumps({"eos_token_id": generation}).encode()
    expected = [("stop-tokens", Severity.WARNING)] if disagree else []
    assert checks(chosen(tmp_path, files)) == expected


def test_the_id_of_the_stop_token_is_found_in_each_form(tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"tokenizer.json": {"added_tokens": [{"id": 7, "content": "<e>"}]}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.5], ["b", 0.5], *([["c", 0]] * 5), ["<e>", -1.0]]}}},
        {"vocab.json": {"<e>": 7}},
        {"added_tokens.json": {"<e>": 7}},
        {"tokenizer_config.json": {"eos_token": {"content": "<e>"}, "added_tokens_decoder": {"7": {"content": "<e>"}}}},
    ]
    for number, form in enumerate(forms):
        files = {
            "config.json": {"eos_token_id": 1, "vocab_size": 32},
            "tokenizer_config.json": {"eos_token": "<e>"},
        } | form
        found = chosen(tmp_path / str(number), {name: json.dumps(value).encode() for name, value in files.items()})
        assert checks(found) == [("stop-tokens", Severity.WARNING)], form
        assert "7" in found[1][0].message


def test_an_adapter_that_drops_stop_tokens_is_warned_of(tmp_path: Path) -> None:
    base = {"generation_config.json": b'{"eos_token_id": [2, 5]}'}
    found = chosen(tmp_path, base, {"generation_config.json": b'{"eos_token_id": 2}'})
    assert checks(found) == [("stop-tokens", Severity.WARNING)]


def test_a_tokenizer_larger_than_the_embedding_is_warned_of(tmp_path: Path) -> None:
    own = {"tokenizer.json": b'{"model": {"vocab": {"a": 0, "new": 32}}}', "tokenizer_config.json": b"{}"}
    assert checks(chosen(tmp_path, {}, own)) == [("tokenizer-size", Severity.WARNING)]
    assert checks(chosen(tmp_path, {}, own, shapes=resized(33))) == []


def test_a_base_that_is_quantized_at_its_load_is_stored_plain(tmp_path: Path) -> None:
    """Its stored tensors are compared like those of any plain base: a head that it does not have is refused."""
    base = made(tmp_path, "base", {"config.json": CONFIG, "model.safetensors": b""})
    adapter = made(tmp_path, "adapter", {"adapter_config.json": b"{}"})
    plain = StoredTensor(name="model.norm.weight", dtype="BF16", shape=(8,))
    head = StoredTensor(name="score.weight", dtype="BF16", shape=(2, 8))
    quantized = reports.adapter(base=replace(reports.BASE, quantization="bnb-4bit"))
    cast = published.facts(quantized, dtype="bfloat16", base_tensors=(plain,), tensors=(plain,))
    seen = {base: companion_identities(base)}
    assert [*chosen_from(base, (adapter,), cast, seen)[0]] == ["config.json"]
    with pytest.raises(NotPublishedError, match=r"score\.weight"):
        chosen_from(base, (adapter,), replace(cast, tensors=(plain, head)), seen)


# --- the same files as when the run began ----------------------------------------------------------------------------

SWAPS = {
    "written to": lambda file: file.write_bytes(file.read_bytes()),
    "replaced": lambda file: (file.rename(file.with_name("x")), file.write_bytes(Path(file.parent, "x").read_bytes())),
    "removed": lambda file: file.unlink(),
    "added": lambda file: file.with_name("added_tokens.json").write_bytes(b"{}"),
    "a link": lambda file: (file.rename(file.with_name("x.model")), file.symlink_to("x.model")),
}


@pytest.mark.attempt("F08b", "tokenizer of base or adapter is swapped during the run", "not published")
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_a_file_that_changed_during_the_run_is_not_published(tmp_path: Path, swap: str, owner: str) -> None:
    base = made(tmp_path, "base", {"model.safetensors": b"", "config.json": CONFIG, **TOKENIZER})
    adapter = made(tmp_path, "adapter", {"adapter_config.json": b"{}", **TOKENIZER})
    seen = {one: companion_identities(one) for one in (base, adapter)}
    model = facts()
    assert chosen_from(base, (adapter,), model, seen)[0]
    (tmp_path / owner / "a-log.txt").touch()  # no such file is published
    assert chosen_from(base, (adapter,), model, seen)[0]
    SWAPS[swap](tmp_path / owner / "tokenizer_config.json")
    with pytest.raises(NotPublishedError):
        chosen_from(base, (adapter,), model, seen)


def test_a_directory_that_cannot_be_listed_has_no_identities(tmp_path: Path) -> None:
    assert companion_identities(str(tmp_path / "absent")) == {}


@pytest.mark.attempt("X03b", "a generation_config.json of 257 MB", "not published, and never left out")
def test_a_file_that_is_too_large_is_not_left_out(tmp_path: Path) -> None:
    base = made(tmp_path, "base", {"model.safetensors": b"", "config.json": CONFIG, "generation_config.json": b"{}"})
    os.truncate(Path(base, "generation_config.json"), 257 * 1024 * 1024)
    with pytest.raises(NotPublishedError):
        chosen_from(base, (), facts())


@contextmanager
def few_frames(count: int) -> Iterator[None]:
    """Functions may be nested so much deeper than here."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + count)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.attempt("X05", "JSON nested deeper than Python functions may be", "not published, no crash")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_json_that_is_nested_deeply_is_refused(tmp_path: Path, name: str) -> None:
    """Since Python 3.12, the limit does not count what `json` nests, and it counts the gate's own functions."""
    base = made(tmp_path, "base", {"model.safetensors": b"", "config.json": CONFIG, **TOKENIZER})
    for depth, is_refused in ((1, False), (200, True), (100_000, True)):
        deep = b'{"vocab_size": 32, "x": ' + b'{"x":' * depth + b"1" + b"}" * depth + b"}"
        Path(base, name).write_bytes(deep)
        with few_frames(100), pytest.raises(NotPublishedError) if is_refused else nullcontext():
            chosen_from(base, (base,), facts())
