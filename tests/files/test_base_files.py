"""What a base's files say without torch: files that are loaded, contradictions, and formats that are refused."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_gate._internal.errors import ResolveError
from merge_gate.files.base_files import read_base
from merge_gate.files.base_formats import JUDGED, KNOWN_NAMES
from merge_gate.files.resolve import base_weight_files, resolve_base
from merge_gate.records.files import BaseFiles
from tests.support.files.base_directories import GPTQ, INDEX, LAYER, MODEL, PLAIN, Shape, index, lay, plus, safetensors
from tests.support.files.pickles import read_pickle
from tests.support.wording import Wording

INCOMPLETE, INCONSISTENT, FORMAT = "base-incomplete", "base-inconsistent", "base-format"
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
BNB_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BNB_8BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def read(directory: Path, files: Mapping[str, bytes], **config: Any) -> BaseFiles:
    return read_base(str(lay(directory, files, **config)), name="./base")


def of_tensors(directory: Path, tensors: Mapping[str, Shape], **config: Any) -> BaseFiles:
    return read(directory, {MODEL: safetensors(tensors)}, **config)


# --- which files are loaded ------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4400000000\n"
LYING = safetensors({"is truncated": ("F32", (1,))}).replace(b"F32", b"F33")
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}
FIRST, SECOND = list(PLAIN)[:2], list(PLAIN)[2:]
HALVES = [safetensors({name: PLAIN[name] for name in half}) for half in (FIRST, SECOND)]


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        ("part-a.safetensors", "part-b.safetensors"),
        ("weights/1/model.safetensors", "weights/2/model.safetensors"),
    ],
)
def test_the_index_names_the_shards_whatever_they_are_called(names: tuple[str, str], tmp_path: Path) -> None:
    listed = json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(FIRST, names[0]) | dict.fromkeys(SECOND, names[1])}
    )
    base = read(tmp_path, {INDEX: listed.encode(), **dict(zip(names, HALVES, strict=True))})
    assert base.weights == names
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in base.tensors} == PLAIN
    assert {tensor.file for tensor in base.tensors} == set(names)
    assert not base.findings
    assert not base.notes
    assert base_weight_files(str(tmp_path)) == (INDEX, *names)


def test_the_file_that_config_json_names_goes_before_all_others(tmp_path: Path) -> None:
    files = {MODEL: safetensors(plus(weight=None)), "all.safetensors": safetensors(PLAIN)}
    base = read(tmp_path, files, transformers_weights="all.safetensors")
    assert base.weights == ("all.safetensors",)
    assert len(base.tensors) == len(PLAIN)


def test_a_shard_that_is_a_link_into_a_cache_is_followed(tmp_path: Path, wording: Wording) -> None:
    blob = tmp_path / "blobs" / "0f"
    blob.parent.mkdir()
    blob.write_bytes(safetensors(PLAIN))
    snapshot = lay(tmp_path / "snapshots" / "c0ffee", {})
    (snapshot / MODEL).symlink_to("../../blobs/0f")
    assert len(read_base(str(snapshot), name="b").tensors) == len(PLAIN)
    blob.unlink()
    for target in ("../../blobs/0f", "../gone"):
        (snapshot / MODEL).unlink()
        (snapshot / MODEL).symlink_to(target)
        with wording.of(ResolveError) as raised:
            read_base(str(snapshot), name="b")
        assert raised.value.check == INCOMPLETE


CANNOT_BE_LOADED: dict[str, tuple[str | None, dict[str, bytes]]] = {
    "shard-absent": (INCOMPLETE, {INDEX: index(x__safetensors=FIRST)}),
    "shard-above": (INCONSISTENT, {INDEX: index(**{"../x__safetensors": FIRST})}),
    "shard-at-the-root": (INCONSISTENT, {INDEX: index(**{"/etc/x__safetensors": FIRST})}),
    "shard-of-another-kind": (INCONSISTENT, {INDEX: index(x__bin=FIRST), "x.bin": b"PK"}),
    "no-metadata": (INCONSISTENT, {INDEX: b'{"weight_map": {"a": "x"}}', "x.safetensors": HALVES[0]}),
    "index-nested": (INCONSISTENT, {INDEX: b"[" * 100_000}),
    "index-cut": (INCONSISTENT, {INDEX: b"{"}),
    "index-empty": (INCONSISTENT, {INDEX: b"{}"}),
    "index-of-numbers": (INCONSISTENT, {INDEX: b'{"weight_map": {"a": 1}}'}),
    "index-of-lists": (INCONSISTENT, {INDEX: b'{"metadata": {}, "weight_map": []}'}),
    "empty": (INCOMPLETE, {MODEL: b""}),
    "one-byte-less": (INCOMPLETE, {MODEL: safetensors(PLAIN)[:-1]}),
    "seven-bytes": (INCOMPLETE, {MODEL: safetensors(PLAIN)[:7]}),
    "half-a-header": (INCOMPLETE, {MODEL: safetensors(PLAIN)[:40]}),
    "one-byte-more": (INCONSISTENT, {MODEL: safetensors(PLAIN) + b"x"}),
    "a-name-that-lies": (INCONSISTENT, {MODEL: LYING}),
    "lfs": (INCOMPLETE, {MODEL: LFS}),
    "lfs-config": (INCOMPLETE, {MODEL: safetensors(PLAIN), "config.json": LFS}),
    "html": (INCONSISTENT, {MODEL: b"<!doctype html>"}),
    "config-cut": (INCONSISTENT, {MODEL: safetensors(PLAIN), "config.json": b"{"}),
    "config-nested": (INCONSISTENT, {MODEL: safetensors(PLAIN), "config.json": b"[" * 100_000}),
    "config-list": (INCONSISTENT, {MODEL: safetensors(PLAIN), "config.json": b"[]"}),
    "config-not-utf-8": (INCONSISTENT, {MODEL: safetensors(PLAIN), "config.json": b'"\xff"'}),
    "nothing": (INCOMPLETE, {}),
    "pickle": (None, {"pytorch_model.bin": b"PK"}),
    "adapter": (None, ADAPTER),
    "adapter-next-to-base": (None, ADAPTER | {MODEL: safetensors(PLAIN)}),
    "gguf": (FORMAT, {"model.gguf": b"GGUF"}),
    "diffusers": (FORMAT, {"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b""}),
    "sentence-transformers": (FORMAT, {"modules.json": b"[]", "0_Transformer/config.json": b"{}"}),
}
ODD_NAMES = ("./x__safetensors", "a//x__safetensors", "a/./x__safetensors", "a\\x__safetensors")


@pytest.mark.parametrize("case", CANNOT_BE_LOADED)
def test_files_that_cannot_be_loaded(case: str, tmp_path: Path, wording: Wording) -> None:
    check, files = CANNOT_BE_LOADED[case]
    with wording.of(ResolveError) as raised:
        resolve_base(str(lay(tmp_path, files)), label="./base")
    assert raised.value.check == check


@pytest.mark.attempt("P08", "shards named ./a, a//b, a/./b, or a\\b in the index", "base-inconsistent")
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_shard_has_one_name(name: str, tmp_path: Path, wording: Wording) -> None:
    files = {INDEX: index(**{name: FIRST}), "x.safetensors": HALVES[0], "a/x.safetensors": HALVES[0]}
    with wording.of(ResolveError) as raised:
        resolve_base(str(lay(tmp_path, files)), label="./base")
    assert raised.value.check == INCONSISTENT


def test_a_base_without_a_config(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / MODEL).write_bytes(safetensors(PLAIN))
    with wording.of(ResolveError):
        resolve_base(str(tmp_path), label="./base")


@pytest.mark.parametrize("content", [b"", bytes(64), b"PK\x03\x04" + bytes(60), b"\x80\x02cos\nis truncated\nq\x00."])
def test_a_pickled_file_that_torch_refuses_is_inconsistent(content: bytes, tmp_path: Path) -> None:
    directory = lay(tmp_path, {"pytorch_model.bin": content})
    with pytest.raises(ResolveError) as raised:
        read_base(str(directory), name="b", allow_pickle=True, read_pickle=read_pickle)
    assert raised.value.check == INCONSISTENT
    assert read_base(str(directory), name="b", allow_pickle=True).tensors == ()


def test_a_pickled_shard_is_listed_where_torch_is(tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "x.bin", "ghost": "x.bin"}}
    directory = lay(tmp_path, {"pytorch_model.bin.index.json": json.dumps(index).encode()})
    torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, directory / "x.bin")
    base = read_base(str(directory), name="b", allow_pickle=True, read_pickle=read_pickle)
    assert [(one.name, one.dtype, one.shape, one.file) for one in base.tensors] == [
        ("a", "F32", (2, 3), "x.bin"),
        ("b", "F32", (1,), "x.bin"),
    ]
    assert (base.ghosts, base.unlisted) == ((("ghost", "x.bin"),), ("b",))
    unread = read_base(str(directory), name="b", allow_pickle=True)
    assert (unread.tensors, unread.ghosts, unread.unlisted, unread.weights) == ((), (), (), ("x.bin",))


def test_a_million_entries_and_a_long_header_take_bounded_time(tmp_path: Path) -> None:
    listed = {f"layers.{number}.weight": "x.safetensors" for number in range(100_000)}
    files = {INDEX: json.dumps({"metadata": {}, "weight_map": listed}).encode(), "x.safetensors": safetensors(PLAIN)}
    start = time.monotonic()
    base = read(tmp_path, files)
    assert time.monotonic() - start < 60
    assert len(base.ghosts) == len(listed)
    assert len(base.notes[0].message) < 1000


# --- index and headers -----------------------------------------------------------------------------------------------


def test_ghosts_and_unlisted_tensors_are_notes(tmp_path: Path) -> None:
    base = read(tmp_path, {INDEX: index(x__safetensors=[*FIRST, "ghost"]), "x.safetensors": safetensors(PLAIN)})
    assert base.ghosts == (("ghost", "x.safetensors"),)
    assert not base.findings
    ghost, unlisted = base.notes
    assert "ghost" in ghost.message
    assert SECOND[0] in unlisted.message


def test_a_tensor_in_another_file_than_the_index_says_is_a_ghost(tmp_path: Path) -> None:
    shards = {"x.safetensors": HALVES[0], "y.safetensors": HALVES[1]}
    base = read(tmp_path, {INDEX: index(x__safetensors=SECOND, y__safetensors=FIRST), **shards})
    assert {*base.ghosts} == {(name, "y.safetensors") for name in FIRST} | {(name, "x.safetensors") for name in SECOND}
    assert base.unlisted == ()


def test_a_second_set_is_a_note(tmp_path: Path) -> None:
    half = {INDEX: index(x__safetensors=list(PLAIN)), "x.safetensors": safetensors(PLAIN), MODEL: HALVES[0]}
    base = read(tmp_path, half)
    assert base.weights == (MODEL,)
    assert INDEX in base.notes[0].message
    assert "x.safetensors" in base.notes[0].message


@pytest.mark.parametrize("fill", [b"\0", b"\1"])
def test_one_name_in_two_shards(fill: bytes, tmp_path: Path) -> None:
    files = {INDEX: index(a__safetensors=FIRST, b__safetensors=SECOND), "a.safetensors": HALVES[0]}
    again = {name: PLAIN[name] for name in (FIRST[1], *SECOND)}
    base = read(tmp_path, files | {"b.safetensors": safetensors(again, fill)})
    found, other = (base.notes, base.findings) if fill == b"\0" else (base.findings, base.notes)
    assert [(one.check, one.tensor) for one in found if "unlisted" not in one.message] == [(INCONSISTENT, FIRST[1])]
    assert "a.safetensors" in found[0].message or fill == b"\0"
    assert not other


def test_tied_in_the_config_and_different_in_the_file(tmp_path: Path) -> None:
    files = {INDEX: index(a__safetensors=FIRST, b__safetensors=SECOND), "a.safetensors": HALVES[0]}
    for fill, notes in ((b"\0", 0), (b"\1", 1)):
        second = safetensors({name: PLAIN[name] for name in SECOND}, fill)
        base = read(tmp_path, files | {"b.safetensors": second}, tie_word_embeddings=True)
        assert [note.tensor for note in base.notes] == ["lm_head.weight"] * notes
        assert not base.findings


# --- formats ---------------------------------------------------------------------------------------------------------

F8, SCALES = ("F8_E4M3", (8, 4)), ("F32", (2, 1))
STATE = {"weight": ("U8", (16, 1)), "weight__absmax": ("F32", (1,)), "weight__quant_map": ("F32", (16,)),
         "weight__quant_state__bitsandbytes__nf4": ("U8", (99,))}  # fmt: skip
NESTED = STATE | {"weight__absmax": ("U8", (1,)), "weight__nested_absmax": ("F32", (1,)),
                  "weight__nested_quant_map": ("F32", (256,))}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "GPTQ": (GPTQ, {}, FORMAT, "GPTQ"),
    "AWQ": ({name: part for name, part in GPTQ.items() if name != "g_idx"}, {}, FORMAT, "AWQ"),
    "EXL2": ({"weight": None, "q_weight": ("I32", (1, 8))}, {}, FORMAT, "EXL2"),
    "EXL3": ({"weight": None, "trellis": ("I16", (1, 1, 8))}, {}, FORMAT, "EXL3"),
    "quanto": ({"weight": None, "weight___data": ("I8", (8, 4))}, {}, FORMAT, "quanto"),
    "HQQ": ({"weight": None, "W_q": ("U8", (8, 4))}, {}, FORMAT, "HQQ"),
    "W4A16": ({"weight": None, "weight_packed": ("I32", (8, 1))}, {}, FORMAT, "compressed-tensors"),
    "torchao": ({"weight": None, "_weight_qdata": ("I8", (8, 4))}, {}, FORMAT, "torchao"),
    "FP8 blocks": ({"weight": F8, "weight_scale_inv": SCALES}, {}, INCONSISTENT, "weight_scale_inv"),
    "FP8": ({"weight": F8, "weight_scale": ("F32", ())}, {}, INCONSISTENT, "weight_scale"),
    "bnb-8bit": ({"weight": ("I8", (8, 4)), "SCB": ("F32", (8,))}, {}, INCONSISTENT, "SCB"),
    "bnb-4bit": (STATE, {}, INCONSISTENT, "absmax"),
    "MXFP4": ({"weight_blocks": ("U8", (1, 8, 1, 16)), "weight_scales": ("U8", (1, 8, 1))}, {}, INCONSISTENT, "MXFP4"),
    "int8": ({"weight": ("I8", (8, 4))}, {}, INCONSISTENT, "int8"),
    "bool": ({"weight": ("BOOL", (8, 4))}, {}, INCONSISTENT, "bool"),
    "wrapped": ({"weight": None, "base_layer__weight": ("BF16", (8, 4))}, {}, INCONSISTENT, "base_layer"),
    "the old key": (
        {"weight": F8, "weight_scale": ("BF16", (8, 1))},
        {"compression_config": {"format": "float-quantized"}}, FORMAT, "compression_config",
    ),
    "AutoFP8": ({"weight": F8, "weight_scale": ("F32", ())}, {"quantization_config": FP8}, INCONSISTENT, "AutoFP8"),
    "FP8 without a scale": ({"weight": F8}, {"quantization_config": FP8}, INCONSISTENT, "scale"),
    "FP8 in part of a block": (
        {"weight": ("F8_E4M3", (6, 4)), "weight_scale_inv": SCALES}, {"quantization_config": FP8},
        INCONSISTENT, "block",
    ),
    "FP8 that is not divisible": (
        {"weight": ("F8_E4M3", (9, 4)), "weight_scale_inv": SCALES}, {"quantization_config": FP8},
        INCONSISTENT, "9 rows",
    ),
    "bnb-4bit without absmax": (
        STATE | {"weight__absmax": None}, {"quantization_config": BNB_4BIT}, INCONSISTENT, "weight.absmax",
    ),
    "bnb-4bit without nested_absmax": (
        NESTED | {"weight__nested_absmax": None}, {"quantization_config": BNB_4BIT}, INCONSISTENT, "nested_absmax",
    ),
    "bnb-8bit without SCB": ({"weight": ("I8", (8, 4))}, {"quantization_config": BNB_8BIT}, INCONSISTENT, "SCB"),
    "bnb of no bits": (STATE, {"quantization_config": {"quant_method": "bitsandbytes"}}, INCONSISTENT, "load_in_4bit"),
    "MXFP4 without scales": (
        {"weight_blocks": ("U8", (1, 8, 1, 16))}, {"quantization_config": {"quant_method": "mxfp4"}},
        INCONSISTENT, "weight_scales",
    ),
    "no method": ({}, {"quantization_config": {}}, INCONSISTENT, "quant_method"),
    "an unknown method": ({}, {"quantization_config": {"quant_method": "tomorrow"}}, FORMAT, "tomorrow"),
    "ModelOpt": (
        {"weight": F8, "weight_scale": ("F32", ())},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, FORMAT, "ModelOpt",
    ),
    "fbgemm": (
        {"weight": F8, "weight_scale": ("F32", (8, 1))}, {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        FORMAT, "fbgemm",
    ),
    "GPTQ, declared": (GPTQ, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, FORMAT, "GPTQ"),
    "in the text's config": (
        GPTQ, {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, FORMAT, "GPTQ",
    ),
    "FP8 over plain weights": ({}, {"quantization_config": FP8}, INCONSISTENT, "plain"),
    "bnb-4bit over plain weights": ({}, {"quantization_config": BNB_4BIT}, INCONSISTENT, "plain"),
    "GPTQ over plain weights": ({}, {"quantization_config": {"quant_method": "gptq"}}, INCONSISTENT, "plain"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_format_that_is_refused(case: str, tmp_path: Path) -> None:
    parts, config, check, noun = REFUSED[case]
    finding, *_ = of_tensors(tmp_path, plus(**parts), **config).findings
    assert finding.check == check
    assert finding.origin == "base"
    assert noun in finding.message
    assert "./base" in finding.message
    assert "unquantized" in finding.hint or case == "wrapped" or "quantization_config" in finding.hint


GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "infinity in the config, as of state-space models": ({}, {"time_step_limit": [0.0, math.inf]}),
    "float64": ({"weight": ("F64", (8, 4))}, {}),
    "scales of the KV cache": ({"k_scale": ("F32", ()), "v_scale": ("F32", ()), "kv_scale": ("F32", (1,))}, {}),
    "scales of activations": ({"input_scale": ("F32", ()), "output_scale": ("F32", ())}, {}),
    "a scale that belongs to no codes": ({"weight_scale": ("BF16", (8, 1)), "scale": ("F32", (4,))}, {}),
    "buffers of integers": ({"position_ids": ("I64", (1, 8)), "num_batches_tracked": ("I64", ())}, {}),
    "FP8 without any scale": ({"weight": F8}, {}),
    "FP8 blocks": ({"weight": F8, "weight_scale_inv": SCALES}, {"quantization_config": FP8}),
    "FP8, a block larger than the weight": (
        {"weight": ("F8_E4M3", (3, 4)), "weight_scale_inv": ("F32", (1, 1))}, {"quantization_config": FP8},
    ),
    "FP8, one scale": ({"weight": F8, "weight_scale_inv": ("F32", ())}, {"quantization_config": FP8}),
    "FP8, one scale a row": ({"weight": F8, "weight_scale_inv": ("F32", (8, 1))}, {"quantization_config": FP8}),
    "FP8 as DeepSeek-V4 names its scales": ({"weight": F8, "scale": SCALES}, {"quantization_config": FP8}),
    "FP8 as Mistral names its scales": ({"weight": F8, "qscale_weight": ("F32", ())}, {"quantization_config": FP8}),
    "FP8 that leaves a module alone": (
        {"weight": F8, "other__weight": F8, "other__weight_scale_inv": SCALES},
        {"quantization_config": FP8 | {"modules_to_not_convert": [LAYER]}},
    ),
    "bnb-4bit": (STATE, {"quantization_config": BNB_4BIT}),
    "bnb-4bit, nested": (NESTED, {"quantization_config": BNB_4BIT}),
    "bnb-8bit": ({"weight": ("I8", (8, 4)), "SCB": ("F32", (8,))}, {"quantization_config": BNB_8BIT}),
    "MXFP4": (
        {"weight_blocks": ("U8", (1, 8, 1, 16)), "weight_scales": ("U8", (1, 8, 1))},
        {"quantization_config": {"quant_method": "mxfp4"}},
    ),
    "no quantization, written out": ({}, {"quantization_config": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_a_format_that_is_judged(case: str, tmp_path: Path) -> None:
    parts, config = GOOD[case]
    base = of_tensors(tmp_path, plus(**parts), **config)
    assert not base.findings
    assert not base.notes


@pytest.mark.parametrize("head", ["mtp.layers.0.fc.weight", "model.layers.1.eh_proj.weight"])
def test_a_head_that_predicts_several_tokens_is_not_of_the_model(head: str, tmp_path: Path) -> None:
    tensors = PLAIN | {head: F8, f"{head}_scale_inv": SCALES}
    assert not of_tensors(tmp_path, tensors, num_hidden_layers=1).findings
    assert of_tensors(tmp_path, tensors, num_hidden_layers=2).findings or head.startswith("mtp")


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32}, "gptq"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "modelopt"),
        ("quanto_qmap.json", {}, "quanto"),
    ],
)
def test_a_declaration_that_transformers_does_not_read(file, content, method, tmp_path) -> None:
    parts = {"gptq": GPTQ, "modelopt": {"weight": F8, "weight_scale": ("F32", ())}, "quanto": REFUSED["quanto"][0]}
    declared = {file: json.dumps(content).encode()}
    base = read(tmp_path, declared | {MODEL: safetensors(plus(**parts[method]))})
    assert (base.quantization.method, base.quantization.file, base.quantization.is_read) == (method, file, False)
    assert [finding.check for finding in base.findings] == [FORMAT]
    assert file in base.findings[0].message
    assert not read(tmp_path / "plain", declared | {MODEL: safetensors(PLAIN)}).findings


def test_the_remedy_names_the_base_that_the_model_card_names(tmp_path: Path) -> None:
    card = b"---\nlicense: mit\nbase_model:\n- acme/llama\n---\n# Llama\n"
    base = read(tmp_path, {MODEL: safetensors(plus(**GPTQ)), "README.md": card})
    assert "acme/llama" in base.findings[0].hint


def test_what_a_declaration_says_is_kept(tmp_path: Path) -> None:
    declared = FP8 | {"modules_to_not_convert": ["lm_head"], "fmt": "e4m3"}
    found = of_tensors(tmp_path, PLAIN, quantization_config=declared).quantization
    assert (found.method, found.format, found.block_size, found.ignored) == ("fp8", "e4m3", (4, 4), ("lm_head",))


@pytest.mark.parametrize("value", [[], {"bits": "four"}, {"quant_method": 7}, {"weight_block_size": "x"}, "gptq", 4])
def test_a_hostile_declaration_does_not_raise(value: Any, tmp_path: Path) -> None:
    of_tensors(tmp_path, plus(**STATE), quantization_config=value, text_config=value, compression_config=value)


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        ({"torch_dtype": "fp16"}, True),
        ({"dtype": "auto"}, True),
        ({"dtype": 16}, True),
        ({"torch_dtype": "float16"}, False),
        ({"dtype": "bfloat16", "torch_dtype": "fp16"}, False),
        ({"dtype": None}, False),
        ({}, False),
    ],
)
def test_a_dtype_that_torch_does_not_know(config: dict[str, Any], is_refused: bool, tmp_path: Path) -> None:
    base = of_tensors(tmp_path, PLAIN, **config)
    assert not base.findings, "an adapter may be judged in a dtype that the gate's config names"
    assert (base.auto_dtype is not None) == is_refused
    if base.auto_dtype is not None:
        assert base.auto_dtype.check == INCONSISTENT
        assert "float16" in base.auto_dtype.message


def test_the_methods_are_those_of_transformers() -> None:
    """A method that transformers does not know would be skipped, and its codes used as weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # noqa: PLC0415 - it imports torch

    assert JUDGED <= set(AUTO_QUANTIZATION_CONFIG_MAPPING) <= set(KNOWN_NAMES)


def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="'b'"):
        read_base(str(tmp_path / "gone"), name="b")
