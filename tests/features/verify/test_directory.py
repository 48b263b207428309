"""Every file of a finished directory is accounted for: what differs is named, and what exporters do is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer

from merge_gate.features.verify.expected_differences import ROWS, Expectation
from merge_gate.records.terms import Severity
from tests.support.verify.accounting import (
    TEMPLATE,
    account,
    kinds,
    read,
    rich_base,
    saved_by_transformers_4,
    saved_by_transformers_5,
    tokenizer_with,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich_base(tmp_path_factory.mktemp("accounts") / "base")


@pytest.fixture
def merged(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "merged")
    return tmp_path / "merged"


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """A key of a JSON file set, or removed with `...`. A key with a dot is inside of an object."""

    def change(out: Path) -> None:
        values = read(out / name) if (out / name).exists() else {}
        for key, value in changes.items():
            *outer, last = key.split("__")
            place = values
            for part in outer:
                place = place[part] if isinstance(place, dict) else place[int(part)]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        write(out / name, values)

    return change


def added(name: str, content: str | bytes = b"x") -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def removed(*names: str) -> Callable[[Path], None]:
    return lambda out: [(out / name).unlink() for name in names] and None


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda out: [change(out) for change in changes] and None


def attempt(number: str, what: str, change: Callable[[Path], object], *expected: str) -> Any:
    return pytest.param(
        change, set(expected), id=f"{number} {what}", marks=pytest.mark.attempt(number, what, ", ".join(expected))
    )


def control(number: str, what: str, change: Callable[[Path], object]) -> Any:
    return pytest.param(change, id=f"{number} {what}", marks=pytest.mark.attempt(number, what, "passed"))


def _encoded(name: str, encoding: str) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes((out / name).read_text().encode(encoding)) and None


def _large_template(out: Path) -> None:
    (out / "chat_template.jinja").write_text("evil{# " + "x" * 5_000_000 + " #}")
    edited("tokenizer_config.json", chat_template=TEMPLATE)(out)


def _huge(out: Path) -> None:
    edited("generation_config.json", eos_token_id=3)(out)
    with (out / "generation_config.json").open("ab") as file:
        file.write(b" " * 1000)
        file.truncate(300 * 1024 * 1024)


def _twice(out: Path) -> None:
    text = (out / "tokenizer.json").read_text().rstrip()
    (out / "tokenizer.json").write_text(text[:-1] + ', "model": {"type": "BPE", "vocab": {}, "merges": []}}')


def _again(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text((out / name).read_text().replace(old, new, 1))


def _rare(out: Path) -> None:
    values = (
        read(out / "vocab.json") if (out / "vocab.json").exists() else read(out / "tokenizer.json")["model"]["vocab"]
    )
    last = max(values, key=values.__getitem__)
    write(out / "vocab.json", {key: one for key, one in values.items() if key != last} | {f"{last}x": values[last]})


def _swapped(out: Path) -> None:
    form = read(out / "tokenizer.json")
    vocab = form["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    write(out / "tokenizer.json", form)


def _link(name: str, target: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)

    return change


def _pipe(name: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        os.mkfifo(out / name)

    return change


TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "config.json", "generation_config.json"
SETTINGS, PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"
T, S, C, G, U, X = (
    "tokenizer-differs", "stop-tokens-differ", "config-differs", "settings-differ", "unexpected-file",
    "chat-template-differs",
)  # fmt: skip
W = "stale-shards"

ATTEMPTS = [
    attempt("V20a", "consolidated.00.pth added", added("consolidated.00.pth"), U),
    attempt("V20b", "model.pt added", added("model.pt"), U),
    attempt("V20c", "model.bin added", added("model.bin"), U),
    attempt("V20d", "adapter_model.safetensors added", added("adapter_model.safetensors"), W),
    attempt("V20e", "model.gguf added", added("model.gguf"), U),
    attempt("V20f", "tf_model.h5 added", added("tf_model.h5"), U),
    attempt("V20g", "flax_model.msgpack added", added("flax_model.msgpack"), U),
    attempt("V20h", "model.onnx added", added("onnx/model.onnx"), U),
    attempt("V20i", "sub/pytorch_model.bin added", added("sub/pytorch_model.bin"), W),
    attempt("V20j", "pytorch_model.bin added", added("pytorch_model.bin"), W),
    attempt(
        "V20k", "consolidated.safetensors added, which is no safetensors file", added("consolidated.safetensors"), W
    ),
    attempt("V20l", "adapter_model.bin added", added("adapter_model.bin"), U),
    attempt("V20m", "rust_model.ot added", added("rust_model.ot"), U),
    attempt("V20n", "model.ckpt.index added", added("model.ckpt.index"), U),
    attempt("V20o", "training_args.bin added", added("training_args.bin"), U),
    attempt("V20p", "a file without ending added", added("weights"), U),
    attempt("V20q", "MODEL.BIN added, in capitals", added("MODEL.BIN"), U),
    attempt("V20r", "weights in .cache/", added(".cache/huggingface/download/model.safetensors"), W),
    attempt("V20s", "weights in a hidden directory", added(".hidden/model.safetensors"), W),
    attempt(
        "V22a",
        "auto_map and its code added to tokenizer_config.json",
        both(edited(SETTINGS, auto_map={"AutoTokenizer": ["tok.Evil", None]}), added("tok.py")),
        T,
        U,
    ),
    attempt(
        "V22b",
        "auto_map and its code added to processor_config.json",
        both(edited("processor_config.json", auto_map={"AutoProcessor": "proc.Evil"}), added("proc.py")),
        U,
    ),
    attempt(
        "V22c",
        "auto_map added to preprocessor_config.json",
        edited(PROCESSOR, auto_map={"AutoImageProcessor": "p.E"}),
        G,
    ),
    attempt("V22d", "auto_map added to generation_config.json", edited(GENERATION, auto_map={"G": "p.E"}), G),
    attempt(
        "V22e", "auto_map of config.json names other code", edited(CONFIG, auto_map={"AutoModelForCausalLM": "x.E"}), C
    ),
    attempt(
        "V22f", "the base's code with one changed byte", added("modeling_own.py", "class OwnForCausalLM: ..,\n"), U
    ),
    attempt("V22g", "code of auto_map removed", removed("modeling_own.py"), C),
    attempt("V23", "custom_generate/generate.py added", added("custom_generate/generate.py"), U),
    attempt("V23b", "a module with the name of a package added", added("torch.py"), U),
    attempt("V30", "model.dropout 0.9 in tokenizer.json", edited(TOKENIZER, model__dropout=0.9), T),
    attempt("V31", "another model.type in tokenizer.json", edited(TOKENIZER, model__type="Unigram"), T),
    attempt("V32", "ignore_merges in tokenizer.json", edited(TOKENIZER, model__ignore_merges=True), T),
    attempt("V33", "end_of_word_suffix in tokenizer.json", edited(TOKENIZER, model__end_of_word_suffix="</w>"), T),
    attempt(
        "V34",
        "truncation in tokenizer.json",
        edited(TOKENIZER, truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
        T,
    ),
    attempt(
        "V35",
        "padding in tokenizer.json",
        edited(
            TOKENIZER,
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            },
        ),
        T,
    ),
    attempt("V36", "an added token with lstrip", edited(TOKENIZER, added_tokens__1__lstrip=True), T),
    attempt("V36b", "an added token that is not special", edited(TOKENIZER, added_tokens__1__special=False), T),
    attempt("V37", "use_regex false in the pre-tokenizer", edited(TOKENIZER, pre_tokenizer__use_regex=False), T),
    attempt("V38", "tokenizer_config.json removed", removed(SETTINGS), T),
    attempt("V39", "tokenizer_config.json in UTF-16", _encoded(SETTINGS, "utf-16"), T),
    attempt("V39b", "tokenizer_config.json with a byte order mark", _encoded(SETTINGS, "utf-8-sig"), T),
    attempt("V40a", "bos_token removed", edited(SETTINGS, bos_token=...), T),
    attempt("V40b", "eos_token removed", edited(SETTINGS, eos_token=...), S, T),
    attempt("V40c", "eos_token exchanged with pad_token", edited(SETTINGS, eos_token="<pad>", pad_token="</s>"), S, T),
    attempt("V40d", "add_bos_token added", edited(SETTINGS, add_bos_token=True), T),
    attempt(
        "V41a", "another special_tokens_map.json", added("special_tokens_map.json", '{"eos_token": "<pad>"}'), S, T
    ),
    attempt("V41b", "another added_tokens.json", added("added_tokens.json", '{"<evil>": 7}'), T),
    attempt("V42a", "add_prefix_space added", edited(SETTINGS, add_prefix_space=True), T),
    attempt("V42b", "padding_side left", edited(SETTINGS, padding_side="left"), T),
    attempt("V42c", "truncation_side left", edited(SETTINGS, truncation_side="left"), T),
    attempt("V42d", "model_max_length 8", edited(SETTINGS, model_max_length=8), T),
    attempt("V43", "a second tokenizer.model added", added("tokenizer.model"), U),
    attempt("V43b", "sentencepiece.bpe.model added", added("sentencepiece.bpe.model"), U),
    attempt(
        "V44",
        "chat_template.json added next to the .jinja",
        added("chat_template.json", '{"chat_template": "evil"}'),
        X,
    ),
    attempt("V44b", "chat_template.json without a template", added("chat_template.json", "import os"), U),
    attempt(
        "V44c",
        "chat_template.json with the right template and more",
        added("chat_template.json", json.dumps({"chat_template": TEMPLATE, "evil": 1})),
        U,
    ),
    attempt("V50", "a chat_template.jinja of 5 MB, and the right one in tokenizer_config.json", _large_template, X),
    attempt("V52", "a blank at the end of the chat template", added("chat_template.jinja", TEMPLATE + " "), X),
    attempt("V52b", "a line feed at the end of the chat template", added("chat_template.jinja", TEMPLATE + "\n"), X),
    attempt(
        "V53",
        "additional_chat_templates/default.jinja added",
        added("additional_chat_templates/default.jinja", "evil"),
        X,
    ),
    attempt(
        "V53b",
        "additional_chat_templates/tool_use.jinja added",
        added("additional_chat_templates/tool_use.jinja", "evil"),
        X,
    ),
    attempt("V53c", "a template in UTF-16", _encoded("chat_template.jinja", "utf-16"), X, T),
    attempt("V53d", "no template", removed("chat_template.jinja"), X),
    attempt(
        "V53e", "a template in tokenizer_config.json next to the .jinja", edited(SETTINGS, chat_template="evil"), X
    ),
    attempt("V56", "a FIFO as template", _pipe("chat_template.jinja"), X),
    attempt("V56b", "a FIFO as tokenizer.json", _pipe(TOKENIZER), T),
    attempt("V57", "pad_token_id of config.json", edited(CONFIG, pad_token_id=7), C),
    attempt("V57b", "bos_token_id of config.json", edited(CONFIG, bos_token_id=7), C),
    attempt("V57c", "eos_token_id of config.json", edited(CONFIG, eos_token_id=7), S),
    attempt("V60a", "suppress_tokens added", edited(GENERATION, suppress_tokens=[5]), G),
    attempt("V60b", "max_new_tokens 1", edited(GENERATION, max_new_tokens=1), G),
    attempt("V60c", "temperature 99", edited(GENERATION, temperature=99.0), G),
    attempt("V60d", "temperature removed", edited(GENERATION, temperature=...), G),
    attempt("V60e", "a key that transformers does not know", edited(GENERATION, evil=1), G),
    attempt("V61", "a stop token lost", edited(GENERATION, eos_token_id=[61]), S),
    attempt("V61b", "a stop token more", edited(GENERATION, eos_token_id=[61, 62, 5]), S),
    attempt("V62", "generation_config.json removed", removed(GENERATION), G, S),
    attempt(
        "V64", "attn_implementation names a Hub kernel", edited(CONFIG, attn_implementation="kernels-community/evil"), C
    ),
    attempt(
        "V64b",
        "_attn_implementation names a Hub kernel",
        edited(CONFIG, _attn_implementation="kernels-community/evil"),
        C,
    ),
    attempt("V65", "rms_norm_eps", edited(CONFIG, rms_norm_eps=0.1), C),
    attempt("V66", "rope_theta next to the right rope_parameters", edited(CONFIG, rope_theta=7.0), C),
    attempt("V67", "vocab_size that no tensor has", edited(CONFIG, vocab_size=63), C),
    attempt("V68", "tie_word_embeddings true", edited(CONFIG, tie_word_embeddings=True), "tied"),
    attempt(
        "V69", "problem_type multi_label_classification", edited(CONFIG, problem_type="multi_label_classification"), C
    ),
    attempt("V69b", "another dtype", edited(CONFIG, dtype="float16"), "dtype-changed"),
    attempt("V69c", "no dtype", edited(CONFIG, dtype=...), "dtype-changed"),
    attempt("V69d", "a second dtype under the older name", edited(CONFIG, torch_dtype="float16"), "dtype-changed"),
    attempt("V69e", "another class", edited(CONFIG, architectures=["LlamaForSequenceClassification"]), C),
    attempt("V72", "a link to /proc/self/environ as tokenizer_config.json", _link(SETTINGS, "/proc/self/environ"), T),
    attempt("V73", "a key of tokenizer.json twice", _twice, T),
    attempt("V74", "an unknown key in tokenizer.json", edited(TOKENIZER, model__evil=1), T),
    attempt("V77", "two tokens exchanged in the vocabulary", _swapped, T),
    attempt("V77b", "vocab.json added, with one rare token changed", _rare, T),
    attempt("V77c", "a normalizer removed", edited(TOKENIZER, normalizer=None), T),
    attempt("V78", "image_mean of the processor", edited(PROCESSOR, image_mean=[0.4, 0.5, 0.5]), G),
    attempt("V78b", "a key of the processor's size", edited(PROCESSOR, size__height=64), G),
    attempt("V79", "an unknown JSON file", added("params.json", "{}"), U),
    attempt("V79b", "a YAML file", added("model_config.yaml", "a: 1"), U),
    attempt("V79c", "a link to a directory", _link("sub", "/etc"), U),
    attempt("V79d", "a FIFO with a harmless name", _pipe("NOTES.md"), U),
    attempt(
        "V79e",
        "a versioned tokenizer",
        both(added("tokenizer.5.0.0.json", "{}"), edited(SETTINGS, fast_tokenizer_files=["tokenizer.5.0.0.json"])),
        T,
        U,
    ),
    attempt(
        "V81",
        "an index of the single file with a tensor that it lacks",
        added(
            "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"evil": "model.safetensors"}})
        ),
        U,
    ),
    attempt(
        "V82",
        "an index that names another file",
        added("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "other.safetensors"}}'),
        U,
    ),
    attempt(
        "V83", "a key of config.json twice", _again(CONFIG, '"eos_token_id"', '"eos_token_id": 5, "eos_token_id"'), C
    ),
    attempt(
        "V84", "a processor's file nested 100,000 deep", added(PROCESSOR, '{"a":' * 100_000 + "1" + "}" * 100_000), G
    ),
    attempt("V85", "rope_parameters with one key more", edited(CONFIG, rope_parameters__factor=2.0), C),
    attempt("V86", "quantization_config added", edited(CONFIG, quantization_config={"quant_method": "fp8"}), C),
    attempt("V87", "custom_generate in generation_config.json", edited(GENERATION, custom_generate="x/y"), G),
    attempt(
        "V88",
        "an entry of added_tokens_decoder with another id",
        edited(
            SETTINGS,
            added_tokens_decoder={
                "0": {
                    "content": "</s>",
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
            },
        ),
        T,
    ),
    attempt("V89", "a compiled module in __pycache__", added("__pycache__/modeling_own.cpython-311.pyc"), U),
    attempt("V90", "NaN in generation_config.json", _again(GENERATION, "0.6", "NaN"), G),
    attempt(
        "W01",
        "the labels exchanged",
        edited(CONFIG, id2label={"0": "positive", "1": "negative"}, label2id={"negative": 1, "positive": 0}),
        C,
    ),
    attempt("Z02", "tokenizer_class LlamaTokenizer", edited(SETTINGS, tokenizer_class="LlamaTokenizer"), T),
    attempt("Z02b", "a tokenizer_class of no release", edited(SETTINGS, tokenizer_class="EvilTokenizer"), T),
    attempt("Z02c", "no tokenizer_class", edited(SETTINGS, tokenizer_class=...), T),
    attempt(
        "Z03",
        "another rope_theta, hidden by rope_scaling",
        both(
            edited(CONFIG, rope_parameters=..., rope_theta=500000.0),
            edited(CONFIG, rope_scaling={"rope_type": "default", "rope_theta": 10000.0}),
        ),
        C,
    ),
    attempt(
        "Z03b",
        "a rope_theta inside of rope_scaling",
        both(edited(CONFIG, rope_parameters=...), edited(CONFIG, rope_scaling={"rope_theta": 10000.0})),
        C,
    ),
    attempt("Z03c", "rope_theta inside of rope_parameters changed", edited(CONFIG, rope_parameters__rope_theta=7.0), C),
    attempt("Z03d", "a key with a dot", edited(CONFIG, **{"rope_scaling.x": 1}), C),
    attempt("Z03e", "a key with a dot, and an object", edited(CONFIG, **{"rope_scaling.x": {}}), C),
    attempt("Z08", "model_type removed", edited(CONFIG, model_type=...), C),
    attempt("Z09", "a stop token as 61.0", edited(GENERATION, eos_token_id=[61.0, 62]), S),
    attempt("Z09b", "bos_token_id as 60.0", edited(GENERATION, bos_token_id=60.0), G),
    attempt("Z15b", "the stop tokens in another order", edited(GENERATION, eos_token_id=[62, 61]), S),
    attempt("Z15c", "backend true", edited(SETTINGS, backend=True), T),
    attempt("Z05", "vocab.txt added, with a header", added("vocab.txt", "#version: 0.2\n<s>\n"), U),
    attempt("Z06a", "a vocabulary of an unknown name added", added("rwkv_vocab_v20230424.txt"), U),
    attempt("Z06b", "dict.src.txt added", added("dict.src.txt"), U),
    attempt("Z06c", "custom_generate/requirements.txt added", added("custom_generate/requirements.txt"), U),
    attempt("Z11", "an empty index of the single file", added("model.safetensors.index.json", '{"weight_map": {}}'), U),
    attempt(
        "Z11b",
        "an index of the single file with one tensor only",
        added("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "model.safetensors"}}'),
        U,
    ),
    attempt(
        "V81b",
        "a further index that names the right file",
        added(
            "model.fp16.safetensors.index.json",
            json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}),
        ),
        U,
    ),
    attempt("Z15", "a chat template in a list, without a name", edited(SETTINGS, chat_template=["evil"]), X),
    attempt("X03", "generation_config.json of 300 MB", _huge, S, G),
]


@pytest.mark.parametrize(("change", "expected"), ATTEMPTS)
def test_a_difference_is_named(base: Path, merged: Path, change: Callable[[Path], object], expected: set[str]) -> None:
    change(merged)
    found, _ = account(merged, base)
    told = "\n".join(f"{one.severity} {one.check}: {one.message}" for one in found)
    assert {one.check for one in found if one.severity == "error"} == expected, told


# --- controls --------------------------------------------------------------------------------------------------------


def _without_tokenizer(out: Path) -> None:
    removed(TOKENIZER, SETTINGS, "chat_template.jinja")(out)


def _reordered(out: Path) -> None:
    for path in out.glob("*.json"):
        path.write_text(json.dumps(dict(reversed(read(path).items())), separators=(",", ":")))


def _in_cache(out: Path) -> None:
    """The layout of the Hub's cache: a snapshot of links to blobs."""
    blobs = out.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(out.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def _older_config(out: Path) -> None:
    """As transformers 4 writes it: the older names, and no defaults."""
    values = read(out / CONFIG)
    values |= {
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": values["dtype"],
        "transformers_version": "4.46.0",
    }
    for key in ("rope_parameters", "dtype", "head_dim", "mlp_bias", "attention_bias", "pretraining_tp"):
        del values[key]
    write(out / CONFIG, values)


CONTROLS = [
    control("K01", "a copy of the base's files", lambda _: None),
    control("K02", "no tokenizer, no template", _without_tokenizer),
    control("K03", "saved by transformers 5", saved_by_transformers_5),
    control("K04", "saved by transformers 4, as axolotl and unsloth do", saved_by_transformers_4),
    control("K05", "all JSON files in another order, without blanks", _reordered),
    control("K06", "mergekit's recipe and card", both(added("mergekit_config.yml"), added("README.md", "# merged"))),
    control(
        "K07",
        "a log, a picture, and .gitattributes",
        both(added("train.log"), added("figures/loss.png"), added(".gitattributes")),
    ),
    control(
        "K08",
        "the metadata of a download",
        both(
            added(".cache/huggingface/download/config.json.metadata"),
            added(".cache/huggingface/.gitignore"),
            added(".cache/huggingface/CACHEDIR.TAG"),
        ),
    ),
    control("K08b", "a git repository", both(added(".git/HEAD"), added(".git/lfs/objects/model.safetensors"))),
    control("K09", "published by merge-gate: no code", both(removed("modeling_own.py"), edited(CONFIG, auto_map=...))),
    control("K10", "unsloth's own key", edited(CONFIG, unsloth_version="2026.1.1")),
    control("K11", "use_cache false, as trainers leave it", edited(CONFIG, use_cache=False)),
    control("K12", "another release and place", edited(CONFIG, transformers_version="4.55.0", _name_or_path="/tmp/x")),
    control("K12b", "another release in generation_config.json", edited(GENERATION, transformers_version="4.55.0")),
    control(
        "K13",
        "the template in tokenizer_config.json only",
        both(removed("chat_template.jinja"), edited(SETTINGS, chat_template=TEMPLATE)),
    ),
    control(
        "K14",
        "the template with Windows line ends",
        lambda out: (out / "chat_template.jinja").write_bytes(TEMPLATE.replace("\n", "\r\n").encode()),
    ),
    control("K15", "a tokenizer that was loaded from the Hub", edited(SETTINGS, is_local=False)),
    control(
        "K16", "another name of the tokenizer's class", edited(SETTINGS, tokenizer_class="PreTrainedTokenizerFast")
    ),
    control("K17", "config.json by transformers 4", _older_config),
    control("K18", "pad_token_id of the tokenizer", edited(CONFIG, pad_token_id=2)),
    control("K18b", "pad_token_id of the tokenizer in generation_config.json", edited(GENERATION, pad_token_id=2)),
    control("K19", "a stop token twice", edited(GENERATION, eos_token_id=[61, 62, 62])),
    control("K19b", "0 for 0.0", edited(CONFIG, attention_dropout=0)),
    control("K17b", "transformers 4 adds rope_theta to rope_parameters", edited(CONFIG, rope_theta=10000.0)),
    control("K20", "problem_type after a training step", edited(CONFIG, problem_type="single_label_classification")),
    control("K21", "no processor", removed(PROCESSOR)),
    control("K22", "a snapshot in the Hub's cache", _in_cache),
    control(
        "K23", "a default written out", edited(SETTINGS, truncation_side="right", clean_up_tokenization_spaces=False)
    ),
    control("K24", "null for what is absent", edited(CONFIG, pad_token_id=None, quantization=None)),
    control("K25", "the license of the base, and one more", both(removed("LICENSE"), added("NOTICE.txt"))),
    control("K25b", "README.txt, and LICENSE.txt in a folder", both(added("README.txt"), added("docs/LICENSE.txt"))),
    control("K26", "_from_model_config", edited(GENERATION, _from_model_config=False)),
]


@pytest.mark.parametrize("change", CONTROLS)
def test_what_exporters_write_is_expected(base: Path, merged: Path, change: Callable[[Path], object]) -> None:
    change(merged)
    found, _ = account(merged, base)
    assert [f"{one.check}: {one.message}" for one in found if one.severity == "error"] == []


def test_without_a_tokenizer_a_note_names_what_is_needed(base: Path, merged: Path) -> None:
    _without_tokenizer(merged)
    (note,) = [one for one in account(merged, base)[0] if one.check == T]
    assert note.severity is Severity.NOTE
    assert "tokenizer.json" in note.message


# --- the table of expected differences -------------------------------------------------------------------------------

TENSORS = Expectation(resized=frozenset({(64, 72)}), is_untied=True, has_base_tensors_only=True)
"""What the tensors of a merge may tell: rows were added, and the head was untied."""

_COPIED = Expectation(has_base_tensors_only=True)

ROW_TESTS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], Expectation]] = {
    "any JSON file: any key": (
        both(saved_by_transformers_5, _reordered),
        both(saved_by_transformers_5, edited(SETTINGS, model_max_length=9)),
        _COPIED,
    ),
    "any JSON file: a default": (
        edited(SETTINGS, clean_up_tokenization_spaces=False),
        edited(SETTINGS, clean_up_tokenization_spaces=True),
        _COPIED,
    ),
    "config.json, generation_config.json, tokenizer.json: a key that is left out": (
        edited(CONFIG, mlp_bias=...),
        edited(CONFIG, max_position_embeddings=...),
        _COPIED,
    ),
    "config.json, generation_config.json, tokenizer_config.json: null": (
        edited(CONFIG, evil=None),
        edited(GENERATION, temperature=None),
        _COPIED,
    ),
    "any JSON file: `transformers_version`; `_name_or_path`": (
        edited(CONFIG, transformers_version="4.0.0"),
        edited(CONFIG, transformers_version={"evil": 1}),
        _COPIED,
    ),
    "config.json: `unsloth_version`": (
        edited(CONFIG, unsloth_version="1"),
        edited(CONFIG, unsloth_version=["x"]),
        _COPIED,
    ),
    "config.json, generation_config.json: `use_cache`": (
        edited(CONFIG, use_cache=False),
        edited(GENERATION, use_cache="evil"),
        _COPIED,
    ),
    "config.json: `vocab_size`": (edited(CONFIG, vocab_size=72), edited(CONFIG, vocab_size=71), TENSORS),
    "config.json: `tie_word_embeddings` false": (
        edited(CONFIG, tie_word_embeddings=False),
        edited(CONFIG, tie_word_embeddings=False),
        TENSORS,
    ),
    "config.json: `dtype` of a part of the model": (
        edited(CONFIG, part={"dtype": "bfloat16"}),
        edited(CONFIG, part={"dtype": "float16"}),
        _COPIED,
    ),
    "config.json: `architectures` of the base": (
        lambda _: None,
        edited(CONFIG, architectures=["LlamaForTokenClassification"]),
        _COPIED,
    ),
    "config.json: `id2label`, `label2id` of a head that the base lacks": (
        edited(CONFIG, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}),
        edited(CONFIG, id2label={"0": "a", "1": "b"}, label2id={"a": 1, "b": 0}),
        Expectation(),
    ),
    "config.json: `problem_type` single_label_classification": (
        edited(CONFIG, problem_type="single_label_classification"),
        edited(CONFIG, problem_type="regression"),
        _COPIED,
    ),
    "config.json, generation_config.json: `pad_token_id` of the tokenizer": (
        edited(CONFIG, pad_token_id=2),
        edited(CONFIG, pad_token_id=3),
        _COPIED,
    ),
    "config.json, generation_config.json: `bos_token_id` or `eos_token_id` that the base leaves out": (
        edited(GENERATION, bos_token_id=0),
        edited(GENERATION, bos_token_id=3),
        _COPIED,
    ),
    "config.json, generation_config.json: `eos_token_id`": (
        edited(GENERATION, eos_token_id=[61, 62, 61]),
        edited(GENERATION, eos_token_id=62),
        _COPIED,
    ),
    "generation_config.json: `_from_model_config`": (
        edited(GENERATION, _from_model_config=False),
        edited(GENERATION, _from_model_config=[1]),
        _COPIED,
    ),
    "any JSON file: `auto_map`, `custom_pipelines` removed": (
        edited(CONFIG, auto_map=...),
        edited(CONFIG, auto_map={"AutoModelForCausalLM": "modeling_own.Evil"}),
        _COPIED,
    ),
    "tokenizer_config.json: `added_tokens_decoder`": (
        saved_by_transformers_4,
        both(saved_by_transformers_4, edited(SETTINGS, added_tokens_decoder__1__rstrip=True)),
        _COPIED,
    ),
    "tokenizer_config.json: `tokenizer_class`": (
        edited(SETTINGS, tokenizer_class="PreTrainedTokenizerFast"),
        edited(SETTINGS, tokenizer_class="BertTokenizer"),
        _COPIED,
    ),
    "tokenizer_config.json: `backend`": (edited(SETTINGS, backend=...), edited(SETTINGS, backend=True), _COPIED),
    "tokenizer_config.json: `is_local`, `local_files_only`": (
        edited(SETTINGS, is_local=False),
        edited(SETTINGS, is_local="evil"),
        _COPIED,
    ),
    "config.json: `rope_theta`, `rope_scaling`": (
        _older_config,
        both(_older_config, edited(CONFIG, rope_theta=5.0)),
        _COPIED,
    ),
}
"""For each row: a difference that it expects, and one in the same key that changes the meaning."""

