"""The account of a directory's files without a merge: what `verify` says of everything next to the weights.

In: directories. Out: findings. The worker's part runs in this process.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from merge_gate.features.verify.comparison import ReadSettings
from merge_gate.features.verify.directory import directory_findings, expected_files, settings_files
from merge_gate.features.verify.expected_differences import Expectation
from merge_gate.features.verify.finished_settings import read_settings
from merge_gate.files.base_files import read_base
from merge_gate.records.files import AdapterFiles, Entry, Snapshot
from merge_gate.records.terms import Finding, Severity
from tests.support.gating import SPEC
from tests.support.verify.file_changes import CONFIG, GENERATION, PROCESSOR, SETTINGS, TOKENIZER, edited, read, write

EXPORTS = Path(__file__).parents[2] / "features" / "verify" / "exports"
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>\n{% endfor %}"
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It is a test, and a second test of the same words.",
    "def f(x): return x + 1",
]


def account(
    merged: Path,
    base: Path,
    adapter: Path | None = None,
    withheld: Iterable[str] = (),
    facts: Expectation = Expectation(has_base_tensors_only=True),  # noqa: B008 - it is frozen
    needs: str = "",
) -> tuple[list[Finding], ReadSettings]:
    """The findings, and what the worker read. `needs`: the class that the adapter needs, if it is another one."""
    entry = Entry(
        spec=SPEC,
        dtype="auto",
        members=(AdapterFiles(directory=str(adapter or "")),),
        base=Snapshot(name="base", directory=str(base)),
    )
    own = read_base(str(merged), name="merged")
    finished = Snapshot(name="merged", directory=str(merged), base_files=own, withheld=tuple(withheld))
    files = settings_files(finished, entry)
    config = AutoConfig.from_pretrained(base)
    if needs:
        config.architectures = [needs]
    read = read_settings(files, str(merged), config, type(config).from_pretrained(merged), facts)
    return list(directory_findings(finished, expected_files(entry), read)), read


def kinds(merged: Path, base: Path, adapter: Path | None = None, withheld: Iterable[str] = ()) -> set[str]:
    """The kinds of the differences."""
    return {one.check for one in account(merged, base, adapter, withheld)[0] if one.severity is Severity.ERROR}


def rich_base(out: Path) -> Path:
    """A base with all that a model directory has: a byte-level BPE, a template, a processor, code, and papers."""
    shutil.copytree(EXPORTS / "base", out)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<s>", "</s>", "<pad>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<end>"]
    ).save_pretrained(out)
    write(out / "chat_template.jinja", TEMPLATE)
    labels = {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}
    edited(CONFIG, **labels, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})(out)
    generation = {"bos_token_id": 60, "eos_token_id": [61, 62], "temperature": 0.6, "do_sample": True}
    write(out / GENERATION, generation)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3}
    write(out / PROCESSOR, processor | {"size": {"height": 32, "width": 32}})
    write(out / "modeling_own.py", "class OwnForCausalLM: ...\n")
    write(out / "LICENSE", "free\n")
    write(out / "README.md", "# A base\n")
    return out


def saved_by_transformers_4(out: Path) -> None:
    """The layout of transformers 4.5x for the same tokenizer, which axolotl and unsloth write too."""
    form, config = read(out / TOKENIZER), read(out / SETTINGS)
    config = {key: one for key, one in config.items() if key not in {"backend", "is_local", "local_files_only"}}
    added = {str(one["id"]): {key: part for key, part in one.items() if key != "id"} for one in form["added_tokens"]}
    config |= {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "additional_special_tokens": ["<end>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write(out / SETTINGS, config)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {
        f"{name}_token": {"content": text} | flags for name, text in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    write(out / "special_tokens_map.json", tokens | {"additional_special_tokens": ["<end>"]})
    write(out / "vocab.json", form["model"]["vocab"])
    lines = [" ".join(one) for one in form["model"]["merges"]]
    write(out / "merges.txt", "#version: 0.2\n" + "\n".join(lines) + "\n")
    write(out / "added_tokens.json", {})


def saved_by_transformers_5(out: Path) -> None:
    """All files again, by the installed transformers."""
    AutoConfig.from_pretrained(out).save_pretrained(out)
    GenerationConfig.from_pretrained(out).save_pretrained(out)
    AutoTokenizer.from_pretrained(out).save_pretrained(out)
    AutoImageProcessor.from_pretrained(out).save_pretrained(out)


def tokenizer_with(base: Path, out: Path, *tokens: str, eos: str | None = None) -> Path:
    """An adapter's own tokenizer: the base's, with added tokens and perhaps another end token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.save_pretrained(out)
    return out
