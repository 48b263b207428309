"""The tokenizer and the template of a GGUF file are those of its files, except for what the converter rewrites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from merge_gate.config.from_arguments import config_of
from merge_gate.features.quantized.gguf_file import read_header
from merge_gate.features.quantized.gguf_tokenizer import differing_tokenizer
from merge_gate.features.quantized.strength_findings import tokenizer_findings
from merge_gate.features.verify.verify_flow import Verification
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Finding, Severity
from merge_gate.run.view import View
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.quantized.checkpoints import saved
from tests.support.quantized.gguf_files import write, write_llama
from tests.support.quantized.releases import Bench
from tests.support.quantized.tokenizers_of_gguf import FAMILIES, converted, save_tokenizer
from tests.support.quantized.writers import FORMATS, written_in

Keys = dict[str, Any]
Change = Callable[[Keys], object]


def compared(folder: Path, keys: Keys, path: Path, rows: int = 0) -> list[Finding]:
    """The findings on a file with these keys, and an embedding of so many rows."""
    tensors = {"token_embd.weight": torch.zeros(rows, 32)} if rows else {"a": torch.zeros(32)}
    write(path, "llama", {name: (values, Type.F32) for name, values in tensors.items()}, {}, keys)
    with path.open("rb") as file:
        header = read_header(file, {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    names = ("tokenizer.json", "tokenizer_config.json")
    return list(tokenizer_findings(differing_tokenizer(header, {name: str(folder / name) for name in names})))


def nothing(_keys: Keys) -> None:
    pass


def shifted(keys: Keys) -> None:
    keys["tokens"][300:303] = [*keys["tokens"][301:303], keys["tokens"][300]]


def without_added(keys: Keys) -> None:
    keys["tokens"][keys["tokens"].index("  tool")] = "[PAD9]"


def cut(keys: Keys) -> None:
    del keys["tokens"][-12:]


def other_end(keys: Keys) -> None:
    keys["eos_token_id"] += 1


def without_end(keys: Keys) -> None:
    del keys["eos_token_id"]


def other_template(keys: Keys) -> None:
    keys["chat_template"] += " "


def without_template(keys: Keys) -> None:
    del keys["chat_template"]


def crlf(keys: Keys) -> None:
    keys["chat_template"] = keys["chat_template"].replace("\n", "\r\n")


CHANGES: tuple[tuple[Change, str], ...] = (
    (nothing, ""),
    (crlf, ""),
    (shifted, "tokenizer-differs"),
    (without_added, "tokenizer-differs"),
    (cut, "tokenizer-differs"),
    (other_end, "tokenizer-differs"),
    (without_end, "tokenizer-differs"),
    (other_template, "chat-template-differs"),
    (without_template, "chat-template-differs"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_differs_is_named(family: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base", family)
    for change, expected in CHANGES:
        keys = converted(tmp_path / "base", family)
        change(keys)
        found = compared(tmp_path / "base", keys, tmp_path / "model.gguf")
        assert [one.check for one in found] == [expected] * bool(expected), (change, [one.message for one in found])
        assert all(one.severity is Severity.ERROR for one in found)


def test_another_padding_token_is_a_note(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base", "Gemma")
    keys = converted(tmp_path / "base", "Gemma")
    keys["padding_token_id"] += 1
    (one,) = compared(tmp_path / "base", keys, tmp_path / "model.gguf")
    assert (one.check, one.severity) == ("tokenizer-differs", Severity.NOTE)
    assert one.message == "tokenizer.ggml.padding_token_id in the release is 4, expected 3"


@pytest.mark.parametrize(("rows_left_out", "written", "expected"), [(2, -2, 0), (1, -2, 1), (0, -2, 1), (2, -3, 1)])
def test_a_token_without_a_row_in_the_embedding_is_left_out(
    tmp_path: Path, rows_left_out: int, written: int, expected: int
) -> None:
    """Gemma 3 of 1B has such a token for images. Here, the last two are an added token and the padding token."""
    save_tokenizer(tmp_path / "base", "Gemma", more=("<image>",))
    place = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(place.read_bytes()) | {"pad_token": "<image>"}
    place.write_text(json.dumps(settings), encoding="utf-8")
    keys = converted(tmp_path / "base", "Gemma")
    count = keys["tokens"].index("<image>") + 1
    del keys["padding_token_id"], keys["tokens"][count + written :]
    found = compared(tmp_path / "base", keys, tmp_path / "model.gguf", count - rows_left_out)
    errors = [one.check for one in found if one.severity is Severity.ERROR]
    assert errors == ["tokenizer-differs"] * expected, [one.message for one in found]
    assert len(found) == len(errors) + (not rows_left_out)  # a note on the padding token


def test_the_tokens_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base", "Llama 2")
    keys = converted(tmp_path / "base", "Llama 2")
    keys["tokens"][1] = "</end>"
    (one,) = compared(tmp_path / "base", keys, tmp_path / "model.gguf")
    assert one.message.startswith("tokens (1 of ")
    assert one.message.endswith(' differ) in the release is 1 "</end>", expected "</s>"')


def verified(bench: Bench, base: Path, adapter: Path, release: Path, *allowed: str) -> AdapterReport:
    with WorkerSlot() as worker:
        config = config_of([str(adapter)], base=str(base))
        verification = Verification(config, str(release), view=View(), worker=worker, allowed=allowed)
        return verification.compare().adapters[0]


@pytest.fixture
def with_tokenizer(bench: Bench, tmp_path: Path) -> Path:
    """A base with a tokenizer, whose vocabulary its embedding need not have."""
    shutil.copytree(bench.base(), tmp_path / "base")
    save_tokenizer(tmp_path / "base", "Llama 3")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("adds", "expected"),
    [("own", None), pytest.param("none", None, marks=pytest.mark.slow), ("more", "tokenizer-differs")],
)
def test_a_file_may_have_the_tokenizer_of_the_base_if_the_adapter_adds_no_token(
    bench: Bench, with_tokenizer: Path, tmp_path: Path, adds: str, expected: str | None
) -> None:
    """The release has the base's tokenizer. The adapter has none, the same one, or one with more tokens."""
    adapter = tmp_path / "adapter"
    shutil.copytree(bench.adapter("lora", 0.03), adapter)
    if adds != "none":
        save_tokenizer(adapter, "Llama 3", more=("<tool>",) if adds == "more" else ())
    tensors = bench.faulty("right", "lora", 0.03, torch.clone)
    path = tmp_path / "model.gguf"
    write_llama(path, tensors, bench.model().config, Type.Q8_0, Type.Q8_0, converted(with_tokenizer, "Llama 3"))
    entry = verified(bench, with_tokenizer, adapter, path)
    assert entry.cause == expected, [one.message for one in entry.findings if one.check != "strength"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "allowed", "expected"), [
    ("Llama 3", (), None), ("Qwen", (), "tokenizer-differs"),
    ("template", (), "chat-template-differs"), ("template", ("chat-template-differs",), None),
])  # fmt: skip
def test_a_directory_has_the_expected_tokenizer_and_template(
    bench: Bench, with_tokenizer: Path, tmp_path: Path, family: str, allowed: tuple[str, ...], expected: str | None
) -> None:
    tensors = written_in("FP8", bench.faulty("right", "lora", 0.03, torch.clone))
    config = bench.model().config.to_dict() | {"quantization_config": FORMATS["FP8"][1]}
    saved(tmp_path / "release", tensors, config)
    save_tokenizer(tmp_path / "release", family if family in FAMILIES else "Llama 3")
    if family == "template":
        place = tmp_path / "release" / "tokenizer_config.json"
        place.write_text(place.read_text(encoding="utf-8").replace("endfor", "endfor "), encoding="utf-8")
    entry = verified(bench, with_tokenizer, bench.adapter("lora", 0.03), tmp_path / "release", *allowed)
    assert entry.cause == expected, [one.message for one in entry.findings if one.check != "strength"]