BASES: dict[str, Callable[[Path], object]] = {
    "config.json: `tie_word_embeddings` false": edited(CONFIG, tie_word_embeddings=True),
    "config.json: `id2label`, `label2id` of a head that the base lacks": edited(CONFIG, id2label=..., label2id=...),
    "config.json, generation_config.json: `bos_token_id` or `eos_token_id` that the base leaves out": edited(
        GENERATION, bos_token_id=...
    ),
    "any JSON file: any key": saved_by_transformers_4,
}
"""Changes of the base, and of its copy, for the rows that need one."""


@pytest.mark.parametrize("row", [row.shown for row in ROWS])
def test_each_row_expects_its_difference_and_not_the_opposite(row: str, base: Path, tmp_path: Path) -> None:
    right, wrong, facts = ROW_TESTS[row]
    of_row = shutil.copytree(base, tmp_path / "base")
    BASES.get(row, lambda _: None)(of_row)
    needs = "LlamaModel" if "architectures" in row else ""
    for name, change, is_right in (("right", right, True), ("wrong", wrong, False)):
        merged = shutil.copytree(of_row, tmp_path / name)
        change(merged)
        told = facts if is_right or "tie_" not in row else _COPIED
        found, seen = account(merged, of_row, facts=told, needs=needs)
        odd = [f"{one.check}: {one.message}" for one in found if one.severity is Severity.ERROR]
        assert bool(odd) != is_right, odd
        if is_right:
            assert row in {one.row for one in seen.differences}


