"""The messages about an adapter's files: `messages.txt` is what people read, so look at each change of it.

UPDATE_GOLDENS=1 writes it again.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from merge_gate._internal.errors import EngineError
from merge_gate.files.preflight import base_of, preflight
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
    pack,
    weights,
)
from tests.support.files.pickles import packed, read_pickle
from tests.support.wording import Wording, hold_in_order

GOLDEN = Path(__file__).with_name("messages.txt")
SOUND = {CONFIG_NAME: json.dumps(CONFIG).encode(), WEIGHTS_NAME: weights(SHAPES)}
REFUSED = ("a pickle", "a pointer in place of a pickle that is not allowed")
Files = dict[str, bytes]


def without(*names: str, **more: bytes) -> Files:
    return {name: data for name, data in SOUND.items() if name not in names} | more


def config(**changes: Any) -> Files:
    """The sound config with other values; `...` takes a key away."""
    changed = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return SOUND | {CONFIG_NAME: json.dumps(changed).encode()}


def raw_config(text: str | bytes) -> Files:
    return SOUND | {CONFIG_NAME: text if isinstance(text, bytes) else text.encode()}


def shapes(**of: list[int]) -> Files:
    return SOUND | {WEIGHTS_NAME: weights({name.replace("__", "."): shape for name, shape in of.items()})}


def header(text: str | bytes, data: bytes = b"") -> Files:
    return SOUND | {WEIGHTS_NAME: pack(text if isinstance(text, bytes) else text.encode(), data)}


def one(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16), **more: Any) -> str:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more})


def pickled(data: bytes) -> Files:
    return without(WEIGHTS_NAME) | {PICKLE_NAME: data}


A, B = '"a": {"dtype": "F16", "shape": [4], "data_offsets": ', '"b": {"dtype": "F16", "shape": [4], "data_offsets": '

SITUATIONS: dict[str, Files] = {
    "sound": SOUND,
    "nothing": {},
    "a readme": {"README.md": b""},
    "no config": without(CONFIG_NAME),
    "no weights": without(WEIGHTS_NAME),
    "many files and no weights": without(WEIGHTS_NAME) | {f"f{number}": b"" for number in range(12)},
    "a checkpoint further down": {
        f"checkpoint-{number}/{CONFIG_NAME}": b"{}" for number in (9, 100, 20)
    } | {f"last/{CONFIG_NAME}": b"{}"},
    "a first checkpoint and one without a number": {
        f"checkpoint-0/{CONFIG_NAME}": b"{}",
        f"final/{CONFIG_NAME}": b"{}",
    },
    "runs with checkpoints": {
        **{f"run-{run}/checkpoint-{number}/{CONFIG_NAME}": b"{}" for run in (1, 2) for number in (10, 20)},
        "run-3/checkpoint-30/README.md": b"",
        "run-4": b"",
    },
    "one adapter further down": {f"final/{CONFIG_NAME}": b"{}"},
    "two adapters further down": {f"{name}/{CONFIG_NAME}": b"{}" for name in ("first", "second")},
    "ten adapters further down": {f"{name}/{CONFIG_NAME}": b"{}" for name in "abcdefghij"},
    "weights of another name": without(WEIGHTS_NAME) | {"weights.safetensors": SOUND[WEIGHTS_NAME]},
    "an adapter's weights under a model's name": without(WEIGHTS_NAME) | {"model.safetensors": SOUND[WEIGHTS_NAME]},
    "diffusers": {"pytorch_lora_weights.safetensors": b""},
    "MLX": {CONFIG_NAME: b"{}", "adapters.npz": b""},
    "GGUF": {"a.gguf": b""},
    "the adapters library": {"pytorch_adapter.bin": b"", "head_config.json": b""},
    "renamed by a browser": {"adapter_config (1).json": b"", "x.safetensors": b""},
    "sharded": {CONFIG_NAME: SOUND[CONFIG_NAME], "adapter_model-00001-of-00002.safetensors": b""},
    "a full model": {"model-00001-of-00002.safetensors": b"", "config.json": b""},
    "kohya": {"my-style.safetensors": b""},
    "a pickle": pickled(packed(b"\x80\x02}.")),
    "a pointer in place of a pickle that is not allowed": pickled(LFS),
    "a pointer for a config": raw_config(LFS),
    "a pointer for weights": SOUND | {WEIGHTS_NAME: LFS},
    "a pointer that has lost its size": SOUND | {WEIGHTS_NAME: LFS.partition(b"size")[0]},
    "an empty config": raw_config(""),
    "a config without end": raw_config(b" " * 10_000_001),
    "a config in Latin-1": raw_config('{"a": "é"}'.encode("latin-1")),
    "a config with half a character": raw_config('{"a": "\\ud800"}'),
    "a config nested without end": raw_config("[" * 100_000),
    "a config that is cut off": raw_config('{"a": '),
    "a config that is a list": raw_config("[]"),
    "a config with a byte order mark": raw_config(b"\xef\xbb\xbf{}"),
    "a config that is null": raw_config("null"),
    "a config that is a text": raw_config('"x"'),
    "a config that is a number": raw_config("7"),
    "a config that is true": raw_config("true"),
    "a key twice": raw_config('{"r": 4, "r": 8}'),
    "a bare NaN": raw_config('{"r": NaN}'),
    "an integer of 5,000 digits": raw_config('{"r": ' + "9" * 5000 + "}"),
    "a number out of range": raw_config('{"lora_alpha": 1e999}'),
    "no type": config(peft_type=...),
    "a type of null": config(peft_type=None),
    "a type that is no text": config(peft_type=7),
    "a type that is empty": config(peft_type=""),
    "a type of tomorrow": config(peft_type="TOMORROW", r=0),
    "every value of a wrong kind": config(
        task_type=1, base_model_name_or_path=[], revision=1, bias=True, megatron_core=1, r=4.5, lora_alpha="8",
        lora_dropout=True, target_modules=1, exclude_modules=[1], modules_to_save={}, layers_pattern=1,
        target_parameters="x", layers_to_transform=[True], rank_pattern=[], alpha_pattern=1, auto_mapping="x",
        trainable_token_indices={"e": [1, True]}, fan_in_fan_out=1, inference_mode="yes", lora_bias=0, use_dora="x",
        use_rslora=[],
    ),
    "every value in another right kind": config(
        task_type=None, bias="all", r=4, lora_alpha=8.5, lora_dropout=0, target_modules="q", exclude_modules="v",
        modules_to_save=["s"], layers_pattern=["h"], target_parameters=["x"], layers_to_transform=[0, 1],
        rank_pattern={"q": 4}, alpha_pattern={"q": 4.5}, auto_mapping={}, fan_in_fan_out=False, inference_mode=True,
        trainable_token_indices={"e": [1, 2]},
    ),
    "flags, texts and lists in place of another kind": config(
        r=True, lora_alpha="16", rank_pattern=["q"], base_model_name_or_path=["a"], target_modules="*.q", bias=True,
        layers_to_transform=["1"], exclude_modules=[1], use_dora="yes",
    ),
    "a rank of null": config(r=None),
    "settings of other stages, and of tomorrow": config(
        megatron_config={}, megatron_core="elsewhere", corda_config={"a": 1}, eva_config={}, loftq_config={},
        of_tomorrow=[{}],
    ),
    "one layer": config(layers_to_transform=3),
    "a rank of nothing": config(r=0),
    "a rank of nothing, and ranks of their own": config(r=0, rank_pattern={"q": 4}),
    "an alpha of null": config(lora_alpha=None),
    "a rank of one": config(r=1),
    "a bias of its own": config(bias="some"),
    "ranks and alphas that are none": config(
        rank_pattern={"a": 0, "b": True, "c": "4", "d": 1}, alpha_pattern={"a": "x", "b": False, "c": 0}
    ),
    "integers beyond 64 bits": config(
        lora_alpha=10**30, r=2**63, more={"deep": [-(2**63) - 1, -(2**63), 2**63 - 1]}
    ),
    "expressions": config(target_modules="q(", rank_pattern={"(a": 4}, layers_pattern=["h["]),
    "more expressions": config(exclude_modules="[a-", alpha_pattern={"+q": 8}),
    "numbers that nothing holds": config(lora_alpha=10**400, r=10**400, lora_dropout=10**400),
    "megatron": config(megatron_config={"a": 1}, megatron_core="evil.core"),
    "megatron by its default": config(megatron_config={"a": 1}),
    "a library of somebody": config(auto_mapping={"parent_library": "evil", "base_model_class": "X"}),
    "a library that begins like one": config(auto_mapping={"parent_library": "transformersx"}),
    "a library that is no text": config(auto_mapping={"parent_library": 7}),
    "a library that is known": config(auto_mapping={"parent_library": "transformers.models.bert.modeling_bert"}),
    "code of a base": config(auto_mapping={"parent_library": "transformers_modules.acme.modeling"}),
    "the code of any base": config(auto_mapping={"parent_library": "transformers_modules", "base_model_class": "X"}),
    "remote code": config(tokenizer_kwargs={"a": [{"trust_remote_code": True}]}),
    "remote code that is off": config(tokenizer_kwargs={"trust_remote_code": False}),
    "another rank": config(r=8),
    "many other ranks": config(r=9) | shapes(
        **{f"l{rank}__lora_A__weight": [rank, 2] for rank in (5, 3, 2, 7)}, l__lora_embedding_A=[4, 2]
    ) | {CONFIG_NAME: config(r=9)[CONFIG_NAME]},
    "three other ranks": SOUND | shapes(**{f"l{rank}__lora_A__weight": [rank, 2] for rank in (5, 3, 2)}),
    "a rank that one tensor has": SOUND | shapes(a__lora_A__weight=[4, 2], b__lora_A__weight=[3, 2]),
    "another rank, of two tensors": SOUND | shapes(a__lora_A__weight=[3, 2], b__lora_A__weight=[3, 2]),
    "a tensor of no rank beside another": SOUND | shapes(a__lora_A__weight=[0, 2], b__lora_A__weight=[3, 2]),
    "another rank, and patterns": config(r=8, rank_pattern={"x": 4}),
    "another rank, and parameters": config(r=8, target_parameters=["x"]),
    "another rank, in blocks": config(r=8, use_bdlora={"a": 1}),
    "another rank, of another method": config(r=8, peft_type="LOHA"),
    "no tensors": SOUND | {WEIGHTS_NAME: pack(b"{}")},
    "no tensors, but metadata": header('{"__metadata__":{"format":"pt"}}'),
    "no tensors, of X-LoRA": config(peft_type="XLORA") | {WEIGHTS_NAME: pack(b"{}")},
    "an empty shard": SOUND | shapes(q__lora_A__weight=[0]),
    "empty shards, of another method": config(peft_type="VERA") | {WEIGHTS_NAME: weights({"a": [0], "b": [0]})},
    "flat shards": SOUND | {WEIGHTS_NAME: weights({LORA_A: [32], LORA_B: [32], "bias": [8]})},
    "an empty side": SOUND | {WEIGHTS_NAME: weights({LORA_A: [4, 0], LORA_B: [8, 4]})},
    "an empty side, of another method": config(peft_type="VERA") | {WEIGHTS_NAME: weights({LORA_A: [4, 0]})},
    "another rank of embeddings": SOUND | shapes(e__lora_embedding_A=[4, 9], e__lora_embedding_B=[8, 4]),
    "the rank of a convolution": SOUND | shapes(c__lora_A__weight=[4, 3, 3, 3]),
    "an empty side, of a method that has them": config(peft_type="OSF") | {WEIGHTS_NAME: weights({LORA_A: [4, 0]})},
    "an empty embedding": SOUND | shapes(q__lora_embedding_B=[8]),
    # --- the weights file itself
    "empty weights": SOUND | {WEIGHTS_NAME: b""},
    "weights of eight bytes": SOUND | {WEIGHTS_NAME: b"\x01" + bytes(7)},
    "weights whose header may just be so long": SOUND | {WEIGHTS_NAME: (100_000_000).to_bytes(8, "little") + b"x" * 9},
    "weights of three bytes": SOUND | {WEIGHTS_NAME: b"abc"},
    "weights whose header claims too much": SOUND | {WEIGHTS_NAME: (100_000_001).to_bytes(8, "little") + b"123456789"},
    "weights that end in their header": SOUND | {WEIGHTS_NAME: (1000).to_bytes(8, "little") + b"{}"},
    "weights that end in their data": SOUND | {WEIGHTS_NAME: weights(SHAPES)[:-1]},
    "weights of one byte": SOUND | {WEIGHTS_NAME: b"a"},
    "weights with one byte too many": SOUND | {WEIGHTS_NAME: weights({LORA_A: [4, 8]}) + b"x"},
    "weights of one byte that is not there": header(one("U8", [1], [0, 1])),
    "a pointer to one byte": SOUND | {WEIGHTS_NAME: LFS.partition(b"size")[0] + b"size 1\n"},
    "weights that go on": SOUND | {WEIGHTS_NAME: weights(SHAPES) + b"xyz"},
    **{f"weights that are {kind}": SOUND | {WEIGHTS_NAME: start + b"\xff" * 20} for kind, start in (
        ("a zip", b"PK\x03\x04"), ("a pickle", b"\x80\x02"), ("GGUF", b"GGUF"), ("gzip", b"\x1f\x8b"),
        ("HDF5", b"\x89HDF\r\n"), ("NumPy", b"\x93NUMPY"), ("HTML", b"\n <!DOCTYPE html>"), ("XML", b"<?xml >"),
        ("JSON", b' {"a": 1}'),
    )},
    "weights that are zeros": SOUND | {WEIGHTS_NAME: bytes(7)},
    "weights that are more zeros": SOUND | {WEIGHTS_NAME: bytes(64)},
    "a header that is not UTF-8": header(b'{"\xff": 1}'),
    "a header that is no JSON": header("{"),
    "a header nested without end": header("[" * 100_000),
    "a header that is a list": header("[]"),
    "a header with a name twice": header("{" + A + "[0, 8]}, " + A + "[8, 16]}}", bytes(16)),
    "a header with a fraction": header(one(offsets=[0, 1.5])),
    "a header with a negative number": header(one(offsets=[-1, 15])),
    "a header with NaN": header('{"x": NaN}'),
    "a header with a number beyond 64 bits": header(one(offsets=[0, 2**64])),
    "a header with a number of 30 digits": header(one(offsets=[0, 10**30])),
    "a header whose metadata are a list": header('{"__metadata__": []}'),
    "a header whose metadata hold a number": header('{"__metadata__": {"a": 1}}'),
    "a header whose metadata hold half a character": header('{"__metadata__": {"a": "\\ud800"}}'),
    "a header whose metadata are null": header('{"__metadata__": null}'),
    "a header with half a character": header('{"\\udfff": 1}'),
    "an entry that is a number": header('{"x": 1}'),
    "an entry with more than it should": header(one(more=1)),
    "an entry of no dtype": header(one("F7")),
    "an entry whose dtype is no text": header(json.dumps({"x": {"dtype": 7, "shape": [], "data_offsets": [0, 4]}})),
    "an entry whose shape is no list": header(one(shape="22")),
    "an entry whose shape holds true": header(one(shape=[True])),
    "an entry of three offsets": header(one(offsets=[0, 8, 16])),
    "an entry whose size is another": header(one(offsets=[0, 12])),
    "an entry that ends before it begins": header(one(shape=[0], offsets=[4, 0])),
    "an entry beyond all size": header(one(shape=[2**62, 8], offsets=[0, 0])),
    "a first name that comes once, and a second twice": header(
        "{" + A + "[0, 8]}, " + B + "[8, 16]}, " + B + "[16, 24]}}", bytes(24)
    ),
    "the largest number that may stand there": header(one("U8", [2**64 - 1, 0], [0, 0])),
    "a number of twenty digits that is too large": header(one(offsets=[0, 10**20 - 1])),
    "tensors of a size that only a 64-bit number holds": header(one("U8", [2**64 - 1], [0, 2**64 - 1])),
    "an empty tensor that ends before it begins": header(one("U8", [0], [0, -0]).replace("[0, 0]", "[8, 0]")),
    "tensors that begin together": header("{" + A + "[0, 8]}, " + B + "[0, 8]}}", bytes(8)),
    "an empty tensor in the place of the next": header(
        '{"z": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}, ' + A + "[0, 8]}}", bytes(8)
    ),
    "a hole": header("{" + A + "[0, 8]}, " + B + "[9, 17]}}", bytes(17)),
    "an overlap": header("{" + A + "[0, 8]}, " + B + "[7, 15]}}", bytes(15)),
    "just enough line ends to say so": header(one("U8", [4], [0, 4]), b"\r\n" * 4),
    "a header with a number of 41 digits": header(one(offsets=[0, 10**40])),
    "converted line ends": header(one("U8", [8], [0, 8]), b"\r\n" * 5),
    "too few line ends to say so": header(one("U8", [4], [0, 4]), b"\r\n" * 3),
    "a name that hides": SOUND | {WEIGHTS_NAME: weights({"a\u202eb\n": [0]})},
    # --- pickles
    "a pickle that calls": pickled(packed(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")),
    "a pickle of a list": pickled(packed(b"\x80\x02].")),
    "a pickle that is empty": pickled(b""),
    "a pickle that is none": pickled(b"GGUF and more"),
    "a pickle that is cut off": pickled(packed(b"\x80\x02}.")[:-5]),
    "a legacy pickle that is cut off": pickled(b"\x80\x02K\x01." * 3 + b"\x80\x02}."),
}  # fmt: skip


def laid(place: Path, files: Files) -> Path:
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


def shown(finding: Finding) -> str:
    where = f" ({finding.tensor!r})" if finding.tensor else ""
    return f"{finding.severity} {finding.check}, {finding.origin}{where}\n  {finding.message}\n  > {finding.hint}\n"


def told(place: Path) -> Iterator[str]:
    """What is said in one situation after the other."""
    for number, (name, files) in enumerate(SITUATIONS.items()):
        directory = place / str(number)
        directory.mkdir(parents=True)
        found = preflight(str(laid(directory, files)), allow_pickle=name not in REFUSED, read_pickle=read_pickle)
        yield "\n".join([f"== {name}\n", *map(shown, found.findings)])


def test_messages_of_files(tmp_path: Path) -> None:
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text("\n".join(told(tmp_path / "written")), encoding="utf-8")
    hold_in_order(GOLDEN, told(tmp_path / "read"))


@pytest.mark.parametrize("name", [name for name, files in SITUATIONS.items() if files and not any(files.values())])
def test_files_on_the_hub_have_the_hint_of_those_that_lie_here(name: str, tmp_path: Path) -> None:
    laid(tmp_path / "here", SITUATIONS[name])
    (tmp_path / "empty").mkdir()
    here = preflight(str(tmp_path / "here"), allow_pickle=False)
    there = preflight(str(tmp_path / "empty"), allow_pickle=False, withheld=tuple(SITUATIONS[name]))
    assert [one.hint for one in here.findings] == [one.hint for one in there.findings] != []


def test_the_library_reads_no_corrupt_weights_either(tmp_path: Path) -> None:
    corrupt = []
    for number, (name, files) in enumerate(SITUATIONS.items()):
        directory = laid(tmp_path / str(number), files | {"README.md": b""})
        found = preflight(str(directory), allow_pickle=False).findings
        if WEIGHTS_NAME in files and "file-corrupt" in {one.check for one in found}:
            corrupt.append(name)
            with pytest.raises(SafetensorError), safe_open(directory / WEIGHTS_NAME, "np"):
                pytest.fail(name)
    assert len(corrupt) > 50


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_broken_link(name: str, tmp_path: Path, wording: Wording) -> None:
    laid(tmp_path, SOUND)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("gone")
    (finding,) = preflight(str(tmp_path), allow_pickle=False).findings
    assert (finding.check, finding.severity) == ("file-missing", "error")
    assert name in finding.message
    wording(f"{finding.message}\n> {finding.hint}")


def test_sockets_and_devices(tmp_path: Path, wording: Wording) -> None:
    laid(tmp_path, without(CONFIG_NAME, WEIGHTS_NAME))
    (tmp_path / WEIGHTS_NAME).symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as end:
        before = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket may be 108 bytes long
        try:
            end.bind(CONFIG_NAME)
        finally:
            os.chdir(before)
        of_config, of_weights = preflight(str(tmp_path), allow_pickle=False).findings
    assert CONFIG_NAME in of_config.message
    assert WEIGHTS_NAME in of_weights.message
    wording(of_config.message, of_weights.message)


def test_an_unreadable_directory(tmp_path: Path, wording: Wording) -> None:
    """It is no verdict on the adapter."""
    with wording.of(EngineError) as raised:
        preflight(str(tmp_path / "gone\n"), allow_pickle=False)
    assert "'gone\\n'" in str(raised.value)


def test_the_base_that_a_config_names(tmp_path: Path) -> None:
    assert base_of(str(tmp_path)) is None
    laid(tmp_path, SOUND)
    assert base_of(str(tmp_path)) == "acme/base"
    laid(tmp_path, raw_config("{"))
    assert base_of(str(tmp_path)) is None
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).symlink_to(CONFIG_NAME)
    assert base_of(str(tmp_path)) is None


def test_of_a_folder_with_many_adapters_two_hundred_are_counted(tmp_path: Path) -> None:
    laid(tmp_path, {f"team/adapter-{number}x/{CONFIG_NAME}": b"{}" for number in range(201)})
    (finding,) = preflight(str(tmp_path), allow_pickle=False).findings
    assert finding.hint.startswith("200 ")
    assert "'team/adapter-" in finding.hint
