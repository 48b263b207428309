"""Tokenizers, templates, and processors: whose files are expected, what they load, and what takes too long."""

import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer

from merge_gate.records.terms import Severity
from tests.support.verify.accounting import (
    account,
    kinds,
    saved_by_transformers_4,
    saved_by_transformers_5,
    tokenizer_with,
)
from tests.support.verify.file_changes import (
    GENERATION,
    PROCESSOR,
    SETTINGS,
    TOKENIZER,
    Change,
    added,
    copies,
    edited,
    read,
    removed,
    replaced,
    swapped,
    write,
)

JOINT = "processor_config.json"
T, S, G, X = "tokenizer-differs", "stop-tokens-differ", "settings-differ", "chat-template-differs"


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with two more tokens, and ends a text with one of them."""
    return tokenizer_with(base, tmp_path_factory.mktemp("accounts") / "adapter", "<tool>", "<turn>", eos="<turn>")


def copied(adapter: Path, *names: str) -> Change:
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
@pytest.mark.attempt("V46", "another tokenizer.json next to vocab.json and merges.txt", "tokenizer-differs")
@pytest.mark.attempt("V46b", "merges.txt reordered", "tokenizer-differs")
def test_a_tokenizer_of_an_older_format(older_base: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(older_base, tmp_path / "merged")
    assert kinds(merged, older_base) == set()
    saved_by_transformers_5(merged)
    assert (merged / TOKENIZER).exists()
    assert kinds(merged, older_base) == set()
    swapped(merged)
    assert kinds(merged, older_base) == {T}
    removed(TOKENIZER)(merged)
    lines = (merged / "merges.txt").read_text().splitlines()
    write(merged / "merges.txt", "\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert kinds(merged, older_base) >= {T}


@pytest.mark.attempt("K35", "transformers 5 leaves vocab.json, merges.txt, and the map of special tokens out", "passed")
@pytest.mark.attempt("V47b", "a map of special tokens left out whose tokens are in no other file", "tokenizer-differs")
def test_files_that_transformers_does_not_write_may_be_absent(base: Path, tmp_path: Path) -> None:
    of_base, merged = copies(base, tmp_path, saved_by_transformers_4)
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
    shutil.copy(written / JOINT, merged)
    assert kinds(merged, of_base) == set()
    removed(PROCESSOR)(merged)
    assert kinds(merged, of_base) == set()
    for place in ("image_processor__do_normalize", "image_processor__rescale_factor", "image_processor__crop_size"):
        edited(JOINT, **{place: ...})(merged)
        assert kinds(merged, of_base) == {G}
        shutil.copy(of_base / PROCESSOR, merged)
        assert kinds(merged, of_base) == {G}
        removed(PROCESSOR)(merged)
        shutil.copy(written / JOINT, merged)


@pytest.mark.attempt("Z01d", "a default overrides the base's in its own processor_config.json", "settings-differ")
def test_what_a_processor_loads_is_compared(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    of_base, merged = copies(seeing[0], tmp_path, added(JOINT, '{"processor_class": "CLIPProcessor"}'))
    edited(JOINT, image_processor={"image_processor_type": "CLIPImageProcessor"})(merged)
    assert kinds(merged, of_base) == {G}


@pytest.mark.attempt("Z10", "add_bos_token false, though the tokenizer adds the token", "tokenizer-differs")
@pytest.mark.attempt("Z10b", "add_eos_token true, though the tokenizer adds none", "tokenizer-differs")
@pytest.mark.attempt("K40", "add_bos_token true and add_eos_token false, as the tokenizer does it", "passed")
def test_what_a_tokenizer_adds(base: Path, tmp_path: Path) -> None:
    form = AutoTokenizer.from_pretrained(base).backend_tokenizer
    form.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    of_base, merged = copies(base, tmp_path, lambda out: form.save(str(out / TOKENIZER)))
    for key, value in (("add_bos_token", True), ("add_eos_token", False)):
        for is_right in (True, False):
            shutil.copy(of_base / SETTINGS, merged)
            edited(SETTINGS, **{key: value is is_right})(merged)
            assert (kinds(merged, of_base) == set()) is is_right, key


@pytest.mark.attempt("Z05b", "vocab.txt with an empty line", "tokenizer-differs")
@pytest.mark.attempt("Z05c", "merges.txt without its header", "tokenizer-differs")
@pytest.mark.parametrize(
    ("name", "old", "new"), [("vocab.txt", "</s>", "\n</s>"), ("merges.txt", "#version: 0.2\n", "")]
)
def test_lines_of_a_vocabulary(name: str, old: str, new: str, base: Path, tmp_path: Path) -> None:
    of_base, merged = copies(base, tmp_path, saved_by_transformers_4, added("vocab.txt", "<s>\n</s>\n<pad>\n"))
    replaced(name, old, new)(merged)
    assert kinds(merged, of_base) == {T}


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