def test_the_table_has_a_test_for_each_row() -> None:
    assert ROW_TESTS.keys() == {row.shown for row in ROWS}
    assert len(ROW_TESTS) == len(ROWS)


@pytest.mark.attempt("Z13", "labels invented for a head that the base stores", "config-differs")
def test_labels_of_a_head_that_the_base_stores(base: Path, tmp_path: Path) -> None:
    of_base, merged = (shutil.copytree(base, tmp_path / name) for name in ("base", "merged"))
    edited(CONFIG, id2label=..., label2id=...)(of_base)
    assert kinds(merged, of_base) == {C}


@pytest.mark.attempt("Z10", "add_bos_token false, though the tokenizer adds the token", "tokenizer-differs")
@pytest.mark.attempt("Z10b", "add_eos_token true, though the tokenizer adds none", "tokenizer-differs")
@pytest.mark.attempt("K40", "add_bos_token true and add_eos_token false, as the tokenizer does it", "passed")
def test_what_a_tokenizer_adds(base: Path, tmp_path: Path) -> None:
    of_base = shutil.copytree(base, tmp_path / "base")
    form = AutoTokenizer.from_pretrained(base).backend_tokenizer
    form.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    form.save(str(of_base / TOKENIZER))
    merged = shutil.copytree(of_base, tmp_path / "merged")
    for key, value in (("add_bos_token", True), ("add_eos_token", False)):
        for is_right in (True, False):
            shutil.copy(of_base / SETTINGS, merged)
            edited(SETTINGS, **{key: value is is_right})(merged)
            assert (kinds(merged, of_base) == set()) is is_right, key


