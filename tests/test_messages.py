"""What a stranger reads at two in the morning: what is wrong, where, whose fault it is, and what to do.

Each row is an adapter as the world has them, a real layout of files, and the words that its report must have.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from tests.support.cases import gated
from tests.support.faults import ALLOW_PICKLE, configure, edit, halve, rename, save_twice
from tests.support.models import ADAPTER_WEIGHTS, Shelf
from tests.support.wording import Wording

CORPUS = Path(__file__).parent / "corpus"
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Row:
    """`source` is a variant of tests.support.models, a directory of the corpus, or empty; `break_` edits its copy.

    `base` names one of tests.support.models or, with a slash, of the corpus; None leaves it to the adapter. Message and
    hint have the names in `says`, in that order.
    """

    name: str
    check: str
    says: tuple[str, ...]
    source: str = "plain"
    break_: Callable[[Path], None] = lambda _: None
    base: str | None = "llama"
    verdict: Verdict = Verdict.FAILED
    origin: Origin | None = None


def row(name: str, check: str, *says: str, **settings: Any) -> Row:
    return Row(name=name, check=check, says=says, **settings)


def files(**contents: Any) -> Callable[[Path], None]:
    """Nothing but these files; names are written with __ for a dot. Tensors by shapes, JSON, or bytes."""

    def make(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        for name, content in contents.items():
            write(directory / name.replace("__", "."), content)

    return make


def write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif all(isinstance(shape, tuple) for shape in content.values()):
        save_file({name: torch.ones(shape) for name, shape in content.items()}, path)
    else:
        path.write_text(json.dumps(content))


def tensors(content: Mapping[str, tuple[int, ...]]) -> Callable[[Path], None]:
    """Another program's tensors under PEFT's name, beside PEFT's config."""
    return lambda directory: write(directory / ADAPTER_WEIGHTS, dict(content))


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = {f"unet.{ATTENTION}.lora_A.weight": (4, 8), f"unet.{ATTENTION}.lora_B.weight": (8, 4)}
FLUX = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": (4, 4) for side in "AB"}
KOHYA = {f"lora_unet_{ATTENTION.replace('.', '_')}.{part}": (4, 4) for part in ("lora_down.weight", "lora_up.weight")}
MLX = {f"model.layers.0.self_attn.q_proj.lora_{side}": (4, 4) for side in "ab"}
MLX_CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}, "num_layers": 16}
ADAPTER_HUB = {"bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight": (4, 8)}
ADAPTER_HUB_CONFIG = {"config": {"reduction_factor": 16}, "config_id": "9076f36a", "model_class": "BertModel"}
GGUF = b"GGUF\x03\x00\x00\x00" + bytes(64)
DIFFUSERS = ("diffusers", "pipe.load_lora_weights(DIRECTORY)", "pipe.fuse_lora(safe_fusing=True)")
MLX_HINT = ("MLX",)
HUB_HINT = ("adapters.init(model)", "model.merge_adapter(name)")


def other_formats() -> tuple[Row, ...]:
    config = "config-invalid"
    both_mlx = files(adapter_config__json=MLX_CONFIG, adapters__safetensors=MLX)
    both_hub = files(adapter_config__json=ADAPTER_HUB_CONFIG, pytorch_adapter__bin=b"PK", head_config__json=b"{}")
    return (
        row("mlx", config, "peft_type", *MLX_HINT, break_=both_mlx),
        row("adapter-hub", config, "peft_type", *HUB_HINT, break_=both_hub),
        row("unet-inside", "keys-missing", *DIFFUSERS, break_=tensors(UNET)),
        row("transformer-inside", "keys-missing", *DIFFUSERS, break_=tensors(FLUX)),
        row("kohya-inside", "keys-missing", "kohya", "convert_sd_adapter_to_peft.py", break_=tensors(KOHYA)),
        row("mlx-inside", "keys-missing", *MLX_HINT, break_=tensors(MLX)),
        row("adapter-hub-inside", "keys-missing", *HUB_HINT, break_=tensors(ADAPTER_HUB)),
    )  # fmt: skip


def of_other_releases() -> tuple[Row, ...]:
    llama, config = "corpus/llama", Origin.CONFIG
    newer = configure(frobnicate=3, peft_version="0.99.0")
    return (
        row("bone", "not-mergeable", "MiSS", "convert-bone-to-miss.py", source="0.15.2/bone", base=llama,
            origin=config),
        row("old-oft", "not-mergeable", "OFT", "0.14.0", source="0.9.0/oft", base=llama, origin=config),
        row("biases-renamed", "keys-missing", "rename", source="0.3.0/lora-bias-all", base=llama),
        row("lokr", "meaning-changed", "0.13", "0.14", source="0.6.2/lokr", base=llama, verdict=Verdict.PASSED),
        row("newer", "not-judged", "frobnicate=3", "0.99.0", verdict=Verdict.ERROR, break_=newer),
        row("unknown-key", "config-invalid", "frobnicate=3", origin=config, break_=configure(frobnicate=3)),
        row("unknown-type", "not-judged", "'NEWLORA'", "peft_type", verdict=Verdict.ERROR,
            break_=configure(peft_type="NEWLORA")),
        row("copies-differ", "keys-unexpected", "lm_head.modules_to_save.weight", "twice", source="modules-to-save",
            break_=save_twice(0.5)),
    )  # fmt: skip


