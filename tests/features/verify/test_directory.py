"""Every file of a finished directory is accounted for: what differs is named, and what exporters do is not."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from merge_gate.records.terms import Severity
from tests.support.verify.accounting import TEMPLATE, account, kinds, saved_by_transformers_4, saved_by_transformers_5
from tests.support.verify.file_changes import (
    CONFIG,
    GENERATION,
    PROCESSOR,
    SETTINGS,
    TOKENIZER,
    Change,
    added,
    both,
    copies,
    edited,
    older_config,
    read,
    removed,
    reordered,
    replaced,
    swapped,
    write,
)


def encoded(name: str, encoding: str) -> Change:
    return lambda out: (out / name).write_bytes((out / name).read_text().encode(encoding))


def link(name: str, target: str) -> Change:
    return lambda out: ((out / name).unlink(missing_ok=True), (out / name).symlink_to(target))


def pipe(name: str) -> Change:
    return lambda out: ((out / name).unlink(missing_ok=True), os.mkfifo(out / name))


def grown(name: str) -> Change:
    """A file with blanks at its end, and then with zeros up to 300 MB."""

    def change(out: Path) -> None:
        with (out / name).open("ab") as file:
            file.write(b" " * 1000)
            file.truncate(300 * 1024 * 1024)

    return change


def rare(out: Path) -> None:
    values = read(out / TOKENIZER)["model"]["vocab"]
    last = max(values, key=values.__getitem__)
    write(out / "vocab.json", {key: one for key, one in values.items() if key != last} | {f"{last}x": values[last]})


def index(name: str, file: str = "model.safetensors") -> str:
    return json.dumps({"metadata": {}, "weight_map": {name: file}})


INDEX, JOINT, VERSIONED = "model.safetensors.index.json", "processor_config.json", "tokenizer.5.0.0.json"
T, S, C, G, U, X = (
    "tokenizer-differs", "stop-tokens-differ", "config-differs", "settings-differ", "unexpected-file",
    "chat-template-differs",
)  # fmt: skip
W = "stale-shards"

ADDED_FILES = {
    U: (
        "V20a consolidated.00.pth", "V20b model.pt", "V20c model.bin", "V20e model.gguf", "V20f tf_model.h5",
        "V20g flax_model.msgpack", "V20h onnx/model.onnx", "V20l adapter_model.bin", "V20m rust_model.ot",
        "V20n model.ckpt.index", "V20o training_args.bin", "V20p weights", "V20q MODEL.BIN", "V23b torch.py",
        "V23 custom_generate/generate.py", "V43 tokenizer.model", "V43b sentencepiece.bpe.model", "Z06b dict.src.txt",
        "V89 __pycache__/modeling_own.cpython-311.pyc", "Z06a rwkv_vocab_v20230424.txt",
        "Z06c custom_generate/requirements.txt",
    ),
    W: (
        "V20d adapter_model.safetensors", "V20i sub/pytorch_model.bin", "V20j pytorch_model.bin",
        "V20k consolidated.safetensors", "V20r .cache/huggingface/download/model.safetensors",
        "V20s .hidden/model.safetensors",
    ),
}  # fmt: skip
"""Files that are added, by what they are."""

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
WRITTEN_FILES: list[tuple[Any, ...]] = [
    ("V22f", "modeling_own.py", "class OwnForCausalLM: ..,\n", U),
    ("V41a", "special_tokens_map.json", '{"eos_token": "<pad>"}', S, T),
    ("V41b", "added_tokens.json", '{"<evil>": 7}', T),
    ("V44", "chat_template.json", '{"chat_template": "evil"}', X),
    ("V44b", "chat_template.json", "import os", U),
    ("V44c", "chat_template.json", json.dumps({"chat_template": TEMPLATE, "evil": 1}), U),
    ("V52", "chat_template.jinja", TEMPLATE + " ", X),
    ("V52b", "chat_template.jinja", TEMPLATE + "\n", X),
    ("V53", "additional_chat_templates/default.jinja", "evil", X),
    ("V53b", "additional_chat_templates/tool_use.jinja", "evil", X),
    ("V79", "params.json", "{}", U),
    ("V79b", "model_config.yaml", "a: 1", U),
    ("V81", INDEX, index("evil"), U),
    ("V81b", "model.fp16.safetensors.index.json", index("model.norm.weight"), U),
    ("V82", INDEX, index("model.norm.weight", "other.safetensors"), U),
    ("V84", PROCESSOR, DEEP, G),
    ("Z05", "vocab.txt", "#version: 0.2\n<s>\n", U),
    ("Z11", INDEX, '{"weight_map": {}}', U),
    ("Z11b", INDEX, index("model.norm.weight"), U),
]
"""Files with another content, or with a content that makes them what they are."""

CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
FILLED = {"direction": "Left", "strategy": {"Fixed": 64}, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
EDITS: list[tuple[Any, ...]] = [
    ("V22c", PROCESSOR, {"auto_map": {"AutoImageProcessor": "p.E"}}, G),
    ("V22d", GENERATION, {"auto_map": {"G": "p.E"}}, G),
    ("V22e", CONFIG, {"auto_map": {"AutoModelForCausalLM": "x.E"}}, C),
    ("V30", TOKENIZER, {"model__dropout": 0.9}, T),
    ("V31", TOKENIZER, {"model__type": "Unigram"}, T),
    ("V32", TOKENIZER, {"model__ignore_merges": True}, T),
    ("V33", TOKENIZER, {"model__end_of_word_suffix": "</w>"}, T),
    ("V34", TOKENIZER, {"truncation": CUT}, T),
    ("V35", TOKENIZER, {"padding": FILLED}, T),
    ("V36", TOKENIZER, {"added_tokens__1__lstrip": True}, T),
    ("V36b", TOKENIZER, {"added_tokens__1__special": False}, T),
    ("V37", TOKENIZER, {"pre_tokenizer__use_regex": False}, T),
    ("V40a", SETTINGS, {"bos_token": ...}, T),
    ("V40b", SETTINGS, {"eos_token": ...}, S, T),
    ("V40c", SETTINGS, {"eos_token": "<pad>", "pad_token": "</s>"}, S, T),
    ("V40d", SETTINGS, {"add_bos_token": True}, T),
    ("V42a", SETTINGS, {"add_prefix_space": True}, T),
    ("V42b", SETTINGS, {"padding_side": "left"}, T),
    ("V42c", SETTINGS, {"truncation_side": "left"}, T),
    ("V42d", SETTINGS, {"model_max_length": 8}, T),
    ("V53e", SETTINGS, {"chat_template": "evil"}, X),
    ("V57", CONFIG, {"pad_token_id": 7}, C),
    ("V57b", CONFIG, {"bos_token_id": 7}, C),
    ("V57c", CONFIG, {"eos_token_id": 7}, S),
    ("V60a", GENERATION, {"suppress_tokens": [5]}, G),
    ("V60b", GENERATION, {"max_new_tokens": 1}, G),
    ("V60c", GENERATION, {"temperature": 99.0}, G),
    ("V60d", GENERATION, {"temperature": ...}, G),
    ("V60e", GENERATION, {"evil": 1}, G),
    ("V61", GENERATION, {"eos_token_id": [61]}, S),
    ("V61b", GENERATION, {"eos_token_id": [61, 62, 5]}, S),
    ("V64", CONFIG, {"attn_implementation": "kernels-community/evil"}, C),
    ("V64b", CONFIG, {"_attn_implementation": "kernels-community/evil"}, C),
    ("V65", CONFIG, {"rms_norm_eps": 0.1}, C),
    ("V66", CONFIG, {"rope_theta": 7.0}, C),
    ("V67", CONFIG, {"vocab_size": 63}, C),
    ("V68", CONFIG, {"tie_word_embeddings": True}, "tied"),
    ("V69", CONFIG, {"problem_type": "multi_label_classification"}, C),
    ("V69b", CONFIG, {"dtype": "float16"}, "dtype-changed"),
    ("V69c", CONFIG, {"dtype": ...}, "dtype-changed"),
    ("V69d", CONFIG, {"torch_dtype": "float16"}, "dtype-changed"),
    ("V69e", CONFIG, {"architectures": ["LlamaForSequenceClassification"]}, C),
    ("V74", TOKENIZER, {"model__evil": 1}, T),
    ("V77c", TOKENIZER, {"normalizer": None}, T),
    ("V78", PROCESSOR, {"image_mean": [0.4, 0.5, 0.5]}, G),
    ("V78b", PROCESSOR, {"size__height": 64}, G),
    ("V85", CONFIG, {"rope_parameters__factor": 2.0}, C),
    ("V86", CONFIG, {"quantization_config": {"quant_method": "fp8"}}, C),
    ("V87", GENERATION, {"custom_generate": "x/y"}, G),
    ("V88", SETTINGS, {"added_tokens_decoder": {"0": {"content": "</s>", "special": True} | FLAGS}}, T),
    ("W01", CONFIG, {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"negative": 1, "positive": 0}}, C),
    ("Z02", SETTINGS, {"tokenizer_class": "LlamaTokenizer"}, T),
    ("Z02b", SETTINGS, {"tokenizer_class": "EvilTokenizer"}, T),
    ("Z02c", SETTINGS, {"tokenizer_class": ...}, T),
    ("Z03c", CONFIG, {"rope_parameters__rope_theta": 7.0}, C),
    ("Z03d", CONFIG, {"rope_scaling.x": 1}, C),
    ("Z03e", CONFIG, {"rope_scaling.x": {}}, C),
    ("Z08", CONFIG, {"model_type": ...}, C),
    ("Z09", GENERATION, {"eos_token_id": [61.0, 62]}, S),
    ("Z09b", GENERATION, {"bos_token_id": 60.0}, G),
    ("Z15b", GENERATION, {"eos_token_id": [62, 61]}, S),
    ("Z15c", SETTINGS, {"backend": True}, T),
    ("Z15", SETTINGS, {"chat_template": ["evil"]}, X),
]
"""Keys of JSON files with another value, or removed with `...`."""
EVIL = {"AutoTokenizer": ["a.Evil", None], "AutoProcessor": "a.Evil"}
RIGHT = {"chat_template": TEMPLATE}
LARGE = added("chat_template.jinja", "evil{# " + "x" * 5_000_000 + " #}")
ROPE = {"rope_theta": 10000.0}
OLDER = {"rope_parameters": ..., "rope_scaling": ROPE | {"rope_type": "default"}}
OTHERS: list[tuple[Any, ...]] = [
    ("V22a", "auto_map and its code in tokenizer_config.json", [edited(SETTINGS, auto_map=EVIL), added("a.py")], T, U),
    ("V22b", "auto_map and its code in processor_config.json", [edited(JOINT, auto_map=EVIL), added("a.py")], U),
    ("V22g", "code of auto_map removed", [removed("modeling_own.py")], C),
    ("V38", "tokenizer_config.json removed", [removed(SETTINGS)], T),
    ("V39", "tokenizer_config.json in UTF-16", [encoded(SETTINGS, "utf-16")], T),
    ("V39b", "tokenizer_config.json with a byte order mark", [encoded(SETTINGS, "utf-8-sig")], T),
    ("V50", "a template of 5 MB, and the right one in tokenizer_config.json", [LARGE, edited(SETTINGS, **RIGHT)], X),
    ("V53c", "a template in UTF-16", [encoded("chat_template.jinja", "utf-16")], X, T),
    ("V53d", "no template", [removed("chat_template.jinja")], X),
    ("V56", "a FIFO as template", [pipe("chat_template.jinja")], X),
    ("V56b", "a FIFO as tokenizer.json", [pipe(TOKENIZER)], T),
    ("V62", "generation_config.json removed", [removed(GENERATION)], G, S),
    ("V72", "a link to /proc/self/environ as tokenizer_config.json", [link(SETTINGS, "/proc/self/environ")], T),
    ("V73", "a key of tokenizer.json twice", [replaced(TOKENIZER, '"model": {', '"model": {}, "model": {')], T),
    ("V77", "two tokens exchanged in the vocabulary", [swapped], T),
    ("V77b", "vocab.json added, with one rare token changed", [rare], T),
    ("V79c", "a link to a directory", [link("sub", "/etc")], U),
    ("V79d", "a FIFO with a harmless name", [pipe("NOTES.md")], U),
    (
        "V79e",
        "a versioned tokenizer",
        [added(VERSIONED, "{}"), edited(SETTINGS, fast_tokenizer_files=[VERSIONED])],
        T,
        U,
    ),
    ("V83", "a key of config.json twice", [replaced(CONFIG, '"eos_token_id"', '"eos_token_id": 5, "eos_token_id"')], C),
    ("V90", "NaN in generation_config.json", [replaced(GENERATION, "0.6", "NaN")], G),
    ("Z03", "another rope_theta, hidden by rope_scaling", [edited(CONFIG, **OLDER, rope_theta=5e5)], C),
    ("Z03b", "a rope_theta inside of rope_scaling", [edited(CONFIG, rope_parameters=..., rope_scaling=ROPE)], C),
    ("X03", "generation_config.json of 300 MB", [edited(GENERATION, eos_token_id=3), grown(GENERATION)], S, G),
]


def attempts() -> Iterator[ParameterSet]:
    """A change of the directory, and the kinds of differences that it is."""
    rows: list[tuple[str, str, list[Change], tuple[str, ...]]] = [
        *((row[0], row[1], row[2], row[3:]) for row in OTHERS),
        *((row[0], f"{row[1]}: {row[2]!s:.60}", [added(*row[1:3])], row[3:]) for row in WRITTEN_FILES),
        *((row[0], f"{row[1]}: {row[2]!s:.90}", [edited(row[1], **row[2])], row[3:]) for row in EDITS),
    ]
    for kind, names in ADDED_FILES.items():
        for number, name in map(str.split, names):
            rows.append((number, f"{name} added", [added(name)], (kind,)))
    for number, what, changes, expected in rows:
        mark = pytest.mark.attempt(number, what, ", ".join(expected))
        yield pytest.param(both(*changes), set(expected), id=number, marks=mark)


@pytest.mark.parametrize(("change", "expected"), [*attempts()])
def test_a_difference_is_named(base: Path, merged: Path, change: Callable[[Path], object], expected: set[str]) -> None:
    change(merged)
    found, _ = account(merged, base)
    told = "\n".join(f"{one.severity} {one.check}: {one.message}" for one in found)
    assert {one.check for one in found if one.severity == "error"} == expected, told


# --- controls --------------------------------------------------------------------------------------------------------


def in_cache(out: Path) -> None:
    """The layout of the Hub's cache: a snapshot of links to blobs."""
    blobs = out.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(out.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


WITHOUT_TOKENIZER = removed(TOKENIZER, SETTINGS, "chat_template.jinja")
HARMLESS_FILES = {
    "K06 mergekit's recipe and card": ("mergekit_config.yml", "README.md"),
    "K07 a log, a picture, and .gitattributes": ("train.log", "figures/loss.png", ".gitattributes"),
    "K08 the metadata of a download": (
        ".cache/huggingface/download/config.json.metadata", ".cache/huggingface/.gitignore",
        ".cache/huggingface/CACHEDIR.TAG",
    ),
    "K08b a git repository": (".git/HEAD", ".git/lfs/objects/model.safetensors"),
    "K25b README.txt, and LICENSE.txt in a folder": ("README.txt", "docs/LICENSE.txt"),
}  # fmt: skip
HARMLESS_EDITS = [
    ("K10 unsloth's own key", CONFIG, {"unsloth_version": "2026.1.1"}),
    ("K11 use_cache false, as trainers leave it", CONFIG, {"use_cache": False}),
    ("K12 another release and place", CONFIG, {"transformers_version": "4.55.0", "_name_or_path": "/tmp/x"}),
    ("K12b another release in generation_config.json", GENERATION, {"transformers_version": "4.55.0"}),
    ("K15 a tokenizer that was loaded from the Hub", SETTINGS, {"is_local": False}),
    ("K16 another name of the tokenizer's class", SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("K17b transformers 4 adds rope_theta to rope_parameters", CONFIG, {"rope_theta": 10000.0}),
    ("K18 pad_token_id of the tokenizer", CONFIG, {"pad_token_id": 2}),
    ("K18b pad_token_id of the tokenizer in generation_config.json", GENERATION, {"pad_token_id": 2}),
    ("K19 a stop token twice", GENERATION, {"eos_token_id": [61, 62, 62]}),
    ("K19b 0 for 0.0", CONFIG, {"attention_dropout": 0}),
    ("K20 problem_type after a training step", CONFIG, {"problem_type": "single_label_classification"}),
    ("K23 defaults written out", SETTINGS, {"truncation_side": "right", "clean_up_tokenization_spaces": False}),
    ("K24 null for what is absent", CONFIG, {"pad_token_id": None, "quantization": None}),
    ("K26 _from_model_config", GENERATION, {"_from_model_config": False}),
]
HARMLESS: dict[str, list[Change]] = {
    "K01 a copy of the base's files": [],
    "K02 no tokenizer, no template": [WITHOUT_TOKENIZER],
    "K03 saved by transformers 5": [saved_by_transformers_5],
    "K04 saved by transformers 4, as axolotl and unsloth do": [saved_by_transformers_4],
    "K05 all JSON files in another order, without blanks": [reordered],
    "K09 published by merge-gate: no code": [removed("modeling_own.py"), edited(CONFIG, auto_map=...)],
    "K13 the template in tokenizer_config.json only": [removed("chat_template.jinja"), edited(SETTINGS, **RIGHT)],
    "K14 the template with Windows line ends": [added("chat_template.jinja", TEMPLATE.replace("\n", "\r\n"))],
    "K17 config.json by transformers 4": [older_config],
    "K21 no processor": [removed(PROCESSOR)],
    "K22 a snapshot in the Hub's cache": [in_cache],
    "K25 the license of the base, and one more": [removed("LICENSE"), added("NOTICE.txt")],
    **{what: [*map(added, names)] for what, names in HARMLESS_FILES.items()},
    **{what: [edited(name, **changes)] for what, name, changes in HARMLESS_EDITS},
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=what, marks=pytest.mark.attempt(*what.split(" ", 1), "passed"))
        for what, changes in HARMLESS.items()
    ],
)
def test_what_exporters_write_is_expected(base: Path, merged: Path, changes: list[Change]) -> None:
    both(*changes)(merged)
    found, _ = account(merged, base)
    assert [f"{one.check}: {one.message}" for one in found if one.severity == "error"] == []