# --- whose file is expected ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with two more tokens, and ends a text with one of them."""
    return tokenizer_with(base, tmp_path_factory.mktemp("accounts") / "adapter", "<tool>", "<turn>", eos="<turn>")


def copied(adapter: Path, *names: str) -> Callable[[Path], None]:
    return lambda out: (
        [shutil.copy(path, out) for path in adapter.iterdir() if not names or path.name in names] and None
    )


@pytest.mark.attempt("K30", "the adapter's own tokenizer with added tokens", "passed")
@pytest.mark.attempt("K31", "the adapter's own end token added to the stop tokens", "passed")
def test_the_adapters_own_tokenizer_is_expected(base: Path, adapter: Path, merged: Path) -> None:
    copied(adapter)(merged)
    assert kinds(merged, base, adapter) == set()
    number = read(merged / TOKENIZER)["added_tokens"][-1]["id"]
    edited(GENERATION, eos_token_id=[61, 62, number])(merged)
    assert kinds(merged, base, adapter) == set()
    edited(GENERATION, eos_token_id=[61, number])(merged)
    assert kinds(merged, base, adapter) == {S}, "a stop token of the base is lost"


@pytest.mark.attempt("V45", "the base's tokenizer, though the adapter has its own", "tokenizer-differs")
@pytest.mark.attempt("V45b", "the adapter's tokenizer.json, and the base's settings", "tokenizer-differs")
def test_the_bases_tokenizer_is_not_expected_beside_an_adapters(base: Path, adapter: Path, merged: Path) -> None:
    assert kinds(merged, base, adapter) >= {T}
    copied(adapter, TOKENIZER)(merged)
    assert kinds(merged, base, adapter) >= {S}