def adapter_and_base() -> tuple[Row, ...]:
    prefix = rename(PREFIX, PREFIX * 3)
    here = "/home/me/runs/llama-tuned"
    bare = configure(task_type="SEQ_CLS")
    return (
        row("head-saved-instead", "targets-not-found", "SEQ_CLS", source="classifier", base="bert-classifier",
            origin=Origin.CONFIG, break_=configure(target_modules=["classifier"])),
        row("no-such-layer", "targets-not-found", "q_proj", origin=Origin.CONFIG,
            break_=configure(target_modules=["query_key_value"])),
        row("all-excluded", "targets-not-found", "q_proj", "exclude_modules", "exclude_modules", origin=Origin.CONFIG,
            break_=configure(target_modules=["q_proj", "v_proj"], exclude_modules=["q_proj", "v_proj"])),
        row("regex-of-names", "targets-not-found", "'q_proj, v_proj'", "target_modules", origin=Origin.CONFIG,
            break_=configure(target_modules="q_proj, v_proj")),
        row("regexes-in-a-list", "targets-not-found", "'.*q_proj'", "target_modules", origin=Origin.CONFIG,
            break_=configure(target_modules=[".*q_proj"])),
        row("no-such-number", "targets-not-found", "layers_to_transform", "7", "layers_to_transform",
            origin=Origin.CONFIG, break_=configure(layers_to_transform=[7])),
        row("no-targets", "targets-not-found", "target_modules", "target_parameters", origin=Origin.CONFIG,
            break_=configure(target_modules=[])),
        row("head-of-another-vocabulary", "shape-mismatch", "[32, 32]", "[64, 32]", source="modules-to-save",
            origin=Origin.ADAPTER, break_=edit(halve("lm_head"))),
        row("rank-of-one-layer", "shape-mismatch", "[2, 32]", "[4, 32]", "; 3 ", "rank_pattern", source="patterns",
            origin=Origin.ADAPTER, break_=configure(rank_pattern={})),
        row("alpha-of-nothing", "no-effect", "lora_alpha", "lora_alpha", break_=configure(lora_alpha=0)),
        row("unknown-initialisation", "config-invalid", "'PiSSA'", origin=Origin.CONFIG,
            break_=configure(init_lora_weights="PiSSA")),
        row("corda", "not-mergeable", "preprocess_corda", "path_initial_model_for_weight_conversion",
            origin=Origin.CONFIG, break_=configure(init_lora_weights="corda")),
        row("wrapped-thrice", "keys-missing", "get_peft_model", break_=prefix),
        row("other-head", "base-mismatch", "SEQ_CLS", "BertForSequenceClassification", "BertModel",
            source="feature-extraction", base="bert-classifier", verdict=Verdict.PASSED, break_=bare),
        row("path-of-the-trainer", "not-judged", "/home/me/runs/llama-tuned", "base.model", base=None,
            verdict=Verdict.ERROR, break_=configure(base_model_name_or_path=here)),
        row("no-base", "not-judged", "--base", base=None, verdict=Verdict.ERROR,
            break_=configure(base_model_name_or_path=None)),
        row("code-of-the-base", "not-judged", "trust-remote-code", base="with-code", verdict=Verdict.ERROR),
        row("rank", "config-invalid", "lora_A", origin=Origin.CONFIG, break_=configure(r=8)),
        row("other-size", "shape-mismatch", "[4, 64]", "[4, 32]", "7", "rank_pattern", source="wide",
            origin=Origin.ADAPTER),
    )  # fmt: skip


ROWS = (*other_formats(), *of_other_releases(), *adapter_and_base())


def lay_out(row: Row, shelf: Shelf, directory: Path) -> None:
    source = CORPUS / "adapters" / row.source if "/" in row.source else shelf.adapter(row.source)
    shutil.copytree(source, directory)
    row.break_(directory)


def base_of(row: Row, shelf: Shelf, root: Path) -> str:
    if row.base == "with-code":
        return str(root / "with-code")
    if str(row.base).startswith("corpus/"):
        return str(CORPUS / "bases" / str(row.base).partition("/")[2])
    return str(shelf.base(str(row.base)))


@pytest.fixture(scope="module")
def told(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, AdapterReport]:
    """All rows in one run."""
    root = tmp_path_factory.mktemp("messages")
    shutil.copytree(shelf.base("llama"), root / "with-code")
    code = {"model_type": "acme", "auto_map": {"AutoConfig": "acme.Config", "AutoModelForCausalLM": "acme.Model"}}
    (root / "with-code" / "config.json").write_text(json.dumps(code))
    entries = []
    for row in ROWS:
        lay_out(row, shelf, root / row.name)
        base = {"base": {"model": base_of(row, shelf, root)}} if row.base else {}
        entries.append({"name": row.name, "path": str(root / row.name)} | base)
    return {one.name: one for one in gated(root, entries, **ALLOW_PICKLE).adapters}


def finding_of(row: Row, report: AdapterReport) -> Finding:
    found = [finding for finding in report.findings if finding.check == row.check]
    assert found, [f"{finding.check}: {finding.message}" for finding in report.findings]
    return found[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_cause_is_found_and_named(row: Row, told: Mapping[str, AdapterReport], wording: Wording) -> None:
    report = told[row.name]
    assert report.verdict is row.verdict, [f"{one.check}: {one.message}" for one in report.findings]
    finding = finding_of(row, report)
    assert finding.severity is (Severity.WARNING if row.verdict is Verdict.PASSED else Severity.ERROR)
    assert row.origin in {None, finding.origin}
    text, place = f"{finding.message}\n{finding.hint}", 0
    for word in row.says:
        place = text.find(word, place)
        assert place != -1, (text, word)
    if row.name == "no-base":  # the other sentences are in the goldens of tests/files and tests/judging
        wording(finding)


def test_no_adapter_has_a_message_twice(told: Mapping[str, AdapterReport]) -> None:
    for name, report in told.items():
        messages = [finding.message for finding in report.findings]
        assert len(messages) == len(set(messages)), name