def test_without_a_tokenizer_a_note_names_what_is_needed(base: Path, merged: Path) -> None:
    WITHOUT_TOKENIZER(merged)
    (note,) = [one for one in account(merged, base)[0] if one.check == T]
    assert note.severity is Severity.NOTE
    assert "tokenizer.json" in note.message


@pytest.mark.attempt("Z13", "labels invented for a head that the base stores", "config-differs")
def test_labels_of_a_head_that_the_base_stores(base: Path, merged: Path) -> None:
    edited(CONFIG, id2label=..., label2id=...)(merged)
    assert kinds(base, merged) == {C}


# --- files of a kind of their own ------------------------------------------------------------------------------------


@pytest.mark.attempt("K36", "a sentence-transformers layout with a dense layer in a folder", "passed")
@pytest.mark.attempt("V24b", "the dense layer's weights changed", "stale-shards")
@pytest.mark.attempt("V24c", "weights in a folder that modules.json does not name", "stale-shards")
@pytest.mark.attempt("V24d", "another pooling", "unexpected-file")
def test_weights_in_a_folder_are_those_of_a_module(base: Path, tmp_path: Path) -> None:
    modules = json.dumps([{"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}])
    of_base, merged = copies(
        base,
        tmp_path,
        added("modules.json", modules),
        edited("1_Pooling/config.json", pooling_mode_mean_tokens=True),
        added("2_Dense/model.safetensors"),
        added("other/model.safetensors"),
    )
    shutil.rmtree(merged / "other")
    assert kinds(merged, of_base) == set()
    added("1_Pooling/config.json", "{}")(merged)
    assert kinds(merged, of_base) == {U}
    shutil.copy(of_base / "1_Pooling" / "config.json", merged / "1_Pooling")
    added("2_Dense/model.safetensors", b"other")(merged)
    assert kinds(merged, of_base) == {W}
    shutil.rmtree(merged / "2_Dense")
    assert kinds(merged, of_base) == {G}
    shutil.copytree(of_base / "2_Dense", merged / "2_Dense")
    shutil.copytree(of_base / "other", merged / "other")
    assert kinds(merged, of_base) == {W}


@pytest.mark.attempt("Z07", "modules.json of sentence-transformers, and its folders, left out", "a note")
@pytest.mark.attempt("Z07b", "modules.json without a folder that it names", "settings-differ")
@pytest.mark.attempt("Z07c", "modules.json without the settings of sentence-transformers", "settings-differ")
def test_the_modules_of_sentence_transformers_are_whole(base: Path, tmp_path: Path) -> None:
    names = ("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
    modules = added("modules.json", '[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    of_base, _ = copies(base, tmp_path, modules, *(added(name, '{"a": 1}') for name in names))
    for name in names:
        merged = shutil.copytree(of_base, tmp_path / name.replace("/", "-"))
        removed(name)(merged)
        assert kinds(merged, of_base) == {G}, name
    (note,) = [one for one in account(base, of_base)[0] if one.check == G]
    assert note.severity is Severity.NOTE
    assert note.message.startswith("the directory has no modules.json: sentence-transformers then takes the mean")
    assert all(name in note.message for name in names)


@pytest.mark.attempt("K37", "other text files of the base, copied", "passed")
@pytest.mark.attempt("V25", "the base's pytorch_model.bin, copied", "stale-shards")
@pytest.mark.attempt("V25b", "the base's GGUF file, copied", "unexpected-file")
@pytest.mark.attempt("V25c", "the base's index of other weights, copied", "unexpected-file")
@pytest.mark.attempt("V25d", "a text file of the base with another content", "unexpected-file")
def test_the_bases_other_weights_are_no_companions(base: Path, tmp_path: Path) -> None:
    others = {"pytorch_model.bin": W, "base.gguf": U, "consolidated.safetensors.index.json": U}
    names = ("original/params.json", *others)
    of_base, merged = copies(base, tmp_path, *(added(name, "{}") for name in names))
    removed(*others)(merged)
    assert kinds(merged, of_base) == set()
    for name, expected in others.items():
        added(name, "{}")(merged)
        assert kinds(merged, of_base) == {expected}, name
        removed(name)(merged)
    added("original/params.json", '{"dim": 1}')(merged)
    assert kinds(merged, of_base) == {U}


@pytest.mark.attempt("Z06d", "a text file of the base changed", "unexpected-file")
@pytest.mark.parametrize("name", ["rwkv_vocab.txt", "requirements.txt", "custom_generate/requirements.txt"])
def test_a_text_file_of_the_base_must_be_equal(base: Path, tmp_path: Path, name: str) -> None:
    of_base, merged = copies(base, tmp_path, added(name, "torch\n"))
    assert kinds(merged, of_base) == set()
    added(name, "evil\n")(merged)
    assert kinds(merged, of_base) == {U}


@pytest.mark.attempt("S12a", "names on the Hub that were not fetched: weights", "unexpected-file")
@pytest.mark.attempt("S12b", "names on the Hub that were not fetched: a README and a picture", "passed")
@pytest.mark.attempt("S12c", "pytorch_model.bin on the Hub", "stale-shards")
@pytest.mark.attempt("V80", "more than 10,000 files", "unexpected-file")
def test_names_that_were_not_fetched_count(base: Path) -> None:
    assert kinds(base, base, withheld=["README.md", "a.png", ".gitattributes"]) == set()
    assert kinds(base, base, withheld=["model.gguf"]) == {U}
    assert kinds(base, base, withheld=["pytorch_model.bin"]) == {W}
    assert kinds(base, base, withheld=[f"{number}.png" for number in range(10_001)]) == {U}


def test_a_difference_of_texts_has_its_place(base: Path, merged: Path) -> None:
    write(merged / "chat_template.jinja", TEMPLATE.replace("content", "contents"))
    (found,) = [one for one in account(merged, base)[0] if one.check == X]
    assert 'the text "default" in "chat_template.jinja" differs from line 1, column 52 on' in found.message


def test_a_difference_of_keys_has_its_key_and_both_values(base: Path, merged: Path) -> None:
    edited(PROCESSOR, size__height=64)(merged)
    (found,) = [one for one in account(merged, base)[0] if one.check == G]
    assert '"size.height of preprocessor_config.json" is 64, expected 32' in found.message