@pytest.mark.attempt("K32", "a template that the adapter brings", "passed")
@pytest.mark.attempt("V51", "the base's template, though the adapter has its own", "chat-template-differs")
def test_the_adapters_own_template_is_expected(base: Path, merged: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter" / "chat_template.jinja", "own")
    assert kinds(merged, base, tmp_path / "adapter") == {X}
    write(merged / "chat_template.jinja", "own")
    assert kinds(merged, base, tmp_path / "adapter") == set()


@pytest.fixture(scope="module")
def older_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has no tokenizer.json."""
    out = shutil.copytree(base, tmp_path_factory.mktemp("accounts") / "older")
    saved_by_transformers_4(out)
    edited(SETTINGS, tokenizer_class="GPT2Tokenizer", unk_token="<pad>")(out)
    removed(TOKENIZER, "added_tokens.json")(out)
    return out


@pytest.mark.attempt("K33", "vocab.json and merges.txt, copied", "passed")
@pytest.mark.attempt("K34", "tokenizer.json that transformers makes of vocab.json and merges.txt", "passed")
@pytest.mark.attempt(
    "V46", "vocab.json, merges.txt, and another tokenizer.json, which comes first", "tokenizer-differs"
)
@pytest.mark.attempt("V46b", "merges.txt reordered", "tokenizer-differs")
def test_a_tokenizer_of_an_older_format(older_base: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(older_base, tmp_path / "merged")
    assert kinds(merged, older_base) == set()
    saved_by_transformers_5(merged)
    assert (merged / TOKENIZER).exists()
    assert kinds(merged, older_base) == set()
    _swapped(merged)
    assert kinds(merged, older_base) == {T}
    removed(TOKENIZER)(merged)
    lines = (merged / "merges.txt").read_text().splitlines()
    write(merged / "merges.txt", "\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert kinds(merged, older_base) >= {T}


@pytest.mark.attempt("K35", "transformers 5 leaves vocab.json, merges.txt, and the map of special tokens out", "passed")
@pytest.mark.attempt("V47b", "a map of special tokens left out whose tokens are in no other file", "tokenizer-differs")
def test_files_that_transformers_does_not_write_may_be_absent(base: Path, tmp_path: Path) -> None:
    of_base = shutil.copytree(base, tmp_path / "base")
    saved_by_transformers_4(of_base)
    merged = shutil.copytree(of_base, tmp_path / "merged")
    saved_by_transformers_5(merged)
    removed("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")(merged)
    assert kinds(merged, of_base) == set()
    edited(SETTINGS, bos_token=..., added_tokens_decoder=...)(of_base)
    again = shutil.copytree(of_base, tmp_path / "again")
    removed("special_tokens_map.json")(again)
    assert kinds(again, of_base) == {T}


@pytest.fixture(scope="module")
def seeing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a processor of transformers 4, and what transformers 5 writes for it."""
    root = tmp_path_factory.mktemp("accounts")
    of_base = shutil.copytree(base, root / "seeing")
    settings = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_normalize": False}
    write(of_base / PROCESSOR, settings | {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    AutoProcessor.from_pretrained(of_base).save_pretrained(root / "written")
    return of_base, root / "written"


@pytest.mark.attempt("K39", "processor_config.json by transformers 5, without preprocessor_config.json", "passed")
@pytest.mark.attempt("K39b", "processor_config.json by transformers 5, next to preprocessor_config.json", "passed")
@pytest.mark.attempt("Z01", "a partial processor_config.json added, which comes first", "settings-differ")
@pytest.mark.attempt("Z01b", "only a partial processor_config.json", "settings-differ")
@pytest.mark.attempt("Z01c", "a default for a key left out of a partial processor_config.json", "settings-differ")
def test_a_processor_in_the_file_of_transformers_5(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    of_base, written = seeing
    merged = shutil.copytree(of_base, tmp_path / "merged")
    shutil.copy(written / "processor_config.json", merged)
    assert kinds(merged, of_base) == set()
    removed(PROCESSOR)(merged)
    assert kinds(merged, of_base) == set()
    for place in ("image_processor__do_normalize", "image_processor__rescale_factor", "image_processor__crop_size"):
        edited("processor_config.json", **{place: ...})(merged)
        assert kinds(merged, of_base) == {G}
        shutil.copy(of_base / PROCESSOR, merged)
        assert kinds(merged, of_base) == {G}
        removed(PROCESSOR)(merged)
        shutil.copy(written / "processor_config.json", merged)


@pytest.mark.attempt("Z01d", "a default overrides the base's in its own processor_config.json", "settings-differ")
def test_what_a_processor_loads_is_compared(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    of_base = shutil.copytree(seeing[0], tmp_path / "base")
    write(of_base / "processor_config.json", {"processor_class": "CLIPProcessor"})
    merged = shutil.copytree(of_base, tmp_path / "merged")
    edited("processor_config.json", image_processor={"image_processor_type": "CLIPImageProcessor"})(merged)
    assert kinds(merged, of_base) == {G}


# --- files of a kind of their own ------------------------------------------------------------------------------------


@pytest.mark.attempt("K36", "a sentence-transformers layout with a dense layer in a folder", "passed")
@pytest.mark.attempt("V24b", "the dense layer's weights changed", "stale-shards")
@pytest.mark.attempt("V24c", "weights in a folder that modules.json does not name", "stale-shards")
@pytest.mark.attempt("V24d", "another pooling", "unexpected-file")
def test_weights_in_a_folder_are_those_of_a_module(base: Path, tmp_path: Path) -> None:
    of_base = shutil.copytree(base, tmp_path / "base")
    write(of_base / "modules.json", [{"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}])
    write(of_base / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    added("2_Dense/model.safetensors", b"dense")(of_base)
    added("other/model.safetensors", b"dense")(of_base)
    merged = shutil.copytree(of_base, tmp_path / "merged")
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
    of_base = shutil.copytree(base, tmp_path / "base")
    write(of_base / "modules.json", [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}])
    names = ("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
    for name in names:
        write(of_base / name, {"a": 1})
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
    of_base = shutil.copytree(base, tmp_path / "base")
    for name in ("pytorch_model.bin", "base.gguf", "original/params.json", "consolidated.safetensors.index.json"):
        added(name, "{}")(of_base)
    for name, expected in (
        ("original/params.json", set()),
        ("pytorch_model.bin", {W}),
        ("base.gguf", {U}),
        ("consolidated.safetensors.index.json", {U}),
    ):
        merged = shutil.copytree(base, tmp_path / name.replace("/", "-"))
        (merged / name).parent.mkdir(exist_ok=True)
        shutil.copy(of_base / name, merged / name)
        assert kinds(merged, of_base) == expected, name
    added("original/params.json", '{"dim": 1}')(merged)
    assert U in kinds(merged, of_base)


@pytest.mark.attempt("Z06d", "a text file of the base changed", "unexpected-file")
@pytest.mark.parametrize("name", ["rwkv_vocab.txt", "requirements.txt", "custom_generate/requirements.txt"])
def test_a_text_file_of_the_base_must_be_equal(base: Path, tmp_path: Path, name: str) -> None:
    of_base = shutil.copytree(base, tmp_path / "base")
    added(name, "torch\n")(of_base)
    merged = shutil.copytree(of_base, tmp_path / "merged")
    assert kinds(merged, of_base) == set()
    added(name, "evil\n")(merged)
    assert kinds(merged, of_base) == {U}


@pytest.mark.attempt("Z05b", "vocab.txt with an empty line", "tokenizer-differs")
@pytest.mark.attempt("Z05c", "merges.txt without its header", "tokenizer-differs")
def test_lines_of_a_vocabulary(base: Path, tmp_path: Path) -> None:
    of_base = shutil.copytree(base, tmp_path / "base")
    saved_by_transformers_4(of_base)
    added("vocab.txt", "<s>\n</s>\n<pad>\n")(of_base)
    for name, old, new in (("vocab.txt", "</s>", "\n</s>"), ("merges.txt", "#version: 0.2\n", "")):
        merged = shutil.copytree(of_base, tmp_path / name)
        _again(name, old, new)(merged)
        assert kinds(merged, of_base) == {T}


@pytest.mark.attempt("S12a", "names on the Hub that were not fetched: weights", "unexpected-file")
@pytest.mark.attempt("S12b", "names on the Hub that were not fetched: a README and a picture", "passed")
@pytest.mark.attempt("S12c", "pytorch_model.bin on the Hub", "stale-shards")
def test_names_that_were_not_fetched_count(base: Path, merged: Path) -> None:
    assert kinds(merged, base, withheld=["README.md", "a.png", ".gitattributes"]) == set()
    assert kinds(merged, base, withheld=["model.gguf"]) == {U}
    assert kinds(merged, base, withheld=["pytorch_model.bin"]) == {W}


@pytest.mark.attempt("V80", "more than 10,000 files", "unexpected-file")
def test_a_directory_of_very_many_files_is_named(base: Path, merged: Path) -> None:
    assert kinds(merged, base, withheld=[f"{number}.png" for number in range(10_001)]) == {U}


@pytest.mark.attempt("V75", "tokenizer.json that does not load", "tokenizer-differs")
@pytest.mark.attempt("K38", "a tokenizer that does not load, as in the base", "passed")
@pytest.mark.attempt("V75b", "a key changed in a tokenizer that does not load, as in the base", "tokenizer-differs")
def test_a_tokenizer_that_does_not_load(base: Path, merged: Path, tmp_path: Path) -> None:
    write(merged / TOKENIZER, {"model": {"type": "None"}})
    assert kinds(merged, base) == {T}
    of_base = shutil.copytree(merged, tmp_path / "base")
    assert kinds(merged, of_base) == set()
    edited(TOKENIZER, model__type="Other")(merged)
    assert kinds(merged, of_base) == {T}


@pytest.mark.attempt("V76", "a tokenizer whose regular expression takes for ever", "tokenizer-differs")
def test_a_tokenizer_that_panics_is_a_difference(base: Path, merged: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+\\1$"}, "behavior": "Isolated", "invert": False}
    edited(TOKENIZER, pre_tokenizer=split)(merged)
    assert kinds(merged, base) == {T}


@pytest.mark.attempt("V76b", "a tokenizer that does not load in time", "tokenizer-differs")
def test_a_tokenizer_that_takes_too_long_costs_its_limit(
    base: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_gate.features.verify.finished_settings.TIMEOUT_S", 0.0)
    edited(TOKENIZER, truncation=None)(merged)
    (found,) = [one for one in account(merged, base)[0] if one.check == T and one.severity is Severity.ERROR]
    assert "longer than 0 s" in found.message


def test_a_difference_of_texts_has_its_place(base: Path, merged: Path) -> None:
    write(merged / "chat_template.jinja", TEMPLATE.replace("content", "contents"))
    (found,) = [one for one in account(merged, base)[0] if one.check == X]
    assert 'the text "default" in "chat_template.jinja" differs from line 1, column 52 on' in found.message


def test_a_difference_of_keys_has_its_key_and_both_values(base: Path, merged: Path) -> None:
    edited(PROCESSOR, size__height=64)(merged)
    (found,) = [one for one in account(merged, base)[0] if one.check == G]
    assert '"size.height of preprocessor_config.json" is 64, expected 32' in found.message
